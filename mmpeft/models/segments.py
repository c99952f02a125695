"""Segments of packed rows, in place of their dense mask: which tokens attend to which, told by a few numbers a token.

On a processor the queries are cut into tiles, each with the keys that any of its queries sees. For a row of a prefix
and four conversations, in tiles of four columns::

            p p p p a a b b c c d d
    p p p p # # # #                      keys up to the tile's last query
    a a b b # # # # # # # #              the prefix, and from the tile's first own segment on
    c c d d # # # #         # # # #

On a GPU flex attention leaves out the blocks of which no query sees a key. Source: Dong et al. 2024, FlexAttention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mmpeft.data.batch import PADDING
from mmpeft.data.packing import PREFIX
from mmpeft.models.masks import Reach, additive, sees

SIZES = (32, 64, 128)
"""Queries of a tile; the size is chosen for every batch by what is left to compute."""
TILE_COST = 20_000
"""What a tile costs beside its scores, in scores of one head."""
BLOCK = 128
"""Columns of a block of flex attention."""

Ranges = tuple[slice, tuple[slice, ...]]
"""Queries and keys of a tile."""


@dataclass(frozen=True)
class Tile:
    """Queries, and the keys that they are multiplied with."""

    queries: slice
    keys: tuple[slice, ...]
    """One range, or the prefix and another."""
    mask: Tensor
    """(rows, 1, queries, keys), added to the scores"""

    def take(self, states: Tensor) -> Tensor:
        """(rows, heads, all keys, dim) -> those of the tile."""
        parts = [states[:, :, each] for each in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def add_to(self, states: Tensor, own: Tensor) -> None:
        """Adds what is the tile's to (rows, heads, all keys, dim)."""
        sizes = [each.stop - each.start for each in self.keys]
        for each, part in zip(self.keys, own.split(sizes, 2), strict=True):
            states[:, :, each] += part


@dataclass(frozen=True)
class Segments:
    """Whose tokens stand in which column."""

    queries: Tensor
    """(rows, queries) int64: `PREFIX`, the conversation's segment, or `PADDING`"""
    keys: Tensor
    """(rows, keys) int64: of the same kind; the queries' own are the last of them"""
    query_positions: Tensor
    """(rows, queries) int64: in their conversations"""
    key_positions: Tensor
    """(rows, keys) int64"""

    def tiles(self, reach: Reach, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Tile]:
        """What must be computed, in tiles of the size that makes it cheapest; tensors are on the CPU."""
        plans = [list(self._ranges(size)) for size in sizes]
        cheapest = min(plans, key=self._cost)
        return [Tile(*each, additive(self._seen(reach, *each), dtype)) for each in cheapest]

    def _cost(self, plan: Sequence[Ranges]) -> int:
        """In scores of one head."""
        widths = [(queries, sum(each.stop - each.start for each in keys)) for queries, keys in plan]
        scores = sum((queries.stop - queries.start) * width for queries, width in widths)
        return len(self.queries) * scores + len(plan) * TILE_COST

    def _ranges(self, size: int) -> Iterator[Ranges]:
        """Of every tile."""
        num_queries, num_keys = self.queries.shape[1], self.keys.shape[1]
        first, shared = self._first_keys
        step = max(1, size // 2)  # oneDNN compiles its products anew for every other width
        count = max(1, round(num_queries / size))
        borders = [num_queries * number // count for number in range(count + 1)]
        for start, stop in pairwise(borders):
            end = num_keys - num_queries + stop
            own = min(int(first[:, start:stop].min()), end - 1) // step * step
            prefix = slice(shared.start, min(shared.stop, end))
            if own <= prefix.stop or prefix.start >= prefix.stop:
                begin = own if prefix.start >= prefix.stop else min(own, prefix.start)
                yield slice(start, stop), (slice(begin, end),)
            else:
                yield slice(start, stop), (prefix, slice(own, end))

    @cached_property
    def _first_keys(self) -> tuple[np.ndarray, slice]:
        """(rows, queries) the first key of the conversation of each query, beyond all for others; and where any row has
        keys of a prefix."""
        queries, keys = self.queries.numpy(), self.keys.numpy()
        rows, columns = np.nonzero(keys > PREFIX)
        first = np.full((len(keys), max(keys.max(), queries.max(), PREFIX) + 1), keys.shape[1])
        np.minimum.at(first, (rows, keys[rows, columns]), columns)
        shared: list[int] = np.flatnonzero(np.any(keys == PREFIX, axis=0)).tolist()
        of_queries = np.take_along_axis(first, queries.clip(min=PREFIX), 1)
        return of_queries, slice(shared[0], shared[-1] + 1) if shared else slice(0, 0)

    def _seen(self, reach: Reach, queries: slice, keys: tuple[slice, ...]) -> Tensor:
        """(rows, 1, queries, keys) bool"""
        offset = self.keys.shape[1] - self.queries.shape[1]
        columns = torch.arange(self.keys.shape[1])
        key_columns = torch.cat([columns[each] for each in keys])
        seen = sees(self.queries[:, queries], self.keys[:, key_columns])
        seen &= key_columns <= columns[offset:][queries, None]
        near = reach.sees(self.query_positions[:, queries], self.key_positions[:, key_columns])
        return seen[:, None] if near is None else seen[:, None] & near

    def padded(self, multiple: int) -> "Segments":
        """With columns of padding at the end, so that queries and keys are multiples."""
        more = {"queries": -self.queries.shape[1] % multiple, "keys": -self.keys.shape[1] % multiple}
        return replace(
            self,
            queries=nn.functional.pad(self.queries, (0, more["queries"]), value=PADDING),
            keys=nn.functional.pad(self.keys, (0, more["keys"]), value=PADDING),
            query_positions=nn.functional.pad(self.query_positions, (0, more["queries"])),
            key_positions=nn.functional.pad(self.key_positions, (0, more["keys"])),
        )

    def blocks(self, reach: Reach) -> BlockMask:
        """The same for flex attention, of whole blocks."""
        offset = self.keys.shape[1] - self.queries.shape[1]
        whole = self.padded(BLOCK)
        queries, keys = whole.queries, whole.keys
        query_positions, key_positions = whole.query_positions, whole.key_positions

        def seen(row: Any, head: Any, query: Any, key: Any) -> Any:
            segment, other = queries[row, query], keys[row, key]
            allowed = (other == segment) | ((other == PREFIX) & (segment != PADDING))
            allowed &= key <= query + offset
            if reach.window is not None:
                allowed &= query_positions[row, query] - key_positions[row, key] < reach.window
            elif reach.chunk is not None:
                own, its = query_positions[row, query] // reach.chunk, key_positions[row, key] // reach.chunk
                allowed &= own == its
            return allowed

        rows, sizes = len(queries), (queries.shape[1], keys.shape[1])
        return create_block_mask(
            seen, rows, None, *sizes, device=queries.device, BLOCK_SIZE=BLOCK, _compile=queries.is_cuda
        )


class SegmentMask(Tensor):
    """Goes where a model wants its mask, and tells our attention what is to be computed.

    It has a mask's shape and no memory, and is NaN wherever anybody reads it: a model that does something of its own
    with its mask is found out by its first number.
    """

    work: "list[Tile] | BlockMask"

    @staticmethod
    def of(segments: Segments, reach: Reach, dtype: torch.dtype, sizes: tuple[int, ...]) -> "SegmentMask":
        """Args:
        segments: of all rows.
        reach: of the layers that it is for.
        dtype: of the model.
        sizes: of tiles, to choose from.
        """
        shape = len(segments.queries), 1, segments.queries.shape[1], segments.keys.shape[1]
        unread = torch.full((1, 1, 1, 1), torch.nan, dtype=dtype, device=segments.keys.device)
        mask: Any = unread.expand(shape).as_subclass(SegmentMask)
        on_cpu = segments.keys.device.type == "cpu"
        mask.work = segments.tiles(reach, dtype, sizes) if on_cpu else segments.blocks(reach)
        return mask
