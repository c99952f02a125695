"""A merged quantised base computes what the adapted model computed: on 4-bit and 8-bit weights, also from disk.

Tolerances: IA3 changes scales alone, so outputs agree to fp32 rounding; int8 also rounds activations, and an output
at the edge of a step may fall on its other side (``STEP``).
"""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mmpeft.adapters import IA3Config
from mmpeft.adapters.merge import merge
from mmpeft.adapters.weight_updates import scale_rows
from tests.adapters.test_merge import CLOSE, IA3, IA3_BOTH_SIDES, IA3_OUTPUTS, LORA, plain_logits

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional

STEP = {"rtol": 0, "atol": 0.02}
QUANTISED = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {},
}


def no_packing(model):
    """bitsandbytes' packed inference kernel computes in bf16 and changes the weights."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


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


def test_a_base_whose_layers_were_replaced_is_refused(make_quantised, make_bank):
    """transformers makes new linears of quantised ones: the adapted forwards are on the old."""
    bank = make_bank({"a": LORA}, model=make_quantised("nf4"))
    bank.model.dequantize()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj was replaced after adapters"):
        merge(bank, "a")
