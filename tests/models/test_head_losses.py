"""Losses without all logits at once: those of plain cross-entropy, gradients included, and never as many numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.adapters import FullConfig, LoraConfig
from mmpeft.data.batch import collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IGNORE_INDEX, Encoded
from mmpeft.models import head_losses
from tests.inference.test_self_check import wrapped

EXACT = {"atol": 1e-6, "rtol": 1e-6}
PROMPTS = [[20, 31, 42, 53, 64, 75, 86], [20, 31, 42, 97, 98]]
LABELLED = 3
"""Tokens of each."""
AT_ONCE = 4
"""Tokens whose logits are held at once; 18 have labels."""
NAMES = ["own", None, "other"]
BEHIND_THE_HEAD = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
}
"""What each does after its head."""
FINETUNES = {
    "of the blocks": (LoraConfig(rank=2), LoraConfig(rank=3)),
    "of the head": (LoraConfig(rank=2, target_modules=["lm_head", "q_proj"]), FullConfig(["lm_head"])),
    "of the head, dropping": (
        LoraConfig(rank=1, target_modules=["lm_head"], dropout=0.5),
        LoraConfig(rank=1, target_modules=["lm_head", "v_proj"], dropout=0.3),
    ),
}


def batch():
    rows = [
        Encoded(ids, [IGNORE_INDEX] * (len(ids) - LABELLED) + [*ids[1:], 7][-LABELLED:]) for ids in PROMPTS
    ]
    made = collate([pack(rows)] * len(NAMES), None, NAMES)
    made.dropout_seeds = {"own": 1, "other": 2}
    return made


def finetuned(family, finetunes, randomise):
    model = wrapped(family, **BEHIND_THE_HEAD[family])
    for name, config in zip(("own", "other"), FINETUNES[finetunes], strict=True):
        model.bank.add(name, config)
        randomise(model.bank, name)
    return model.train()


def scored(model, at_once, monkeypatch):
    """Losses, whether labels are the argmax, and the gradients of losses that weigh differently."""
    monkeypatch.setattr(head_losses, "NUMBERS_AT_ONCE", at_once * model.reader.vocabulary_size)
    losses = model.token_losses(batch())
    weights = torch.linspace(-1, 2, len(losses.nll))
    return losses, torch.autograd.grad((losses.nll * weights).sum(), list(model.bank.parameters()))


@pytest.mark.parametrize("finetunes", FINETUNES)
@pytest.mark.parametrize("family", BEHIND_THE_HEAD)
def test_losses_and_gradients_are_those_of_all_logits_at_once(family, finetunes, randomise, monkeypatch):
    model = finetuned(family, finetunes, randomise)
    whole, wanted = scored(model, 1000, monkeypatch)
    parts, got = scored(model, AT_ONCE, monkeypatch)
    torch.testing.assert_close(parts.nll, whole.nll, **EXACT)
    assert torch.equal(parts.correct, whole.correct)
    assert all(gradient.abs().max() > 0 for gradient in wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * max(float(g.abs().max()) for g in wanted))
    with torch.no_grad():
        torch.testing.assert_close(model.eval().token_losses(batch()).nll.shape, whole.nll.shape)


class MostLogits(TorchDispatchMode):
    """Of how many tokens the logits, or something as wide, are made in one tensor, gradients among them."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.tokens = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor) and made.shape[-1:] == (self.vocabulary,) and not func.is_view:
                self.tokens = max(self.tokens, made.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("finetunes", ["of the blocks", "of the head, dropping"])
def test_no_more_logits_are_held_than_at_once(finetunes, randomise, monkeypatch):
    model = finetuned("llama", finetunes, randomise)
    found = {}
    for at_once in (1000, AT_ONCE):
        with MostLogits(model.reader.vocabulary_size) as most:
            scored(model, at_once, monkeypatch)
        found[at_once] = most.tokens
    assert found[1000] == len(NAMES) * len(PROMPTS) * LABELLED
    assert 0 < found[AT_ONCE] <= AT_ONCE
