"""Decoding's routing: a stack is shown its own rows alone and keeps what it makes of them; no number changes."""

import pytest
import torch

from mmpeft.adapters import ALoraConfig, DoraConfig, LoraConfig
from mmpeft.adapters.methods.dora import DoraStack
from mmpeft.adapters.methods.lora import LoraStack
from mmpeft.adapters.routing import Gathered
from tests.conftest import MIXED, VOCABULARY

NAMES = [*MIXED, None, "small"]


def ids_of(rows):
    """(rows, 1): of as many rows as there may be, the first."""
    return torch.randint(VOCABULARY, (20, 1), generator=torch.Generator().manual_seed(0))[:rows]


@torch.no_grad()
def logits(bank, names, times=1, narrow=True):
    """(rows, vocabulary) as a decoder has them, of the last of several forwards."""
    bank.route(names)
    if narrow:
        bank.routing.narrow()
        bank.routing.gathered = Gathered()
    return [bank.model(ids_of(len(names))).logits[:, -1] for _ in range(times)][-1]


def test_every_row_is_what_it_is_where_all_are_shown(make_bank):
    bank = make_bank()
    wanted = logits(bank, NAMES, narrow=False)
    for times in (1, 3):
        torch.testing.assert_close(logits(bank, NAMES, times), wanted, rtol=1e-4, atol=1e-5)
    assert len(bank.routing.few) >= 5
    assert wanted.unique(dim=0).shape == wanted.shape


def test_a_stack_is_shown_its_own_rows_and_one_that_has_none_is_not_called(make_bank, monkeypatch):
    shown, plain = [], LoraStack.on_output

    def record(stack, x, *others):
        shown.append(len(x))
        return plain(stack, x, *others)

    bank = make_bank()
    monkeypatch.setattr(LoraStack, "on_output", record)
    logits(bank, ["tfew", "small", None, "bias", "after"])
    assert {*shown} == {1}
    shown.clear()
    logits(bank, ["tfew", None, "bias"])
    assert not shown
    logits(bank, ["small", "small", None])
    assert {*shown} == {3}, "most rows: all are shown"


def test_the_base_beside_finetunes_that_nobody_asks_is_the_base_to_the_bit(make_bank, make_llama):
    found = logits(make_bank(), [None, None])
    with torch.no_grad():
        assert torch.equal(found, make_llama()(ids_of(2)).logits[:, -1])


def test_what_is_kept_follows_the_tensors(make_bank):
    bank = make_bank()
    bank.route(NAMES)
    bank.routing.narrow()
    bank.routing.gathered = Gathered()
    with torch.no_grad():
        before = bank.model(ids_of(len(NAMES))).logits[:, -1]
        for name in MIXED:
            for _, stack, slot in bank.places(name):
                for parameter in stack.parameters():
                    parameter[slot] *= 1.5
        after = bank.model(ids_of(len(NAMES))).logits[:, -1]
    changed = (after - before).abs().amax(-1) > 1e-4
    assert changed.tolist() == [name is not None for name in NAMES]
    torch.testing.assert_close(after, logits(bank, NAMES, narrow=False), rtol=1e-4, atol=1e-5)


def test_activated_adapters_see_all_rows(make_bank):
    bank = make_bank({"later": ALoraConfig(rank=2, invocation_tokens=[3]), "lora": LoraConfig(rank=2)})
    bank.route(["later", None, None, None], ids_of(4))
    bank.routing.narrow()
    assert bank.routing.invoked is not None
    assert not bank.routing.few


@pytest.mark.parametrize("rows", [2, 9])
def test_what_dora_costs_goes_by_rows_not_by_finetunes(make_bank, monkeypatch, rows):
    finetunes = {f"dora{n}": DoraConfig(rank=2, target_modules=["q_proj"]) for n in range(6)}
    bank, names = make_bank(finetunes), [f"dora{n % 6}" for n in range(rows)]
    multiplied, plain = [], DoraStack._weight_times

    def record(stack, own):
        multiplied.append(len(own))
        return plain(stack, own)

    monkeypatch.setattr(DoraStack, "_weight_times", record)
    found = logits(bank, names, narrow=False)
    assert {*multiplied} == {2 * min(rows, 6)}
    every = logits(bank, [*names, *["dora5"] * 6], narrow=False)[:rows]
    torch.testing.assert_close(found, every, rtol=1e-4, atol=1e-5)
