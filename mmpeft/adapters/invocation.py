"""Invocation tokens: where in a conversation an activated adapter begins to act.

It acts from the first token of the last occurrence on; without any it does not act.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def invoked_tokens(rows: Sequence[Sequence[int]], invocations: Sequence[Sequence[int]]) -> Tensor:
    """Args:
        rows: (rows, tokens) ids on the host, one conversation in each; negative ones are no tokens of text.
        invocations: of every row; empty for a row without.

    Returns:
        (rows, tokens) bool on the host: on which of them the row's adapter acts.
    """
    acts = torch.zeros(len(rows), len(rows[0]) if rows else 0, dtype=torch.bool)
    for number, (ids, wanted) in enumerate(zip(rows, invocations, strict=True)):
        if wanted and (start := _last(ids, list(wanted))) is not None:
            acts[number, start:] = True
    return acts


def _last(ids: Sequence[int], wanted: list[int]) -> int | None:
    """Where the last occurrence begins."""
    starts = range(len(ids) - len(wanted), -1, -1)
    return next((start for start in starts if ids[start : start + len(wanted)] == wanted), None)
