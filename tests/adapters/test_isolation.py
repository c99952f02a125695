"""A row sees its own finetune and nothing of its neighbours'.

"Bitwise" holds at equal shapes of batch and stacks: with other shapes the same products may run in another
order, and then rows agree to ``CLOSE``, a few fp32 roundings of numbers of size one. It holds for banks of
more than one slot a method; a bank of one takes plain products when its slot serves every row.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.adapters import (
    BitFitConfig,
    BottleneckConfig,
    DoraConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
)
from mmpeft.adapters.methods.registry import METHODS
from tests.adapters.toy_method import ToyConfig
from tests.conftest import MIXED, one_slot_each

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
FINETUNES = list(MIXED)
"""The names of the default bank."""
NAMES = [*FINETUNES, None]


def run_with_gradients(bank, names, ids, token_means):
    """Logits, gradient of the input embeddings and of every stack, for the sum of the rows' losses."""
    embeds = bank.model.get_input_embeddings()(ids).detach().requires_grad_()
    bank.zero_grad()
    bank.route(names)
    logits = bank.model(inputs_embeds=embeds).logits
    token_means(logits, ids).sum().backward()
    return logits.detach(), embeds.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [True, False], ids=["base rows", "fresh adapters"])
def test_zero_slot_is_the_base_bitwise(make_llama, make_bank, logits_of, tokens, dtype, fill):
    """A base row among filled adapters, and every adapter before its first step, give its bits."""
    ids = tokens(len(NAMES))
    with torch.no_grad():
        base = make_llama().to(dtype)(ids).logits
    bank = make_bank(model=make_llama().to(dtype), fill=fill)
    assert torch.equal(logits_of(bank, [None] * len(NAMES) if fill else NAMES, ids), base)


def test_every_adapter_changes_its_row(make_bank, logits_of, tokens):
    """The randomised adapters are far from the base; the tests of equality around here are not vacuous."""
    bank, ids = make_bank(), tokens(len(NAMES))
    change = (logits_of(bank, NAMES, ids) - logits_of(bank, [None] * len(NAMES), ids)).abs().amax((1, 2))
    assert change[:-1].min() > 1e-2
    assert change[-1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_diverged_finetune_stays_in_its_row(
    make_llama, make_bank, poison, tokens, token_means, gradients_of, dtype
):
    """Forward and backward: rows without it are bitwise what they were, and finite."""
    ids = tokens(len(NAMES))
    for sick in FINETUNES:
        others = [row for row, name in enumerate(NAMES) if name != sick]
        healthy = make_bank(model=make_llama().to(dtype))
        want_logits, want_grad = run_with_gradients(healthy, NAMES, ids, token_means)
        bank = make_bank(model=make_llama().to(dtype))
        poison(bank, sick)
        logits, grad = run_with_gradients(bank, NAMES, ids, token_means)
        assert not logits[NAMES.index(sick)].isfinite().any(), "the test must really poison the row"
        assert torch.equal(logits[others], want_logits[others])
        assert grad[others].isfinite().all()
        assert torch.equal(grad[others], want_grad[others])
        for name in set(FINETUNES) - {sick}:
            want = gradients_of(healthy, name)
            for key, got in gradients_of(bank, name).items():
                assert torch.equal(got, want[key]), f"{sick} reached the gradient of {name} {key}"


@st.composite
def routings(draw):
    """Configs of three to five finetunes, the sick one among them, and two routings that agree on one row."""
    lora = st.builds(
        LoraConfig,
        rank=st.integers(1, 9),
        alpha=st.sampled_from([1.0, 3.0, 16.0]),
        target_modules=st.sampled_from(["auto", "all-linear", ["gate_proj", "o_proj"]]),
        rslora=st.booleans(),
    )
    targets = st.sampled_from(["auto", ["k_proj"], ["o_proj", "up_proj"], ["q_proj", "down_proj"]])
    others = (
        st.builds(IA3Config, target_modules=targets)
        | st.builds(DoraConfig, rank=st.integers(1, 5), target_modules=targets)
        | st.builds(BitFitConfig, target_modules=targets)
        | st.builds(FullConfig, target_modules=targets)
        | st.builds(ToyConfig, target_modules=targets)
        | st.builds(BottleneckConfig, width=st.integers(1, 7), reads=st.sampled_from(["input", "output"]))
    )
    configs = draw(st.lists(lora | others, min_size=3, max_size=5))
    adapters = {f"finetune-{i}": config for i, config in enumerate(configs)}
    rows = draw(st.integers(2, 5))
    row = draw(st.integers(0, rows - 1))
    one, other = (
        draw(st.lists(st.sampled_from([None, *adapters]), min_size=rows, max_size=rows)) for _ in range(2)
    )
    healthy = [None, *list(adapters)[1:]]
    one[row] = other[row] = draw(st.sampled_from(healthy))
    return adapters, row, one, other


@given(case=routings())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_a_row_is_unchanged_bitwise_by_the_slots_of_other_rows(make_bank, poison, logits_of, tokens, case):
    """Whatever the methods, ranks, targets and neighbours, one of which may be all NaN."""
    adapters, row, one, other = case
    bank = make_bank(adapters, reserve=dict.fromkeys([config.method for config in METHODS], (2, 0)))
    poison(bank, "finetune-0")
    ids = tokens(len(one))
    assert torch.equal(logits_of(bank, one, ids)[row], logits_of(bank, other, ids)[row])


def test_the_only_slot_of_a_bank_serves_a_full_batch_as_it_serves_a_mixed_one(make_bank, logits_of, tokens):
    """The short cut of a bank of one slot: other kernels, so equal to ``CLOSE`` and not bitwise."""
    for config in (LoraConfig(rank=1), *MIXED.values()):
        bank, ids = make_bank({"only": config}), tokens(3)
        full, part = (logits_of(bank, names, ids) for names in (["only"] * 3, ["only", None, "only"]))
        torch.testing.assert_close(full[[0, 2]], part[[0, 2]], **CLOSE)


def test_content_of_other_rows_does_not_matter_either(make_bank, logits_of, tokens):
    bank, ids = make_bank(), tokens(len(NAMES))
    changed = torch.cat([ids[:1], tokens(len(FINETUNES), seed=1)])
    assert torch.equal(logits_of(bank, NAMES, ids)[0], logits_of(bank, NAMES, changed)[0])


def test_one_mixed_batch_equals_a_run_per_finetune(make_bank, logits_of, tokens):
    """LoRA, IA3 and base rows of one bank together, against each alone in a batch of one (other shapes)."""
    bank, ids = make_bank(), tokens(len(NAMES))
    mixed = logits_of(bank, NAMES, ids)
    for row, name in enumerate(NAMES):
        alone = logits_of(bank, [name], ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, **CLOSE)


@pytest.mark.parametrize("separate_batches", [False, True], ids=["equal shape", "separate batches"])
def test_a_stack_of_many_equals_stacks_of_one(make_bank, tokens, token_means, gradients_of, separate_batches):
    """Logits and gradients of a bank of four against four banks of one.

    At equal shapes (the other rows run as base rows, the rank is padded alike) they are bitwise equal; in
    batches of their own and at their own rank they agree to ``CLOSE``.
    """
    names = [name for name in FINETUNES for _ in range(2)]
    ids = tokens(len(names))
    together = make_bank()
    logits, grad = run_with_gradients(together, names, ids, token_means)
    for name in FINETUNES:
        reserve = None if separate_batches else one_slot_each(together)
        alone = make_bank({name: together.entry(name).config}, reserve=reserve)
        own = [row for row, each in enumerate(names) if each == name]
        if separate_batches:
            want, want_grad = run_with_gradients(alone, [name] * len(own), ids[own], token_means)
        else:
            routing = [each if each == name else None for each in names]
            want, want_grad = (t[own] for t in run_with_gradients(alone, routing, ids, token_means))
        pairs = {"logits": (logits[own], want), "inputs": (grad[own], want_grad)}
        want_gradients = gradients_of(alone, name)
        for key, got in gradients_of(together, name).items():
            alone_grad = want_gradients[key]
            assert alone_grad.abs().max() > 0, f"{name} {key} has no gradient"
            pairs[key] = (got[tuple(slice(n) for n in alone_grad.shape)], alone_grad)
        for key, (got, want) in pairs.items():
            if separate_batches:
                torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
            else:
                assert torch.equal(got, want), f"{name} {key}: {(got - want).abs().max()}"
