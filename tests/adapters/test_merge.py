"""A merged base computes what the adapted model computed: on dense, 4-bit and 8-bit weights, also from disk.

Tolerances: on a quantised base IA3 changes scales alone, so outputs agree to fp32 rounding; int8 also rounds
activations, and an output at the edge of a step may fall on its other side (``STEP``). On bf16 the weights are
rounded anew, as PEFT's merge does; there the error is held against PEFT's.
"""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

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
from mmpeft.adapters.weight_updates import add_lora, scale_rows
from tests.adapters.toy_method import ToyConfig

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
STEP = {"rtol": 0, "atol": 0.02}
LORA = LoraConfig(rank=4, alpha=6, target_modules="all-linear")
IA3 = IA3Config()
IA3_OUTPUTS = IA3Config(["k_proj", "up_proj", "down_proj"], [])
IA3_BOTH_SIDES = IA3Config(["v_proj", "up_proj", "down_proj"])
QUANTISED = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {},
}


def random_biases(model):
    """Fresh models have zero biases, which any scaling leaves alone."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def no_packing(model):
    """bitsandbytes' packed inference kernel computes in bf16 and changes the weights."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@pytest.fixture(scope="module")
def make_dense(make_llama):
    """Grouped-query Llama with random biases everywhere."""
    return lambda: random_biases(make_llama(attention_bias=True, mlp_bias=True)).requires_grad_(False)


@pytest.fixture(scope="module")
def make_quantised(make_dense, tmp_path_factory):
    """The same, from disk, as one of `QUANTISED`."""
    path = tmp_path_factory.mktemp("base")
    make_dense().save_pretrained(path)

    def make(kind, dtype=torch.float32):
        options = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **QUANTISED[kind]}
        config = BitsAndBytesConfig(
            **options, **({} if kind == "int8" else {"bnb_4bit_compute_dtype": dtype})
        )
        return no_packing(AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config))

    return make


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


def negate_some(bank, name):
    """Turns the sign of every third value of an IA3 finetune, and one in each vector to zero."""
    for _, stack, slot in bank.places(name):
        l = stack.tensors(slot)["ia3_l"].clone()
        l.view(-1)[::3] *= -1
        l.view(-1)[1] = 0
        stack.fill(slot, {"ia3_l": l})


def dense_weight(linear):
    """(O, I) fp32, by bitsandbytes' own functions."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return F.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    scales = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB
    return F.int8_vectorwise_dequant(linear.weight.data, scales)


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


@pytest.mark.parametrize("negative", [False, True], ids=["as-trained", "negative"])
@pytest.mark.parametrize("config", [IA3, IA3_OUTPUTS, IA3_BOTH_SIDES], ids=["ia3", "outputs", "both"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_takes_ia3_and_stays_quantised(
    make_quantised, make_bank, logits_of, tokens, kind, config, negative
):
    ids = tokens(3)
    bank = make_bank({"a": config}, model=make_quantised(kind))
    if negative:
        negate_some(bank, "a")
    base, want = logits_of(bank, [None] * 3, ids), logits_of(bank, ["a"] * 3, ids)
    merge(bank, "a")
    got = plain_logits(bank, ids)
    torch.testing.assert_close(got, want, **(STEP if kind == "int8" else CLOSE))
    assert (want - base).abs().max() > 0.5
    linears = [m for m in bank.model.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert len(linears) == 14


@pytest.mark.parametrize("kind", QUANTISED)
def test_in_bf16_the_merged_output_is_as_near_as_rounding_lets_it(
    make_quantised, make_bank, logits_of, tokens, kind
):
    ids = tokens(3)
    bank = make_bank({"a": IA3}, model=make_quantised(kind, torch.bfloat16))
    base, want = logits_of(bank, [None] * 3, ids), logits_of(bank, ["a"] * 3, ids)
    merge(bank, "a")
    error = (plain_logits(bank, ids) - want).abs().mean()
    assert error < 0.02 * want.abs().mean()
    assert error < 0.1 * (want - base).abs().mean()


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_rows_are_scaled_to_fp32_rounding(make_quantised, kind, used):
    """The slow formula on the dequantised weight, for values of either sign, zero, tiny and huge."""
    model = make_quantised(kind)
    if used:  # bitsandbytes moves the scales of int8 at the first forward
        model(torch.zeros(1, 2, dtype=torch.int64))
    linear = model.model.layers[0].mlp.up_proj
    weight, bias, codes = dense_weight(linear).double(), linear.bias.double(), linear.weight.data.clone()
    scale = torch.randn(len(weight), generator=torch.Generator().manual_seed(0))
    scale[:3] = torch.tensor([0.0, 1e-6, 1e6])
    scale_rows(linear, scale)
    torch.testing.assert_close(
        dense_weight(linear).double(), weight * scale.double()[:, None], rtol=3e-7, atol=0
    )
    torch.testing.assert_close(linear.bias.double(), bias * scale.double(), rtol=1e-7, atol=0)
    assert torch.equal(
        linear.weight.data.abs() if kind == "int8" else linear.weight.data,
        codes.abs() if kind == "int8" else codes,
    )


def test_the_double_quantised_scales_are_read_as_bitsandbytes_reads_them(make_quantised):
    linear = make_quantised("nf4-double").model.layers[0].mlp.up_proj
    state = copy.copy(linear.weight.quant_state)
    want = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    scale_rows(linear, torch.ones(linear.out_features))
    assert torch.equal(linear.weight.quant_state.absmax, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_merged_quantised_model_comes_back_bit_for_bit(
    make_quantised, make_bank, tokens, tmp_path, kind, dtype
):
    """Some linears then have nested scales and some plain ones, while the config speaks for all."""
    ids = tokens(2)
    bank = make_bank({"a": IA3}, model=make_quantised(kind, dtype))
    negate_some(bank, "a")
    merge(bank, "a")
    want = plain_logits(bank, ids)
    bank.model.save_pretrained(tmp_path)
    again = no_packing(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)


def test_bitsandbytes_packed_kernel_takes_negative_scales(make_quantised, make_bank, tokens, tmp_path):
    """What plain transformers does with the merged model where the processor has AVX512-BF16."""
    ids = tokens(2)
    bank = make_bank({"a": IA3}, model=make_quantised("nf4-double"))
    negate_some(bank, "a")
    merge(bank, "a")
    want = plain_logits(bank, ids)
    bank.model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (plain(ids).logits - want).abs().mean() < 0.03 * want.abs().mean()


def test_the_other_finetunes_stay(make_dense, make_bank, logits_of, tokens):
    ids = tokens(1)
    bank = make_bank(model=make_dense())
    kept = {name: bank.tensors(name) for name in bank.names if name != "small"}
    merge(bank, "small")
    assert bank.names == list(kept)
    for name, tensors in kept.items():
        assert all(torch.equal(bank.tensors(name)[key], tensor) for key, tensor in tensors.items())
    assert (logits_of(bank, ["large"], ids) - logits_of(bank, [None], ids)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_lora_merges_after_dequantising(make_quantised, make_bank, logits_of, tokens, kind):
    ids = tokens(2)
    bank = make_bank({"a": LORA}, model=make_quantised(kind))
    adapted, base = logits_of(bank, ["a"] * 2, ids), logits_of(bank, [None] * 2, ids)
    with pytest.raises(ValueError, match=r"q_proj is quantised: .* make the base dense first"):
        merge(bank, "a")
    assert torch.equal(logits_of(bank, ["a"] * 2, ids), adapted), "a refused merge must change nothing"
    bank = make_bank({"a": LORA}, model=make_quantised(kind).dequantize())
    exact = CLOSE if kind == "nf4-double" else {"rtol": 0, "atol": 0.1}  # int8 also rounded activations
    torch.testing.assert_close(logits_of(bank, [None] * 2, ids), base, **exact)
    want = logits_of(bank, ["a"] * 2, ids)
    torch.testing.assert_close(want, adapted, **exact)
    merge(bank, "a")
    torch.testing.assert_close(plain_logits(bank, ids), want, **CLOSE)


def test_a_dequantised_model_is_saved_as_a_dense_one(make_quantised, tokens, tmp_path):
    model = make_quantised("nf4-double").dequantize()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in again.modules())
    with torch.no_grad():
        assert torch.equal(again(tokens(2)).logits, model(tokens(2)).logits)


class Feedforward(nn.Module):
    """One quantised feed-forward; ``norm`` puts a norm before its last linear, as BitNet does."""

    def __init__(self, features=64, norm=False, gated=True, inner=64):
        super().__init__()
        sizes = {"up_proj": (features, inner), "down_proj": (inner, features)}
        sizes |= {"gate_proj": (features, inner)} if gated else {}
        for name, size in sizes.items():
            setattr(self, name, bnb.nn.Linear4bit(*size, bias=False, quant_type="nf4").to("cpu"))
        self.norm = nn.RMSNorm(inner) if norm else None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": True}, "IA3 scales its input: that is exact only by way of up_proj in a gated"),
        ({"gated": False}, r"has down_proj, up_proj; make the base dense first"),
        ({"features": 96}, r"mlp.up_proj has 96 input features, no multiple of its 4-bit blocks of 64"),
    ],
)
def test_what_would_not_be_exact_is_refused(make_bank, options, message):
    model = nn.ModuleDict({"mlp": Feedforward(**options)})
    bank = make_bank({"a": IA3Config(["down_proj"], ["down_proj"])}, model=model)
    with pytest.raises(ValueError, match=message):
        merge(bank, "a")
    assert bank.names == ["a"]


def test_a_repacked_weight_is_refused(make_quantised, make_bank):
    bank = make_bank({"a": IA3}, model=make_quantised("nf4"))
    bank.layers["model.layers.1.self_attn.v_proj"].base.weight.quant_state.packing_format_for_cpu = True
    before = bank.layers["model.layers.0.self_attn.k_proj"].base.weight.quant_state.absmax
    with pytest.raises(ValueError, match=r"bitsandbytes has repacked model.layers.1.self_attn.v_proj"):
        merge(bank, "a")
    assert bank.layers["model.layers.0.self_attn.k_proj"].base.weight.quant_state.absmax is before


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
    with pytest.raises(KeyError, match="no adapter 'other'"):
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


def test_a_base_whose_layers_were_replaced_is_refused(make_quantised, make_bank):
    """transformers makes new linears of quantised ones: the adapted forwards are on the old."""
    bank = make_bank({"a": LORA}, model=make_quantised("nf4"))
    bank.model.dequantize()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj was replaced after adapters"):
        merge(bank, "a")
