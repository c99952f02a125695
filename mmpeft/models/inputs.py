"""What the decoder reads of a batch: embeddings, whose they are and where they stand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from mmpeft.models.virtual import VirtualTokens


@dataclass
class Inputs:
    """What the decoder reads of a batch."""

    embeds: Tensor
    """(rows, columns, dim)"""
    ids: Tensor
    """(rows, columns) int64; 0 where no text stands."""
    queries: Tensor
    """(rows, columns) int64: their segments"""
    keys: Tensor
    """(rows, keys) int64: the segments of everything in the cache and of these columns, which are the last"""
    positions: Tensor
    """(rows, keys) int64: of the same"""
    adapters: Sequence[str | None]
    """Of every row."""
    dropout_seeds: dict[str, int]
    row_numbers: np.ndarray | None
    """Both as of a batch."""
    invoked: Tensor | None
    """(rows, columns) bool: on which of them activated adapters act; None where no row has one."""
    on_host: np.ndarray
    """(rows, columns) int64: the queries once more, on the host"""
    highest: np.ndarray
    """(rows,) int64: the highest position of each, on the host"""
    num_prompts: int = 0
    """How many of the first columns are virtual tokens."""
    prefix: Tensor | None = None
    """(layers, 2, rows, heads, prefix columns, head dim): keys and values before all columns."""

    def among_all(self, places: Tensor | None) -> Tensor | None:
        """Places among rows times the batch's own columns -> among rows times all columns."""
        columns, own = self.queries.shape[1], self.queries.shape[1] - self.num_prompts
        return None if places is None else places // own * columns + self.num_prompts + places % own

    def behind(self, virtual: VirtualTokens, all_columns: bool) -> "Inputs":
        """The same behind virtual tokens, which are read too where these are ``all_columns`` of the batch."""
        keys = torch.cat([virtual.segments, self.keys], 1)
        positions = torch.cat([virtual.positions, self.positions + virtual.lengths[:, None]], 1)
        segments, lengths = virtual.on_host
        moved = replace(self, keys=keys, positions=positions, highest=self.highest + lengths)
        num = virtual.num_prompts
        if not all_columns:
            return moved
        if num == 0:
            return replace(moved, prefix=virtual.keys_values)
        return replace(
            moved,
            embeds=torch.cat([virtual.embeds.to(self.embeds.dtype), self.embeds], 1),
            ids=nn.functional.pad(self.ids, (num, 0)),
            queries=torch.cat([virtual.segments[:, virtual.segments.shape[1] - num :], self.queries], 1),
            on_host=np.concatenate([segments[:, segments.shape[1] - num :], self.on_host], 1),
            invoked=None if self.invoked is None else nn.functional.pad(self.invoked, (num, 0)),
            num_prompts=num,
            prefix=virtual.keys_values,
        )
