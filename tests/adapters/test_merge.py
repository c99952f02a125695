"""A merged base computes what the adapted model computed: on dense weights.

On bf16 the weights are rounded anew, as PEFT's merge does; there the error is held against PEFT's.
"""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mmpeft.adapters import (
    BitFitConfig,
    BottleneckConfig,
    DoraConfig,
    FullConfig,
    HybridConfig,
    IA3Config,
    LoraConfig,
    PromptConfig,
)
from mmpeft.adapters.merge import merge, unwrap
from mmpeft.adapters.peft_format import load_adapter, save_adapter
from mmpeft.adapters.weight_updates import add_lora
from tests.adapters.conftest import random_biases
from tests.adapters.toy_method import ToyConfig

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LORA = LoraConfig(rank=4, alpha=6, target_modules="all-linear")
IA3 = IA3Config()
IA3_OUTPUTS = IA3Config(["k_proj", "up_proj", "down_proj"], [])
IA3_BOTH_SIDES = IA3Config(["v_proj", "up_proj", "down_proj"])


@pytest.fixture
def make_gpt2():
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = GPT2Config(
                n_embd=64,
                n_layer=2,
                n_head=4,
                vocab_size=128,
                initializer_range=0.1,
                bos_token_id=0,
                eos_token_id=0,
            )
            return random_biases(GPT2LMHeadModel(config)).eval()

    return make


@torch.no_grad()
def plain_logits(bank, ids):
    return unwrap(bank)(ids).logits


@pytest.mark.parametrize(
    "config", [LORA, IA3, IA3_OUTPUTS, IA3_BOTH_SIDES], ids=["lora", "ia3", "outputs", "both"]
)
def test_a_dense_base_takes_every_finetune(make_dense, make_bank, logits_of, tokens, config):
    ids = tokens(3)
    bank = make_bank({"a": config}, model=make_dense())
    base, want = logits_of(bank, [None] * 3, ids), logits_of(bank, ["a"] * 3, ids)
    merge(bank, "a")
    assert bank.names == []
    torch.testing.assert_close(logits_of(bank, [None] * 3, ids), want, **CLOSE)
    torch.testing.assert_close(plain_logits(bank, ids), want, **CLOSE)
    assert (want - base).abs().max() > 0.5, "nothing to merge"
    assert not any("base" in path for path, _ in bank.model.named_modules())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=6, target_modules=["c_attn", "mlp.c_proj"]),
        IA3Config(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    ],
    ids=["lora", "ia3"],
)
def test_conv1d_keeps_its_weight_transposed(make_gpt2, make_bank, logits_of, tokens, config):
    ids = tokens(2)
    bank = make_bank({"a": config}, model=make_gpt2())
    want = logits_of(bank, ["a"] * 2, ids)
    merge(bank, "a")
    torch.testing.assert_close(plain_logits(bank, ids), want, **CLOSE)


@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
def test_a_bf16_base_is_rounded_once_and_equals_pefts(
    make_dense, make_bank, tokens, logits_of, tmp_path, config
):
    ids = tokens(4)
    bank = make_bank({"a": config}, model=make_dense().bfloat16())
    exact = make_bank({"a": config}, model=make_dense().bfloat16().float())
    want = logits_of(exact, ["a"] * 4, ids)
    save_adapter(bank, "a", tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(make_dense().bfloat16(), tmp_path).merge_and_unload()
    merge(bank, "a")
    merge(exact, "a")
    for (path, got), full in zip(unwrap(bank).named_parameters(), unwrap(exact).parameters(), strict=True):
        assert torch.equal(got, full.bfloat16()), f"{path} was rounded more than once"
    with torch.no_grad():
        error = {name: (m(ids).logits.float() - want).abs().mean() for name, m in
                 {"ours": bank.model, "peft": theirs}.items()}  # fmt: skip
    assert 0 < error["ours"] < 1.2 * error["peft"]


def test_several_methods_on_one_linear_are_rounded_once_together(make_dense, make_bank):
    config = HybridConfig([IA3_BOTH_SIDES, LORA, DoraConfig(rank=2), FullConfig(["v_proj"])])
    merged = []
    for dtype in (torch.bfloat16, torch.float32):
        bank = make_bank({"a": config}, model=make_dense().bfloat16().to(dtype))
        tied = [parameter.data_ptr() for parameter in bank.model.parameters()]
        merge(bank, "a")
        assert [parameter.data_ptr() for parameter in bank.model.parameters()] == tied
        merged.append(dict(unwrap(bank).named_parameters()))
    for path, full in merged[1].items():
        got = merged[0][path]
        assert got.dtype is torch.bfloat16
        # DoRA's norms are of the base in its own dtype, where the rest is the same to the bit
        off = (got.float() - full.bfloat16().float()).ne(0).float().mean()
        assert off < 0.02, f"{path}: {off:.0%} of the weights were rounded more than once"


def test_it_is_pefts_merge(make_dense, make_bank, tmp_path):
    for config in (LORA, IA3):
        bank = make_bank({"a": config}, model=make_dense())
        save_adapter(bank, "a", tmp_path / config.method, "tiny")
        theirs = peft.PeftModel.from_pretrained(make_dense(), tmp_path / config.method).merge_and_unload()
        merge(bank, "a")
        ours, want = unwrap(bank).state_dict(), theirs.state_dict()
        assert ours.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(
                ours[key], want[key], rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_the_other_finetunes_stay(make_dense, make_bank, logits_of, tokens):
    ids = tokens(1)
    bank = make_bank(model=make_dense())
    kept = {name: bank.tensors(name) for name in bank.names if name != "small"}
    merge(bank, "small")
    assert bank.names == list(kept)
    for name, tensors in kept.items():
        assert all(torch.equal(bank.tensors(name)[key], tensor) for key, tensor in tensors.items())
    assert (logits_of(bank, ["large"], ids) - logits_of(bank, [None], ids)).abs().max() > 0.1


def test_a_diverged_finetune_is_refused(make_bank, poison):
    bank = make_bank()
    poison(bank, "small")
    with pytest.raises(ValueError, match=r"'small' holds NaN or infinite values in 8 tensors, such as"):
        merge(bank, "small")
    assert all(
        parameter.isfinite().all()
        for parameter in bank.layers["model.layers.0.self_attn.q_proj"].base.parameters()
    )


def test_names_and_bases_that_are_not_there(make_bank):
    bank = make_bank()
    with pytest.raises(KeyError, match="no finetune 'other'"):
        merge(bank, "other")
    with pytest.raises(ValueError, match="still holds small, large"):
        unwrap(bank)


def test_a_merged_base_is_a_base(make_dense, make_bank, logits_of, tokens, tmp_path):
    """The finetune of a second round is filled, saved, loaded and merged on top of the first."""
    ids = tokens(1)
    bank = make_bank({"a": LORA}, model=make_dense())
    merge(bank, "a")
    second = make_bank({"b": IA3}, model=copy.deepcopy(unwrap(bank)))
    save_adapter(second, "b", tmp_path, "tiny")
    want = logits_of(second, ["b"], ids)
    load_adapter(bank, "b", tmp_path)
    assert torch.equal(logits_of(bank, ["b"], ids), want)
    merge(bank, "b")
    torch.testing.assert_close(plain_logits(bank, ids), want, **CLOSE)


def test_lora_is_added_with_its_scaling():
    linear = nn.Linear(5, 3)
    before, A, B = linear.weight.detach().clone(), torch.randn(2, 5), torch.randn(3, 2)
    add_lora(linear, A, B, 0.7)
    torch.testing.assert_close(linear.weight.detach(), before + 0.7 * B @ A)


OTHERS = {
    "dora": DoraConfig(rank=3, alpha=5, target_modules="all-linear"),
    "full": FullConfig(["q_proj", "down_proj"]),
    "bitfit": BitFitConfig(),
    "toy": ToyConfig(),
    "hybrid": HybridConfig([LORA, IA3_BOTH_SIDES, BitFitConfig(["o_proj"])]),
    "toy after others": HybridConfig([ToyConfig(["q_proj", "up_proj"]), LORA, IA3, BitFitConfig()]),
    "scaled DoRA": HybridConfig([DoraConfig(rank=4, target_modules="all-linear"), IA3_OUTPUTS]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_changes_of_weights_merge_too(name, make_dense, make_bank, logits_of, tokens):
    """A hybrid's parts go in as they act: scaling first, whatever the order in which they are listed."""
    ids, bank = tokens(2), make_bank({"a": OTHERS[name]}, model=make_dense())
    want = logits_of(bank, ["a", "a"], ids)
    merge(bank, "a")
    torch.testing.assert_close(plain_logits(bank, ids), want, **CLOSE)


@pytest.mark.parametrize("config", [BottleneckConfig(width=4), PromptConfig(3)])
def test_what_is_no_change_of_a_weight_is_refused(config, make_dense, make_bank):
    bank = make_bank({"a": HybridConfig([LORA, config])}, model=make_dense())
    before = {key: t.clone() for key, t in bank.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{config.method} is no change of a weight"):
        merge(bank, "a")
    assert all(torch.equal(t, before[key]) for key, t in bank.model.state_dict().items())


def test_a_bias_without_a_place_is_refused(make_llama, make_bank):
    """The plain model's config has no biases: they would be lost when it is saved."""
    with pytest.raises(ValueError, match="has no bias in this architecture"):
        merge(make_bank({"a": BitFitConfig()}, model=make_llama()), "a")


def test_layers_inside_a_wrapped_feedforward_come_back_to_their_place(
    make_dense, make_bank, logits_of, tokens
):
    ids = tokens(2)
    want = make_dense()(ids).logits.detach()
    bank = make_bank({"around": BottleneckConfig(width=4), "inside": LORA}, model=make_dense())
    for name in ("around", "inside"):
        bank.remove(name)
    assert torch.equal(plain_logits(bank, ids), want)
    assert bank.model.state_dict().keys() == make_dense().state_dict().keys()


def test_embedding_and_head_are_merged_unless_they_share_their_weight(
    make_llama, make_bank, logits_of, tokens
):
    config = HybridConfig([LoraConfig(rank=2, target_modules=["embed_tokens"]), FullConfig(["lm_head"])])
    bank, ids = make_bank({"a": config}), tokens(2)
    want = logits_of(bank, ["a"] * 2, ids)
    merge(bank, "a")
    torch.testing.assert_close(plain_logits(bank, ids), want, **CLOSE)
    bank = make_bank({"a": config}, model=make_llama(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"model\.embed_tokens shares its weight with lm_head.* untie"):
        merge(bank, "a")
