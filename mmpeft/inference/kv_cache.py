"""KV cache with a length per row: rows join, grow by columns of their own, and leave, in preallocated memory.

::

    row 0   k k k k k k | k k . .      prompt | answer, then room
    row 1   k k k | k k . . . . .      every row writes at its own end
    row 2   k k k k | k . . . . .

A column of a row is a token that the row has read: of its prefix, its prompt or its answers; none is padding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mmpeft.data.batch import PADDING

BLOCK = 32
"""Capacities, and what attention reads, are multiples of so many columns: oneDNN compiles its products anew for every
other width."""


@dataclass(frozen=True)
class Room:
    """What is allocated with the first row."""

    rows: int = 0
    columns: int = 0
    """Of every row."""
    fixed: bool = False
    """Whether all of it is read at every step, so that the shapes are always the same. There must not be more then."""


class KVCache(Cache):
    """Keys and values of every layer, (rows, key heads, capacity, head dim), and whose they are.

    What lies beyond a row's length is finite: masked, a NaN would still reach the row.
    """

    def __init__(self, room: Room | None = None):
        super().__init__(layers=[])
        self.room = room or Room()
        self.lengths: list[int] = []
        """Columns of every row."""
        self.segments = torch.empty(0, 0, dtype=torch.int64)
        """(row capacity, capacity) int64: the segment of every column, `PADDING` beyond the row's length."""
        self.positions = torch.empty(0, 0, dtype=torch.int64)
        """(row capacity, capacity) int64: of every column in its conversation."""
        self._used: dict[int, int] = {}
        """Place of a row -> columns that rows which have left wrote there, and which a NaN may be in."""
        self._width = 0
        self._writes: tuple[Tensor, Tensor, Tensor]
        self._in_order = False

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def rows_read(self) -> int:
        """Rows that a step reads; those beyond `num_rows` are nobody's."""
        return self.room.rows if self.room.fixed else self.num_rows

    @property
    def capacity(self) -> int:
        """Columns that there is room for."""
        return self.segments.shape[1]

    def insert(self, prefilled: Cache, segments: Tensor, positions: Tensor) -> None:
        """Appends rows.

        Args:
            prefilled: what the decoder made of their prompts.
            segments: (rows, columns) of its columns; those of `PADDING` are left out.
            positions: (rows, columns) of the same.
        """
        used = segments != PADDING
        lengths = used.sum(1).tolist()
        order = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(lengths)]
        first, columns = self.num_rows, order.shape[1]
        in_place = torch.equal(order, torch.arange(columns, device=order.device).expand_as(order))
        if not self.layers:
            self.layers = [_Layer(self, layer.keys, layer.values) for layer in prefilled.layers]  # pyright: ignore
            self.segments, self.positions = segments.new_full((0, 0), PADDING), positions.new_zeros(0, 0)
        self._reserve(max(first + len(lengths), self.room.rows), max(columns, self.room.columns))
        rows = slice(first, first + len(lengths))
        self.segments[rows] = PADDING
        self.segments[rows, :columns] = segments.gather(1, order)
        self.positions[rows, :columns] = positions.gather(1, order)
        every = torch.arange(len(lengths), device=order.device)[:, None]
        used_before = max(self._used.get(row, 0) for row in range(rows.start, rows.stop))
        for own, layer in zip(self.layers, prefilled.layers, strict=True):
            for buffer, new in ((own.keys, layer.keys), (own.values, layer.values)):  # pyright: ignore
                buffer[rows, :, columns:used_before] = 0  # pyright: ignore
                if in_place:  # as a rule; a copy without gathering
                    buffer[rows, :, :columns] = new[:, :, :columns]  # pyright: ignore
                else:
                    buffer[rows, :, :columns] = new[every, :, order].transpose(1, 2)  # pyright: ignore
        self._used |= dict.fromkeys(range(rows.start, rows.stop), columns)
        self.lengths += lengths

    def remove(self, row: int) -> None:
        """Takes a row out; the last row moves into its place."""
        last, length = self.num_rows - 1, self.lengths[-1]
        for place in {row, last}:
            self._used[place] = max(self._used.get(place, 0), self.lengths[place])
        if row != last:
            self.segments[row], self.positions[row] = self.segments[last], self.positions[last]
            for buffer in self._buffers():
                buffer[row, :, :length] = buffer[last, :, :length]
                buffer[row, :, length : self._used[row]] = 0
            self.lengths[row] = length
        self.lengths.pop()

    def extend(self, counts: Sequence[int]) -> int:
        """Makes every row longer by its count of columns.

        Returns:
            The width that attention reads: the longest row's, rounded up, or the capacity where that is little more.
        """
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        longest = max(self.lengths)
        self._reserve(self.num_rows, longest)
        if self.room.fixed:
            self._width = self.room.columns
            return self._width
        width = -(-longest // BLOCK) * BLOCK
        # on CPU a product copies a part of its rows' columns first, which takes longer than to read some more of them
        self._width = self.capacity if 3 * self.capacity <= 4 * width else width
        return self._width

    def write_next(
        self,
        rows: Tensor,
        queries: Tensor,
        columns: Tensor,
        segments: Tensor,
        positions: Tensor,
        in_order: bool = False,
    ) -> None:
        """Says where the coming forward's keys and values go: of row ``rows[i]`` those of its ``queries[i]``-th token
        into column ``columns[i]``, which is of ``segments[i]`` and at ``positions[i]``; all (tokens,) int64.
        ``in_order`` promises the only query of every row, row by row."""
        self._writes = rows, queries, columns
        self._in_order = in_order
        self.segments[rows, columns], self.positions[rows, columns] = segments, positions

    def _reserve(self, rows: int, columns: int) -> None:
        """Room for so many rows, with a quarter more where they have to grow, and columns."""
        have_rows, have_columns = self.segments.shape
        if rows > have_rows and have_rows:
            rows += rows // 4
        if columns > have_columns:
            columns = -(-columns // BLOCK) * BLOCK
        if rows <= have_rows and columns <= have_columns:
            return
        rows, columns = max(rows, have_rows), max(columns, have_columns)
        self.segments = _grown(self.segments, (rows, columns), PADDING)
        self.positions = _grown(self.positions, (rows, columns), 0)
        for layer in self.layers:
            layer.keys = _grown(layer.keys, (rows, layer.keys.shape[1], columns), 0)  # pyright: ignore
            layer.values = _grown(layer.values, (rows, layer.values.shape[1], columns), 0)  # pyright: ignore

    def _buffers(self) -> list[Tensor]:
        return [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]  # pyright: ignore


class _Layer(CacheLayerMixin):
    """One layer of the cache, as transformers calls it."""

    def __init__(self, cache: KVCache, keys: Tensor, values: Tensor):
        super().__init__()
        self.cache = cache
        self.keys = keys.new_empty(0, keys.shape[1], 0, keys.shape[3])
        self.values = values.new_empty(0, values.shape[1], 0, values.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows, queries, columns = self.cache._writes
        read = slice(self.cache.rows_read), slice(None), slice(self.cache._width)
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            own = new[: len(rows), :, 0] if self.cache._in_order else new[rows, :, queries]
            buffer[rows, :, columns] = own  # pyright: ignore
        return self.keys[read], self.values[read]  # pyright: ignore

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache._width, 0

    def get_seq_length(self) -> int:
        return max(self.cache.lengths, default=0)

    def get_max_length(self) -> int:
        return -1


def _grown(tensor: Tensor, sizes: tuple[int, ...], value: int) -> Tensor:
    """``tensor`` with its leading dims padded at their end."""
    shape = *sizes, *tensor.shape[len(sizes) :]
    out = tensor.new_full(shape, value) if value else _zeros(tensor, shape)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros that on a CPU take no memory until they are written: torch's own are all written at once."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = np.zeros(math.prod(shape) * like.itemsize, np.uint8)
    return torch.from_numpy(memory).view(like.dtype).view(shape)
