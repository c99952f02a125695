"""What is LoRA's own: scaling, start, padding, dropout."""

import pytest
import torch

from mmpeft.adapters import DoraConfig, LoraConfig
from mmpeft.adapters.methods.lora import LoraStack
from tests.conftest import slot_of, stack_at


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rank": rank} for rank in (0, -1, 2.0, "8")),
        *({"alpha": alpha} for alpha in (None, float("nan"), float("inf"), "16")),
        *({"dropout": dropout} for dropout in (-0.1, 1.0, None)),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    (field,) = wrong
    with pytest.raises(ValueError, match=rf"LoraConfig\.{field} is {wrong[field]!r}"):
        LoraConfig(**wrong)


def test_scaling_is_alpha_over_rank_or_its_root():
    assert LoraConfig(rank=16, alpha=24).scaling == 1.5
    assert LoraConfig(rank=16, alpha=24, rslora=True).scaling == 6


def test_a_fresh_slot_starts_as_the_base_and_can_learn():
    """A Kaiming-uniform over its input, B zero; all-zero A and B would be dead: no gradient, for ever."""
    stack = LoraStack(64, 32, num_slots=2, rank=8)
    stack.open(1, LoraConfig(rank=4, alpha=4), torch.Generator().manual_seed(0))
    A = stack.tensors(1)["lora_A.weight"]
    assert A.shape == (4, 64)
    assert 0.9 / 8 < A.abs().max() <= 1 / 8, "uniform on +-1/sqrt(in)"
    assert not stack.lora_B.any()
    stack.on_output(
        torch.ones(1, 1, 64), torch.zeros(1, 1, 32), torch.tensor([1]), uniform=False
    ).sum().backward()
    assert stack.lora_B.grad[1, :, :4].abs().min() > 0


def test_a_slot_reopened_after_removal_is_initialised_again_and_not_dead(make_bank, train, logits_of, tokens):
    """And nothing of its former finetune is left in it."""
    bank = make_bank({"old": LoraConfig(rank=8), "other": LoraConfig(rank=2)})
    bank.remove("old")
    assert bank.add("new", LoraConfig(rank=4)).parts[0].slot == 0
    fresh = make_bank({"new": LoraConfig(rank=4)}, fill=False)
    for key, tensor in bank.tensors("new").items():
        assert torch.equal(tensor, fresh.tensors("new")[key]), key
    train(bank, ["new"], [tokens(1)] * 2)
    assert all(tensor.any() for tensor in bank.tensors("new").values())
    assert not torch.equal(logits_of(bank, ["new"], tokens(1)), logits_of(bank, [None], tokens(1)))


def test_opening_a_filled_slot_leaves_nothing_of_it_behind():
    stack = LoraStack(16, 12, num_slots=1, rank=8)
    generator = torch.Generator().manual_seed(0)
    stack.open(0, LoraConfig(rank=8, dropout=0.5), generator)
    stack.fill(0, {key: torch.ones_like(t) for key, t in stack.tensors(0).items()})
    stack.open(0, LoraConfig(rank=2), generator)
    assert not stack.lora_A[0, 2:].any()
    assert not stack.lora_B.any()
    assert (stack.sizes, stack.has_dropout) == ([2], False)


def test_padding_to_the_largest_rank_is_a_fixed_point_of_training(make_bank, train, tokens):
    """Zero rows of A meet zero columns of B: no gradient, and weight decay keeps zero at zero."""
    configs = {"wide": LoraConfig(rank=8), "narrow": LoraConfig(rank=2)}
    bank = make_bank(configs)
    before = {name: {k: t.clone() for k, t in bank.tensors(name).items()} for name in configs}
    train(bank, list(configs), [tokens(2)] * 3, weight_decay=0.5)
    slot = slot_of(bank, "narrow")
    for path in bank.entry("narrow").sites:
        stack = stack_at(bank, "narrow", path)
        assert not stack.lora_A[slot, 2:].any()
        assert not stack.lora_B[slot, :, 2:].any()
        assert not stack.lora_A.grad[slot, 2:].any()
        assert not stack.lora_B.grad[slot, :, 2:].any()
    for name in configs:
        moved = [not torch.equal(t, before[name][key]) for key, t in bank.tensors(name).items()]
        assert all(moved), f"{name} did not train"


def test_a_slot_on_a_module_it_does_not_target_is_a_fixed_point_too(make_bank, train, tokens):
    bank = make_bank({"qv": LoraConfig(rank=4), "k": LoraConfig(rank=4, target_modules=["k_proj"])})
    train(bank, ["qv", "k"], [tokens(2)] * 3, weight_decay=0.5)
    for path in bank.entry("k").sites:
        stack, slot = stack_at(bank, "k", path), slot_of(bank, "qv")
        assert not stack.lora_A[slot].any()
        assert not stack.lora_B[slot].any()


def test_growing_keeps_what_the_slots_hold():
    stack = LoraStack(16, 12, num_slots=1, rank=2)
    stack.open(0, LoraConfig(rank=2, dropout=0.5), torch.Generator().manual_seed(0))
    stack.fill(0, {key: torch.randn_like(t) for key, t in stack.tensors(0).items()})
    before = {key: t.clone() for key, t in stack.tensors(0).items()}
    stack.resize(3, 8)
    assert stack.lora_A.shape == (3, 8, 16)
    assert stack.lora_B.shape == (3, 12, 8)
    assert all(torch.equal(t, before[key]) for key, t in stack.tensors(0).items())
    assert stack.scaling.tolist() == [16, 0, 0]
    assert stack.dropout.tolist() == [0.5, 0, 0]


def test_dropout_acts_in_training_mode_only(make_bank, logits_of, tokens):
    """And in eval mode leaves the very bits of an adapter without dropout."""
    ids = tokens(2)
    names = ["a", None]
    plain = logits_of(make_bank({"a": LoraConfig()}), names, ids)
    bank = make_bank({"a": LoraConfig(dropout=0.5)})
    assert torch.equal(logits_of(bank, names, ids), plain)
    bank.train()
    first, second = logits_of(bank, names, ids), logits_of(bank, names, ids)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], plain[1]), "dropout reached a base row"


def test_dropout_is_the_slot_own_and_keeps_the_mean():
    """Rows of a slot without dropout, in training mode, get the bits of eval mode."""
    stack = LoraStack(64, 8, num_slots=2, rank=4)
    generator = torch.Generator().manual_seed(0)
    for slot, dropout in enumerate((0.0, 0.25)):
        stack.open(slot, LoraConfig(rank=4, dropout=dropout), generator)
        stack.fill(slot, {key: torch.ones_like(t) for key, t in stack.tensors(slot).items()})
    x, slots = torch.ones(2, 4000, 64), torch.tensor([0, 1])
    nothing = torch.zeros(2, 4000, 8)
    trained = stack.on_output(x, nothing, slots, uniform=False)
    evaluated = stack.eval().on_output(x, nothing, slots, uniform=False)
    assert torch.equal(trained[0], evaluated[0])
    assert trained[1].std() > 0
    torch.testing.assert_close(trained[1].mean(), evaluated[1].mean(), rtol=0.01, atol=0)


def test_a_removed_adapter_takes_its_dropout_along(make_bank):
    """Otherwise every later forward would draw random numbers for nothing."""
    bank = make_bank({"a": LoraConfig(dropout=0.5), "b": LoraConfig()})
    stack = stack_at(bank, "a", bank.entry("a").sites[0])
    assert stack.has_dropout
    bank.remove("a")
    assert not stack.has_dropout


def test_an_orthogonal_start_is_the_base_and_lets_both_factors_learn_at_once(
    make_bank, train, logits_of, tokens
):
    ids = tokens(2)
    bank = make_bank({"a": LoraConfig(rank=4, start="orthogonal")}, fill=False)
    torch.testing.assert_close(
        logits_of(bank, ["a"] * 2, ids), logits_of(bank, [None] * 2, ids), rtol=1e-4, atol=1e-5
    )
    before = {key: t.clone() for key, t in bank.tensors("a").items()}
    assert all(t.any() for t in before.values())
    train(bank, ["a"] * 2, [ids])
    assert all(not torch.equal(t, before[key]) for key, t in bank.tensors("a").items())
    with pytest.raises(ValueError, match="an even one"):
        LoraConfig(rank=3, start="orthogonal")


def test_dora_in_bf16_does_not_lose_the_weight_behind_a_large_bias(make_bank):
    """Taking a bias of 100 off a rounded answer of 1 would leave nothing of it."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 8)).bfloat16()
    torch.nn.init.constant_(model[0].bias, 100.0)
    want = model[0].weight.float().norm(dim=1)
    bank = make_bank({"a": DoraConfig(rank=2, target_modules=["0"])}, model=model, fill=False)
    torch.testing.assert_close(bank.tensors("a")["0.lora_magnitude_vector"], want, rtol=1e-3, atol=1e-3)


def test_dora_on_a_row_of_zeros_stays_finite(make_bank):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    torch.nn.init.zeros_(model[0].weight)
    bank = make_bank({"a": DoraConfig(rank=2, target_modules=["0"])}, model=model, fill=False)
    bank.route(["a"])
    assert model(torch.ones(1, 3, 8)).isfinite().all()


def test_dropout_follows_the_mode_of_the_model_alone(make_bank, tokens):
    """A trainer may know the model and nothing of the bank beside it."""
    bank = make_bank({"one": LoraConfig(rank=4, dropout=0.5)})
    bank.route(["one"] * 2)
    ids = tokens(2)
    bank.model.train()
    assert not torch.equal(bank.model(ids).logits, bank.model(ids).logits)
    bank.train()
    bank.model.eval()
    assert torch.equal(bank.model(ids).logits, bank.model(ids).logits)
