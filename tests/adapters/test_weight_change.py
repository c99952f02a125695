"""The reported change of a weight is that of the weight which a merge writes."""

import pytest
import torch
from torch import nn

from mmpeft.adapters import (
    AdapterBank,
    BitFitConfig,
    BottleneckConfig,
    DoraConfig,
    FullConfig,
    HybridConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from mmpeft.adapters.base_weights import dense_weight, read_weight
from mmpeft.adapters.merge import merge
from mmpeft.adapters.weight_change import weight_changes
from mmpeft.models.language import LanguageConfig, load_language_model
from tests.adapters.test_architecture_roles import build
from tests.adapters.toy_method import ToyConfig

bnb = pytest.importorskip("bitsandbytes")

EVERYWHERE = "all-linear"
CHANGING = {
    "lora": LoraConfig(rank=4, alpha=6, target_modules=EVERYWHERE),
    "rslora": LoraConfig(rank=4, alpha=-6, rslora=True),
    "dora": DoraConfig(rank=4, alpha=6, target_modules=EVERYWHERE),
    "ia3": IA3Config(),
    "ia3 on inputs": IA3Config(["o_proj", "down_proj"], ["o_proj", "down_proj"]),
    "full": FullConfig(),
    "toy": ToyConfig(["q_proj", "o_proj"]),
    "together": HybridConfig(
        [
            FullConfig(["v_proj"]),
            LoraConfig(rank=3, target_modules=EVERYWHERE),
            DoraConfig(rank=2),
            IA3Config(),
        ]
    ),
    "apart": HybridConfig([IA3Config(layers=[0]), LoraConfig(rank=3, layers=[1]), BitFitConfig(["o_proj"])]),
}


def weights_of(model, paths) -> dict[str, torch.Tensor]:
    """Copies of dense weights in fp64."""
    return {path: dense_weight(model.get_submodule(path)).double().clone() for path in paths}


def changes_by_merging(bank, name) -> dict[str, float]:
    """From the weights before and after folding the finetune into the dense base."""
    paths = [path for path in bank.entry(name).sites if path != "adapter_inputs"]
    before = weights_of(bank.model, paths)
    merge(bank, name)
    after = weights_of(bank.model, paths)
    return {path: float((after[path] - old).norm() / old.norm()) for path, old in before.items()}


def close(found: dict[str, float], wanted: dict[str, float], rel: float = 1e-5) -> None:
    assert found == pytest.approx(wanted, rel=rel)
    assert min(found.values()) > 1e-3, "nothing changed"


@pytest.mark.parametrize("config", CHANGING.values(), ids=CHANGING)
def test_the_change_is_that_of_a_merge(make_llama, make_bank, config):
    bank = make_bank({"other": LoraConfig(rank=2), "a": config}, model=make_llama(attention_bias=True))
    bank.remove("other")  # the finetune sits in the second slot of a stack that it shares
    found = weight_changes(bank, "a")
    wanted = changes_by_merging(bank, "a")
    assert set(wanted) - set(found) == {path for path in wanted if wanted[path] == 0}, "biases alone"
    close(found, {path: wanted[path] for path in found})


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize(
    "config", [LoraConfig(2, target_modules=EVERYWHERE), IA3Config()], ids=["lora", "ia3"]
)
def test_fused_projections_and_transposed_linears(family, randomise, config):
    bank = AdapterBank(build(family))
    bank.add("a", config)
    randomise(bank, "a")
    close(weight_changes(bank, "a"), changes_by_merging(bank, "a"))


@pytest.fixture(scope="module")
def folder(make_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(path)
    return path


@pytest.fixture(params=["nf4", "int8"])
def quantised(request, folder):
    return load_language_model(LanguageConfig(str(folder), "float32", quantization=request.param))


def linears(model) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"}


def test_a_quantised_weight_is_read_as_its_linear_computes_with_it(quantised, tokens):
    read = [{path: read_weight(path, linear) for path, linear in linears(quantised).items()}]
    quantised(tokens(1))  # moves the scales of 8 bits to another place
    read.append({path: read_weight(path, linear) for path, linear in linears(quantised).items()})
    for path, dense in linears(quantised.dequantize()).items():
        for found in read:
            torch.testing.assert_close(found[path], dense.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "storage"),
    [((3, 170), torch.uint8), ((64, 64), torch.bfloat16), ((16, 64), torch.float32)],
    ids=["a block across rows and one cut short", "bf16", "fp32"],
)
def test_four_bits_of_any_shape_and_storage(shape, storage):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    for kind, double in (("nf4", True), ("fp4", False)):
        options = {"quant_type": kind, "compress_statistics": double, "quant_storage": storage}
        linear = nn.Linear(1, 1)
        linear._parameters["weight"] = bnb.nn.Params4bit(weight, requires_grad=False, **options).to("cpu")
        packed, state = linear.weight.data, linear.weight.quant_state
        wanted = bnb.functional.dequantize_4bit(packed, state)
        torch.testing.assert_close(read_weight("w", linear), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "config", [CHANGING["lora"], CHANGING["dora"], IA3Config()], ids=["lora", "dora", "ia3"]
)
def test_a_quantised_base_is_measured_as_its_dense_copy(quantised, make_bank, config):
    bank = make_bank({"a": config}, model=quantised)
    found, before = weight_changes(bank, "a"), list(bank.places("a"))
    bank = make_bank({"a": config}, model=quantised.dequantize())
    for (_, stack, slot), (_, old, _) in zip(bank.places("a"), before, strict=True):
        stack.fill(slot, old.tensors(slot))
        if isinstance(config, DoraConfig):  # it goes on measuring norms by the quantised base, which rounds
            stack._base, stack._forward, stack._squares = old._base, old._forward, old._squares
    close(found, weight_changes(bank, "a"), rel=1e-4)
    close(found, changes_by_merging(bank, "a"), rel=1e-4)


def test_a_repacked_weight_is_refused(folder, make_bank):
    bank = make_bank(
        {"a": IA3Config()},
        model=load_language_model(LanguageConfig(str(folder), "float32", quantization="nf4")),
    )
    bank.model.get_submodule("model.layers.1.mlp.down_proj").weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError, match=r"repacked model\.layers\.1\.mlp\.down_proj .* load the model afresh"
    ):
        weight_changes(bank, "a")


@pytest.mark.parametrize("config", CHANGING.values(), ids=CHANGING)
def test_an_untrained_finetune_moves_nothing(make_llama, make_bank, config):
    bank = make_bank({"a": config}, model=make_llama(attention_bias=True), fill=False)
    assert max(weight_changes(bank, "a").values()) < 1e-6


def test_an_orthogonal_start_moves_nothing_although_both_factors_are_full(make_bank):
    bank = make_bank({"a": LoraConfig(rank=4, start="orthogonal")}, fill=False)
    assert max(weight_changes(bank, "a").values()) < 1e-6


def test_small_changes_keep_their_digits(make_bank):
    """A change below fp32's rounding of the weight: taken as a difference of weights it would be zero or noise."""
    bank = make_bank({"a": HybridConfig([LoraConfig(rank=2), FullConfig(["q_proj"])])})
    whole = weight_changes(bank, "a")
    for _, stack, slot in bank.places("a"):
        tensors = stack.tensors(slot)
        key = "lora_B.weight" if "lora_B.weight" in tensors else "weight_delta"
        stack.fill(slot, tensors | {key: 1e-9 * tensors[key]})
    assert weight_changes(bank, "a") == pytest.approx({path: 1e-9 * x for path, x in whole.items()}, rel=1e-4)


def test_what_changes_no_weight_has_no_place_here(make_bank):
    parts = [PromptConfig(), PrefixConfig(), BottleneckConfig(width=2), BitFitConfig(), LoraConfig(rank=2)]
    bank = make_bank({"a": HybridConfig(parts), "b": LoraConfig(rank=2)})
    assert len(weight_changes(bank, "a")) == 4  # q and v of two layers
    with pytest.raises(KeyError, match="no finetune 'c'"):
        weight_changes(bank, "c")


def test_a_diverged_finetune_is_not_a_number(make_bank, poison):
    bank = make_bank({"a": LoraConfig(rank=2)})
    poison(bank, "a")
    assert all(change != change for change in weight_changes(bank, "a").values())


def test_the_model_stays_as_it_was(make_bank):
    bank = make_bank({"a": CHANGING["together"]})
    before = {name: tensor.clone() for name, tensor in bank.model.state_dict().items()}
    weight_changes(bank, "a")
    after = bank.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
