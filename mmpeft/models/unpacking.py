"""Unpacked rows: every conversation of a packed row in a row of its own, for models whose state would run on from one
into the next.

::

    packed      p p a a a b b          p  the shared prefix
    unpacked    p p a a a              a, b  conversations
                p p b b .              .  padding, always at the end: it cannot reach what stands before it
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.data.packing import PREFIX


@dataclass
class Unpacked:
    """Which token of which packed row stands where."""

    rows: Tensor
    """(conversations,) int64: the packed row of each, in order; a row of a prefix alone is one."""
    columns: Tensor
    """(conversations, tokens) int64: the column in that row."""
    lengths: Tensor
    """(conversations,) int64"""
    owned: Tensor
    """(conversations, tokens) bool: what goes back to the packed row; of a prefix the first conversation's."""

    @property
    def tokens(self) -> Tensor:
        """(conversations, tokens) bool: which are no padding."""
        return torch.arange(self.columns.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def take(self, packed: Tensor) -> Tensor:
        """(rows, columns, ...) -> (conversations, tokens, ...); what padding holds is some other token's."""
        return packed[self.rows[:, None], self.columns]

    def put_back(self, unpacked: Tensor, num_rows: int, num_columns: int) -> Tensor:
        """(conversations, tokens, dim) -> (rows, columns, dim), 0 at padding."""
        out = unpacked.new_zeros(num_rows, num_columns, unpacked.shape[-1])
        places, tokens = self.owned.nonzero(as_tuple=True)
        return out.index_put((self.rows[places], self.columns[places, tokens]), unpacked[places, tokens])


def unpack(segments: Tensor) -> Unpacked:
    """Args:
    segments: (rows, columns) int64 of a packed batch; columns of `PADDING` may stand anywhere.
    """
    own = segments.clamp(min=PREFIX)
    rows, numbers = _conversations(own)
    member = (segments[rows] == PREFIX) | (segments[rows] == numbers[:, None])
    lengths = member.sum(1)
    columns = (~member).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, int(lengths.max()))]
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    in_prefix = segments[rows[:, None], columns] == PREFIX
    unpacked = Unpacked(rows, columns, lengths, torch.empty(0))
    unpacked.owned = unpacked.tokens & (~in_prefix | first[:, None])
    return unpacked


def _conversations(segments: Tensor) -> tuple[Tensor, Tensor]:
    """(conversations,) rows and segments; a row without any has its prefix for one."""
    present = torch.zeros(len(segments), int(segments.max()) + 1, dtype=torch.bool, device=segments.device)
    present.scatter_(1, segments, True)
    present[:, PREFIX] &= ~present[:, PREFIX + 1 :].any(1)
    rows, numbers = present.nonzero(as_tuple=True)
    return rows, numbers
