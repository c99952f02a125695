"""Prefill: prompts are read, rows of like length together, so that little is computed for padding.

What all rows begin with, such as the text before their images, can be read once for all rows of a finetune::

    row 0   s s s | i i i q q q      s  the same in all rows: read once, and copied
    row 1   s s s | i i i q q q
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from mmpeft.data.batch import PADDING, Batch
from mmpeft.data.template import IMAGE_TOKEN
from mmpeft.models.multimodal import MultimodalModel, last_positions
from mmpeft.transfer import to_device

SHORTEST = 0.75
"""The shortest row that is read with a longer one, in parts of that one's length."""
FEWEST_SHARED = 4
"""Columns that are worth a forward of their own."""
WORTH = 256
"""Columns of padding that must be saved for a part of its own, in which the weights are read once more."""


@dataclass
class Prefilled:
    """Rows whose prompts are read."""

    rows: list[int]
    """Their numbers in the batch."""
    cache: Cache
    segments: Tensor
    """(rows, columns) int64: of the cache's columns, virtual tokens included."""
    positions: Tensor
    """(rows, columns) int64: of the same"""
    hidden: Tensor
    """(conversations, dim) of every conversation's last token, row by row."""
    last_positions: list[int]
    """Of those tokens."""
    invoked: list[bool]
    """Whether an activated adapter acts on them, and so on what follows."""


def prefill(model: MultimodalModel, batch: Batch, share: bool = False) -> list[Prefilled]:
    """Keys and values of a batch's prompts, part by part.

    Args:
        model: whose conversations can share rows.
        batch: on its device.
        share: whether columns that all rows begin with are read once.
    """
    return [_read(model, part, rows, share) for part, rows in _of_like_length(batch)]


def _read(model: MultimodalModel, batch: Batch, rows: list[int], share: bool) -> Prefilled:
    shared = shared_columns(batch) if share and not any(model.bank.invocations(batch.adapters)) else 0
    cache = _read_shared(model, batch, shared) if shared else DynamicCache()
    width = batch.input_ids.shape[1] - shared
    inputs = model.inputs(batch, width if shared else None)
    of_row, column = last_positions(batch)
    where = of_row, column - shared
    hidden = model.read(inputs, cache, to_device(where[0] * width + where[1], model.device))
    last = inputs.positions[:, -width:][where].tolist()
    invoked = [False] * len(last) if inputs.invoked is None else inputs.invoked[where].tolist()
    return Prefilled(rows, cache, inputs.keys, inputs.positions, hidden[where], last, invoked)


def shared_columns(batch: Batch) -> int:
    """How many columns all rows begin with: the same text, in the same segments and places. At least one more is left
    of every row; fewer than `FEWEST_SHARED`, and those of a single row, are not worth a forward."""
    host = batch.on_host
    alike = [(own == own[:1]).all(0) for own in (host.input_ids, host.segments, host.positions)]
    same = np.logical_and.reduce([*alike, host.input_ids[0] != IMAGE_TOKEN, host.segments[0] != PADDING])
    ends = last_positions(batch)[1]
    columns = min(int(np.argmin([*same, False])), int(ends.min()) if len(ends) else 0)
    return columns if columns >= FEWEST_SHARED and len(same) > columns and len(host.input_ids) > 1 else 0


def _read_shared(model: MultimodalModel, batch: Batch, columns: int) -> DynamicCache:
    """Every row's keys and values of the first columns, of which one row of each finetune is read."""
    names = list(dict.fromkeys(batch.adapters))
    firsts = torch.tensor([batch.adapters.index(name) for name in names], device=batch.input_ids.device)
    tokens = {
        name: getattr(batch, name)[firsts, :columns]
        for name in ("input_ids", "targets", "positions", "segments")
    }
    nobody = batch.image_rows[:0]
    first = replace(batch, **tokens, features=None, image_rows=nobody, image_tokens=None, adapters=names)
    cache = DynamicCache()
    model.read(model.inputs(first), cache)
    cache.batch_select_indices(to_device([names.index(name) for name in batch.adapters], model.device))
    return cache


def _of_like_length(batch: Batch) -> Iterator[tuple[Batch, list[int]]]:
    """Parts of the batch, with the rows' numbers in it; the longest first."""
    lengths = (batch.segments != PADDING).sum(1).tolist()
    waiting = list(range(len(lengths)))
    while waiting:
        longest = max(lengths[row] for row in waiting)
        part = [row for row in waiting if lengths[row] >= SHORTEST * longest]
        shorter = [row for row in waiting if lengths[row] < SHORTEST * longest]
        if sum(longest - lengths[row] for row in shorter) < WORTH:
            part, shorter = waiting, []
        waiting = shorter
        yield _select(batch, part, longest), part


def _select(batch: Batch, rows: list[int], width: int) -> Batch:
    """Some rows of a batch, and as many of their columns."""
    if len(rows) == len(batch.input_ids):
        return batch
    chosen = torch.tensor(rows, device=batch.input_ids.device)
    own = torch.isin(batch.image_rows, chosen)
    return replace(
        batch,
        input_ids=batch.input_ids[chosen, :width],
        targets=batch.targets[chosen, :width],
        positions=batch.positions[chosen, :width],
        segments=batch.segments[chosen, :width],
        features=None if batch.features is None else batch.features[own],
        image_rows=torch.searchsorted(chosen, batch.image_rows[own]),
        image_tokens=None if batch.image_tokens is None else batch.image_tokens[own.cpu().numpy()],
        adapters=[batch.adapters[row] for row in rows],
    )
