"""`mmpeft sites MODEL`: what it counts is what adapters have, without any weights."""

import pytest
import transformers
from transformers import AutoModelForCausalLM

from mmpeft.adapters import AdapterBank
from mmpeft.cli import main
from mmpeft.tools.targets_table import count_parameters, empty_model, method_rows, role_rows, usual_methods
from mmpeft.tools.tiny_models import tiny_model
from tests.tiny import make_model_config


@pytest.fixture
def falcon():
    """A random Falcon of two layers: 4 query heads of 8 features over 2 key-value heads, fused."""
    fused = {"num_kv_heads": 2, "ffn_hidden_size": 48, "new_decoder_architecture": True}
    return AutoModelForCausalLM.from_config(make_model_config("falcon", **fused))


def counted(model, config) -> int:
    """Numbers of a real adapter."""
    bank = AdapterBank(model)
    bank.add("a", config)
    return sum(parameter.numel() for parameter in bank.parameters())


def test_the_model_is_built_without_weights(tiny_base):
    model = empty_model(str(tiny_base / "language"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_tied_head_counts_once(tiny_llama, make_llama):
    tied = make_llama(tie_word_embeddings=True)
    assert count_parameters(tiny_llama) - count_parameters(tied) == tied.lm_head.weight.numel()


def test_roles_of_a_gated_model(tiny_llama):
    rows = {row.role: row for row in role_rows(tiny_llama)}
    assert list(rows) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert rows["k"].names == ["self_attn.k_proj"]
    assert rows["k"].features == ["64 -> 32"]
    assert rows["down"].features == ["128 -> 64"]
    assert {row.sites for row in rows.values()} == {2}


def test_roles_of_a_fused_model(falcon):
    rows = {row.role: row for row in role_rows(falcon)}
    assert list(rows) == ["q", "k", "v", "o", "up", "down"]
    assert rows["q"].names == rows["v"].names == ["self_attention.query_key_value"]
    assert rows["q"].features == ["32 -> 32 of 64"]
    assert rows["v"].features == ["32 -> 16 of 64"]


@pytest.mark.parametrize("method", usual_methods())
def test_counts_are_those_of_real_adapters(make_llama, method):
    row = next(row for row in method_rows(make_llama()) if row.method == method)
    assert row.parameters == counted(make_llama(), usual_methods()[method])


def test_methods_touch_their_roles(tiny_llama):
    rows = {row.method: row for row in method_rows(tiny_llama)}
    everywhere = ["q", "k", "v", "o", "gate", "up", "down"]
    assert rows["LoRA r=16"].touches == ["q", "v"]
    assert rows["IA3 (T-Few)"].touches == ["k", "v", "down"]
    assert rows["BitFit"].touches == everywhere
    assert rows["bottleneck of 64"].touches == ["mlp"]
    assert [row.sites for row in rows.values()] == [4, 14, 4, 6, 14, 2, 1, 1, 14]
    assert rows["BitFit"].parameters == 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert rows["bottleneck of 64"].parameters == 2 * (64 * 64 + 64 + 64 * 64 + 64)


def test_ia3_has_no_numbers_for_the_queries_of_a_fused_projection(falcon):
    lora, _, _, ia3, *_ = method_rows(falcon)
    assert lora.touches == ["q", "k", "v"], "LoRA changes all of the linear"
    assert ia3.touches == ["k", "v", "down"]
    assert ia3.parameters == 2 * (16 + 16 + 48)


def test_linears_outside_of_the_blocks_keep_their_path():
    config = make_model_config("opt", ffn_dim=48, word_embed_proj_dim=16)
    rows = {row.method: row for row in method_rows(AutoModelForCausalLM.from_config(config))}
    everywhere, biases = rows["LoRA r=16, all linears"], rows["BitFit"]
    assert everywhere.touches[-2:] == ["model.decoder.project_out", "model.decoder.project_in"]
    assert everywhere.sites == biases.sites + 2


def test_the_command_prints_both_tables(tiny_base, capsys):
    main(["sites", str(tiny_base / "language")])
    out = capsys.readouterr().out
    for words in ("LlamaForCausalLM", "self_attn.k_proj", "64 -> 32", "q, v", "IA3", "bottleneck of 64"):
        assert words in out


def test_a_model_without_known_roles_is_told(tmp_path):
    transformers.T5Config(num_layers=1, d_model=32).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .* is an encoder-decoder model \(t5\)"):
        main(["sites", str(tmp_path)])
    transformers.MambaConfig(num_hidden_layers=1, hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"error: MambaForCausalLM: no linear of .* is known to be up, down"):
        main(["sites", str(tmp_path)])


def test_a_mixture_of_experts_has_a_table_that_says_which_methods_it_refuses():
    rows = {row.method: row for row in method_rows(tiny_model("mixtral"))}
    assert rows["IA3 (T-Few)"].touches == ["k", "v", "down"]
    assert rows["IA3 (T-Few)"].parameters == 4 * (2 * 32 + 4 * 96)
    assert rows["full, all linears"].touches[0].startswith("refused: model.layers.")
    assert rows["full, all linears"].parameters == 0
