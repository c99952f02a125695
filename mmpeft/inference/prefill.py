"""Prefill: prompts are read, rows of like length together, so that little is computed for padding."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from mmpeft.data.batch import PADDING, Batch
from mmpeft.models.multimodal import MultimodalModel, last_positions
from mmpeft.transfer import to_device

SHORTEST = 0.75
"""The shortest row that is read with a longer one, in parts of that one's length."""
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


def prefill(model: MultimodalModel, batch: Batch) -> list[Prefilled]:
    """Keys and values of a batch's prompts, part by part."""
    return [_read(model, part, rows) for part, rows in _of_like_length(batch)]


def _read(model: MultimodalModel, batch: Batch, rows: list[int]) -> Prefilled:
    inputs, cache = model.inputs(batch), DynamicCache()
    where = last_positions(batch)
    places = to_device(where[0] * batch.input_ids.shape[1] + where[1], model.device)
    hidden = model.read(inputs, cache, places)
    own = inputs.positions[:, -batch.input_ids.shape[1] :]
    last = own[where].tolist()
    invoked = [False] * len(last) if inputs.invoked is None else inputs.invoked[where].tolist()
    return Prefilled(rows, cache, inputs.keys, inputs.positions, hidden[where], last, invoked)


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
