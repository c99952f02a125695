"""Training finetunes together is training each of them alone."""

import pytest
import torch

from tests.conftest import MIXED, one_slot_each

FINETUNES = MIXED
NAMES = [*FINETUNES, None, *FINETUNES]
"""Two rows of each finetune, apart, and a base row."""
STEPS = 6


@pytest.fixture
def batches(tokens):
    return [tokens(len(NAMES), seed=step) for step in range(STEPS)]


@pytest.fixture
def together(make_bank, train, batches):
    """All four trained in one batch with one optimiser; keywords go to AdamW."""

    def run(**adamw):
        bank = make_bank(FINETUNES, fill=False)
        train(bank, NAMES, batches, **adamw)
        return bank

    return run


@pytest.mark.parametrize("name", FINETUNES)
def test_joint_training_equals_separate_training_bitwise(make_bank, train, batches, together, name):
    """At equal shapes: the other rows run as base rows and the rank is padded alike, so every product and
    every AdamW step has the operands of the joint run; nothing is left that could differ."""
    joint = together()
    alone = make_bank({name: FINETUNES[name]}, fill=False, reserve=one_slot_each(joint))
    train(alone, [each if each == name else None for each in NAMES], batches)
    start = make_bank({name: FINETUNES[name]}, fill=False).tensors(name)
    want = alone.tensors(name)
    for key, got in joint.tensors(name).items():
        assert not torch.equal(got, start[key]), f"{key} did not train"
        assert torch.equal(got, want[key]), f"{key} differs by {(got - want[key]).abs().max()}"


@pytest.mark.parametrize("name", FINETUNES)
def test_joint_training_equals_training_in_batches_of_its_own(make_bank, train, batches, together, name):
    """With nothing shared (its own rows, rank and bank of one slot) only the products' rounding differs.

    AdamW divides a gradient by its own size, which turns the rounding of one near the default eps of 1e-8
    into a good part of a step (1e-5 was seen); hence a larger eps in both runs.
    """
    adamw = {"lr": 3e-3, "eps": 1e-5, "weight_decay": 0.1}
    joint = together(**adamw)
    rows = [row for row, each in enumerate(NAMES) if each == name]
    alone = make_bank({name: FINETUNES[name]}, fill=False)
    train(alone, [name] * len(rows), [ids[rows] for ids in batches], **adamw)
    want = alone.tensors(name)
    for key, got in joint.tensors(name).items():
        torch.testing.assert_close(
            got, want[key], rtol=0, atol=5e-6, msg=lambda text, key=key: f"{key} {text}"
        )


def test_training_leaves_the_base_and_idle_finetunes_untouched(make_bank, train, tokens):
    """Idle slots have zero gradients; without weight decay not a bit of them moves."""
    bank = make_bank()
    frozen = {key: t.clone() for key, t in bank.model.state_dict().items() if ".stacks." not in key}
    assert len(frozen) == 14 + 7, "seven linears a layer, norms, embedding and head"
    idle = {name: {k: t.clone() for k, t in bank.tensors(name).items()} for name in ("large", "outputs")}
    train(bank, ["small", "tfew", None], [tokens(3, seed=step) for step in range(3)], weight_decay=0)
    state = bank.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in frozen.items())
    assert not any(p.requires_grad for key, p in bank.model.named_parameters() if key in frozen)
    for name, tensors in idle.items():
        assert all(torch.equal(t, tensors[key]) for key, t in bank.tensors(name).items()), name
