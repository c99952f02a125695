"""Unpacked rows: every conversation of a packed row in a row of its own, for models whose state would run on from one
into the next.

::

    packed      p p a a a b b          p  the shared prefix
    unpacked    p p a a a              a, b  conversations
                p p b b .              .  padding, always at the end: it cannot reach what stands before it
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mmpeft.data.packing import PREFIX
from mmpeft.transfer import to_device


@dataclass
class Unpacked:
    """Which token of which packed row stands where; all on the host."""

    rows: np.ndarray
    """(conversations,) int64: the packed row of each, in order; a row of a prefix alone is one."""
    columns: np.ndarray
    """(conversations, tokens) int64: the column in that row."""
    lengths: np.ndarray
    """(conversations,) int64"""
    tokens: np.ndarray
    """(conversations, tokens) bool: which are no padding."""
    owned: np.ndarray
    """(conversations, tokens) bool: what goes back to the packed row; of a prefix the first conversation's."""

    def take(self, packed: Tensor) -> Tensor:
        """(rows, columns, ...) -> (conversations, tokens, ...); what padding holds is some other token's."""
        rows, columns = (to_device(own, packed.device) for own in (self.rows, self.columns))
        return packed[rows[:, None], columns]

    def take_on_host(self, packed: np.ndarray) -> np.ndarray:
        """The same of (rows, columns) on the host."""
        return packed[self.rows[:, None], self.columns]

    def put_back(self, unpacked: Tensor, num_rows: int, num_columns: int) -> Tensor:
        """(conversations, tokens, dim) -> (rows, columns, dim), 0 at padding."""
        out = unpacked.new_zeros(num_rows, num_columns, unpacked.shape[-1])
        goals, sources = ([to_device(each, out.device) for each in own] for own in self._ways_back())
        return out.index_put(tuple(goals), unpacked[tuple(sources)])

    def put_back_on_host(self, unpacked: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The same of (conversations, tokens) bool on the host."""
        out = np.zeros(shape, unpacked.dtype)
        goals, sources = self._ways_back()
        out[goals] = unpacked[sources]
        return out

    def _ways_back(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """(rows, columns) and (conversations, tokens) of all that is owned."""
        places, tokens = self.owned.nonzero()
        return (self.rows[places], self.columns[places, tokens]), (places, tokens)


def unpack(segments: np.ndarray) -> Unpacked:
    """Args:
    segments: (rows, columns) int64 of a packed batch, on the host; columns of `PADDING` may stand anywhere.
    """
    rows, numbers = _conversations(np.maximum(segments, PREFIX))
    member = (segments[rows] == PREFIX) | (segments[rows] == numbers[:, None])
    lengths = member.sum(1)
    columns = np.argsort(~member, axis=1, kind="stable")[:, : max(1, lengths.max())]
    tokens = np.arange(columns.shape[1]) < lengths[:, None]
    first = np.ones_like(rows, dtype=bool)
    first[1:] = rows[1:] != rows[:-1]
    in_prefix = segments[rows[:, None], columns] == PREFIX
    return Unpacked(rows, columns, lengths, tokens, tokens & (~in_prefix | first[:, None]))


def _conversations(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(conversations,) rows and segments; a row without any has its prefix for one."""
    present = np.zeros((len(segments), segments.max() + 1), dtype=bool)
    np.put_along_axis(present, segments, True, axis=1)
    present[:, PREFIX] &= ~present[:, PREFIX + 1 :].any(1)
    rows, numbers = present.nonzero()
    return rows, numbers
