"""Loading the language model: complete or refused, in the right type, and quantised with its gradients."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto

from mmpeft.adapters.base_weights import read_weight
from mmpeft.errors import RefusedError
from mmpeft.models import language
from mmpeft.models.language import (
    LanguageConfig,
    load_language_model,
    load_tokenizer,
    pick_attention,
    pick_dtype,
)
from mmpeft.runs import identity
from mmpeft.runs.identity import identify
from mmpeft.tools.tiny_models import tiny_model


@pytest.fixture
def checkpoint(tiny_base, tmp_path):
    return shutil.copytree(tiny_base / "language", tmp_path / "language")


def embeds(seed=0):
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def gradient(model):
    inputs = embeds()
    model(inputs_embeds=inputs).logits.square().sum().backward()
    return inputs.grad


def test_model_is_frozen_in_eval_mode_and_as_asked(checkpoint):
    model = load_language_model(LanguageConfig(str(checkpoint), dtype="bfloat16", attention="sdpa"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "sdpa"


def test_a_checkpoint_that_lacks_tensors_is_refused_by_name(checkpoint):
    state = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del state[name]
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors") as error:
        load_language_model(LanguageConfig(str(checkpoint), dtype="float32"))
    assert name in str(error.value)
    assert str(checkpoint) in str(error.value)


def test_a_model_that_loads_in_a_moment_shows_no_bar(checkpoint, capsys, monkeypatch):
    load_language_model(LanguageConfig(str(checkpoint)))
    assert "Loading weights" not in capsys.readouterr().err
    monkeypatch.setattr("mmpeft.models.language.SECONDS_WITHOUT_A_BAR", 0)
    load_language_model(LanguageConfig(str(checkpoint)))
    assert "Loading weights" in capsys.readouterr().err


@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_language_model(LanguageConfig(name))])
def test_a_path_that_does_not_exist_is_not_mistaken_for_a_hub_id(checkpoint, load):
    with pytest.raises(FileNotFoundError, match=r"no such folder; did you mean .*language"):
        load(str(checkpoint.parent / "langauge"))
    with pytest.raises(FileNotFoundError, match=r"'./none': no such folder"):
        load("./none")


def test_dtype_is_what_the_processor_multiplies_fast(monkeypatch):
    for avx, amx, wanted in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert pick_dtype("auto") == wanted
    assert pick_dtype("float32") == torch.float32
    assert pick_dtype("bfloat16") == torch.bfloat16


def test_attention_is_what_measures_faster():
    assert pick_attention("auto", "cpu") == "eager"
    assert pick_attention("auto", "cuda") == "sdpa"
    assert pick_attention("sdpa", "cpu") == "sdpa"


def test_gradient_checkpointing_leaves_the_same_gradients(checkpoint):
    plain = load_language_model(LanguageConfig(str(checkpoint), dtype="float32"))
    recomputed = load_language_model(
        LanguageConfig(str(checkpoint), dtype="float32", gradient_checkpointing=True)
    )
    assert recomputed.is_gradient_checkpointing
    assert torch.equal(gradient(plain.train()), gradient(recomputed.train()))


def test_identity_tells_other_weights_and_another_config(checkpoint):
    def who(**changes):
        return identify(LanguageConfig(str(checkpoint), **changes))

    before = who()
    assert who(dtype="float32") == before, "how it is held is a choice of the run, not of the base"
    assert who(quantization="nf4") == before
    state = load_file(checkpoint / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + 0.5
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert who()["weights"] != before["weights"]
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    assert who()["config"] != before["config"]


@pytest.fixture
def quantised(checkpoint):
    return load_language_model(LanguageConfig(str(checkpoint), dtype="float32", quantization="nf4"))


def linears(model):
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


def test_nf4_quantises_every_linear_but_the_head(quantised):
    assert len(linears(quantised)) == 2 * 7
    assert type(quantised.lm_head) is torch.nn.Linear
    assert {module.weight.quant_type for module in linears(quantised)} == {"nf4"}
    assert all(module.weight.quant_state.nested for module in linears(quantised)), "double quantisation"


def test_gradients_flow_through_a_quantised_base_after_an_evaluation(quantised):
    """bitsandbytes repacks weights for a kernel without autograd at the first forward in eval mode."""
    before = gradient(quantised.train())
    with torch.no_grad():
        quantised.eval()(inputs_embeds=embeds())
    after = gradient(quantised.train())
    assert float(before.norm()) > 0
    assert torch.equal(before, after)
    assert not any(module.support_avx512bf16_for_cpu for module in linears(quantised))


def test_int8_base_gives_gradients(checkpoint):
    model = load_language_model(LanguageConfig(str(checkpoint), dtype="float32", quantization="int8"))
    assert float(gradient(model.train()).norm()) > 0


@torch.no_grad()
def test_int8_computes_the_same_while_it_trains_and_after(checkpoint):
    """With the weights that are read; bitsandbytes by itself rounds activations too, in evaluation alone, on CPU."""
    model = load_language_model(LanguageConfig(str(checkpoint), dtype="float32", quantization="int8"))
    layer = model.model.layers[0].self_attn.q_proj
    trained, answered = (
        model.train()(inputs_embeds=embeds()).logits,
        model.eval()(inputs_embeds=embeds()).logits,
    )
    assert torch.equal(trained, answered)
    assert (model.training, layer.training) == (False, False)
    torch.testing.assert_close(layer(embeds()), embeds() @ read_weight("q_proj", layer).T)


def test_weights_of_a_hub_model_are_found_beside_its_index(checkpoint, monkeypatch):
    shards = [checkpoint / name for name in ("model-1.safetensors", "model-2.safetensors")]
    for shard in shards:
        shutil.copy(checkpoint / "model.safetensors", shard)
    (checkpoint / "model.safetensors").unlink()
    monkeypatch.setattr(
        identity, "cached_file", lambda *_, **__: str(checkpoint / "model.safetensors.index.json")
    )
    assert identity._weight_files("someone/something") == shards


@pytest.mark.parametrize("damage", ["config", "weights", "shape"])
def test_what_transformers_says_against_a_model_is_a_refusal(checkpoint, damage):
    if damage == "config":
        (checkpoint / "config.json").write_text('{"model_type": "no_such_model"}')
    elif damage == "weights":
        (checkpoint / "model.safetensors").unlink()
    else:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(RefusedError, match="cannot be loaded by transformers"):
        load_language_model(LanguageConfig(str(checkpoint)))


def test_an_adapter_in_the_bases_folder_is_not_loaded_into_the_base(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"holds a PEFT adapter \(adapter_config.json\)"):
        load_language_model(LanguageConfig(str(checkpoint)))


def test_auto_attention_is_one_that_the_model_has(tmp_path, monkeypatch, capsys):
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    monkeypatch.setattr(language, "pick_attention", lambda name, device: "sdpa")
    model = load_language_model(LanguageConfig(str(tmp_path)))
    assert model.config._attn_implementation == "eager"
    assert f"{tmp_path} has no sdpa attention" in capsys.readouterr().err
    with pytest.raises(RefusedError, match="attention implementation"):
        load_language_model(LanguageConfig(str(tmp_path), attention="sdpa"))


def test_quantisation_says_what_it_leaves_dense(tmp_path, capsys):
    tiny_model("mixtral").save_pretrained(tmp_path)
    load_language_model(LanguageConfig(str(tmp_path), quantization="nf4"))
    told = capsys.readouterr().err
    assert re.search(r"nf4: \d+ weights stay dense, \d+ MB: .*model.layers.\*.mlp.experts.gate_up_proj", told)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused_by_name(checkpoint):
    tokenizer = load_tokenizer(str(checkpoint))
    size = len(tokenizer)
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(
        RefusedError, match=rf"has 1 tokens, such as '<beyond>' \({size}\), beyond the {size} rows"
    ):
        load_tokenizer(str(checkpoint))


def test_mistral_common_beside_transformers_changes_nothing(checkpoint, monkeypatch):
    """With that library there, transformers takes its class for Mistral's models unless it is told not to."""
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(settings | {"model_type": "mistral"}))
    plain = type(load_tokenizer(str(checkpoint)))

    class Theirs:
        from_pretrained = classmethod(lambda cls, *_, **__: cls())

    there = {"_use_mistral_format": lambda *_, mistral_format=None, **__: mistral_format is not False}
    by_name = tokenization_auto.tokenizer_class_from_name
    there["tokenizer_class_from_name"] = lambda name: Theirs if "MistralCommon" in name else by_name(name)
    for name, stand_in in there.items():
        monkeypatch.setattr(tokenization_auto, name, stand_in)
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    assert type(AutoTokenizer.from_pretrained(checkpoint)) is Theirs
    assert type(load_tokenizer(str(checkpoint))) is plain
