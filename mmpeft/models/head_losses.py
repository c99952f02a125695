"""Cross-entropy of tokens from their hidden states, without the logits of all of them at once.

Logits outweigh all else where the vocabulary is large: 8,000 tokens of 150,000 are 4.8 GB in fp32, and cross-entropy
and its gradient hold them three times. Here as many tokens as fit into `NUMBERS_AT_ONCE` have theirs at a time.

A token's loss is a function of its own hidden state alone. Where nothing behind the decoder trains, its gradient is
therefore taken as soon as the logits are there and scaled later by what comes back: the head is multiplied as often as
without chunks. ``torch.nn.functional.linear_cross_entropy`` multiplies once more where losses stay apart
(``reduction="none"``), and knows neither what the model does behind its head nor whether the label is the argmax.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmpeft.adapters import AdapterBank
from mmpeft.models.head import AdaptedHead, is_adapted, logits_of_tokens
from mmpeft.models.reader import LanguageReader

NUMBERS_AT_ONCE = 2**25
"""Logits that are held at once, 134 MB in fp32; so many or fewer are left to autograd as they are."""


def losses_of_tokens(
    reader: LanguageReader,
    bank: AdapterBank,
    hidden: Tensor,
    labels: Tensor,
    owners: Sequence[str | None],
    dropout_seeds: Mapping[str, int],
    in_float32: bool = False,
    row_numbers: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Args:
        reader: of the language model.
        bank: on the same.
        hidden: (tokens, dim) hidden states of the decoder.
        labels: (tokens,) int64
        owners: the adapter of every token; None is the base model.
        dropout_seeds: as of a batch.
        in_float32: as of `LanguageReader.logits`.
        row_numbers: (tokens,) int64, as of a batch, of the row of every token.

    Returns:
        (tokens,) fp32 negative log-likelihood of each label, and (tokens,) bool whether it was the most likely one.
    """
    at_once = max(1, NUMBERS_AT_ONCE // reader.vocabulary_size)
    if len(hidden) <= at_once:
        logits = logits_of_tokens(reader, bank, hidden, owners, dropout_seeds, in_float32, row_numbers)
        return _scored(logits, labels)
    if not is_adapted(reader, bank):
        needs_grad = hidden.requires_grad and torch.is_grad_enabled()
        logits = partial(reader.logits, in_float32=in_float32)
        return _FrozenHead.apply(hidden, labels, logits, _even(len(hidden), at_once), needs_grad)
    head = AdaptedHead(reader, bank, owners, dropout_seeds, hidden.device, in_float32, row_numbers)
    hidden, labels = head.together(hidden), head.together(labels)
    width = _even(head.width, max(1, at_once // len(head.names)))

    def part(columns: slice, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, correct = _scored(head.logits(hidden, columns).flatten(0, 1), labels.flatten())
        return nll.view(labels.shape), correct.view(labels.shape)

    pieces = [slice(start, start + width) for start in range(0, head.width, width)]
    parts = [  # what trains there needs the gradient that comes back, so its logits are computed again
        checkpoint(partial(part, own), hidden[:, own], labels[:, own], use_reentrant=False) for own in pieces
    ]
    nll, correct = (torch.cat(own, 1) for own in zip(*parts, strict=True))
    return head.apart(nll), head.apart(correct)


def _scored(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(-1) == labels


def _even(count: int, most: int) -> int:
    """The size of parts of at most ``most`` that are about equal."""
    return ceil(count / ceil(count / most))


class _FrozenHead(torch.autograd.Function):
    """Losses through a head in which nothing trains."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        logits: Callable[[Tensor], Tensor],
        at_once: int,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        slopes = torch.empty_like(hidden) if needs_grad else None
        parts: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(hidden), at_once):
            own = slice(start, start + at_once)
            with torch.set_grad_enabled(needs_grad):
                some = hidden[own].detach().requires_grad_(needs_grad)
                nll, correct = _scored(logits(some), labels[own])
                if slopes is not None:
                    (slopes[own],) = torch.autograd.grad(nll.sum(), some)
            parts.append((nll.detach(), correct))
        if slopes is not None:
            ctx.save_for_backward(slopes)
        nll, correct = (torch.cat(own) for own in zip(*parts, strict=True))
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None, None, None
