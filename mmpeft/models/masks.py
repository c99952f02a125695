"""Attention masks of packed rows, by segments and, where a layer sees no further than a window, by positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.data.batch import PADDING
from mmpeft.data.packing import PREFIX

Mask = Tensor | dict[str, Tensor]
"""(rows, 1, queries, keys), added to the scores; or one for every type of layer, under transformers' names."""


@dataclass(frozen=True)
class Reach:
    """How far back a layer sees, in positions of the conversation."""

    window: int | None = None
    """The nearest so many tokens, itself among them; None is all."""
    chunk: int | None = None
    """Those of its own chunk of so many tokens; None is all."""

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Positions (rows, queries) and (rows, keys) -> (rows, 1, queries, keys) bool; None is all of them."""
        q, k = queries[:, None, :, None], keys[:, None, None, :]
        if self.window is not None:
            return q - k < self.window
        return None if self.chunk is None else q // self.chunk == k // self.chunk


def within_reach(
    mask: Tensor, reaches: Reach | dict[str, Reach], query_positions: Tensor, key_positions: Tensor
) -> Mask:
    """The mask of every type of layer, from one that knows no distances.

    Args:
        mask: (rows, 1, queries, keys), added to the scores.
        reaches: of all layers, or of every type.
        query_positions: (rows, queries)
        key_positions: (rows, keys)
    """
    if isinstance(reaches, dict):
        each = {kind: _within(mask, reach, query_positions, key_positions) for kind, reach in reaches.items()}
        return each
    return _within(mask, reaches, query_positions, key_positions)


def _within(mask: Tensor, reach: Reach, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    seen = reach.sees(query_positions, key_positions)
    return mask if seen is None else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``allowed`` (bool), else the lowest number of ``dtype``."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def sees(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """Which earlier key each query sees: (rows, queries) and (rows, keys) -> (rows, queries, keys) bool."""
    q, k = query_segments[:, :, None], key_segments[:, None, :]
    return (k == q).logical_or_((k == PREFIX) & (q != PADDING))


def attention_mask(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """Which key each query sees: earlier ones (and itself) of its own segment or of the shared prefix.

    Args:
        query_segments: (rows, queries), the last columns of the keys.
        key_segments: (rows, keys)

    Returns:
        (rows, 1, queries, keys) bool. For the segments ``0 0 1 1 2 2``::

            1 . . . . .      prefix
            1 1 . . . .
            1 1 1 . . .      first conversation
            1 1 1 1 . .
            1 1 . . 1 .      second conversation
            1 1 . . 1 1
    """
    queries, keys = query_segments.shape[1], key_segments.shape[1]
    index = torch.arange(keys, device=key_segments.device)
    causal = index[None, :] <= index[keys - queries :, None]
    return sees(query_segments, key_segments).logical_and_(causal)[:, None]
