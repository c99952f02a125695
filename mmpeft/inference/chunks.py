"""Chunked prefill: a prompt is read part by part, between the steps of answers that are being written.

::

    columns    v v | p p p p | p p p p | p p        v  trained keys and values, there from the beginning
    read in          1st       2nd       3rd forward, each behind all that is kept

A prompt is one row. Several are read together in one forward, each behind its own columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mmpeft.data.batch import PADDING
from mmpeft.inference.prefill import Prefilled
from mmpeft.models.inputs import Inputs
from mmpeft.models.masks import additive, sees, within_reach
from mmpeft.models.multimodal import MultimodalModel

KeysValues = tuple[Tensor, Tensor]
"""(key heads, columns, head dim) and (key heads, columns, value dim) of one layer and row"""


@dataclass(eq=False)
class Prompt:
    """A row that is being read."""

    inputs: Inputs
    """Of this one row."""
    wanted: Tensor
    """(columns,) bool: of which of the columns read the hidden states are kept."""
    done: int = 0
    """Columns that have been read."""
    layers: list[KeysValues] = field(default_factory=list)
    """Keys and values of all columns; those that have not been read are zeros. Empty before the first chunk."""
    _hidden: list[Tensor] = field(default_factory=list)

    @property
    def num_columns(self) -> int:
        """Columns to read."""
        return self.inputs.queries.shape[1]

    @property
    def left(self) -> int:
        return self.num_columns - self.done

    @property
    def ahead(self) -> int:
        """Columns of trained keys and values, which are not read."""
        return self.inputs.keys.shape[1] - self.num_columns

    @property
    def start(self) -> int:
        """Where the next chunk's keys and values go."""
        return self.ahead + self.done

    def begin(self, kept: Sequence[KeysValues], columns: int) -> None:
        """Begins behind columns whose keys and values are known."""
        self.done = columns
        for layer, each in enumerate(kept):
            for own, known in zip(self._layer(layer, each), each, strict=True):
                own[:, self.ahead : self.ahead + columns] = known

    def write(self, layer: int, states: KeysValues, count: int) -> KeysValues:
        """Keeps the keys and values of ``count`` new columns, and gives all."""
        own = self._layer(layer, states)
        for buffer, new in zip(own, states, strict=True):
            buffer[:, self.start : self.start + count] = new[:, :count]
        return own

    def read(self, hidden: Tensor) -> None:
        """Goes on behind columns whose hidden states (columns, dim) these are."""
        here = self.wanted[self.done : self.done + len(hidden)]
        self._hidden.append(hidden[here])
        self.done += len(hidden)

    def hidden(self) -> Tensor:
        """(wanted columns, dim) of what has been read."""
        return torch.cat(self._hidden)

    def prefilled(self) -> Prefilled:
        """The row of one conversation, as a decoder admits it."""
        assert not self.left, "it is read to its end"
        cache: Any = _Kept([_KeptLayer(keys[None], values[None]) for keys, values in self.layers])
        acts = self.inputs.invoked is not None and bool(self.inputs.invoked[0, -1])
        positions = self.inputs.positions
        last = int(positions[0, -1])
        return Prefilled([0], cache, self.inputs.keys, positions, self.hidden(), [last], [acts])

    def _layer(self, layer: int, like: KeysValues) -> KeysValues:
        if layer == len(self.layers):
            size = self.inputs.keys.shape[1]
            own = [each.new_zeros(each.shape[0], size, each.shape[2]) for each in like]
            if self.inputs.prefix is not None:
                for buffer, trained in zip(own, self.inputs.prefix[layer, :, 0], strict=True):
                    buffer[:, : self.ahead] = trained
            self.layers.append((own[0], own[1]))
        return self.layers[layer]


@torch.no_grad()
def read_chunks(model: MultimodalModel, prompts: Sequence[Prompt], counts: Sequence[int]) -> None:
    """The next columns of some prompts, in one forward.

    Args:
        model: whose conversations can share rows.
        prompts: what is read.
        counts: columns of each.

    Raises:
        RefusedError: what the model refuses, such as a row beyond its window; no prompt has been changed then.
    """
    ends = [prompt.start + count for prompt, count in zip(prompts, counts, strict=True)]
    queries, keys = max(counts), max(ends)
    model.reader.check_width(max(ends))
    part = _stacked(prompts, counts, queries)
    known = [(prompt.inputs, end) for prompt, end in zip(prompts, ends, strict=True)]
    segments = _padded([inputs.keys[0, :end] for inputs, end in known], keys, PADDING)
    positions = _padded([inputs.positions[0, :end] for inputs, end in known], keys, 0)
    starts = torch.tensor([prompt.start for prompt in prompts], device=segments.device)
    reading = starts[:, None] + torch.arange(queries, device=segments.device)
    behind = torch.arange(keys, device=segments.device) <= reading[..., None]
    mask = additive((sees(part.segments, segments) & behind)[:, None], model.dtype)
    model.bank.route(part.adapters)
    model.bank.routing.narrow()
    model.bank.routing.act_on(part.invoked if any(model.bank.invocations(part.adapters)) else None)
    reached = within_reach(mask, model.reader.reaches, part.positions, positions)
    cache = _ChunkCache(prompts, counts, keys)
    with model.reader.prepacked.in_use(model.bank.layers.values()):
        hidden, _ = model.reader.decode(part.embeds, reached, part.positions, cache, part.ids)
    for prompt, own, count in zip(prompts, hidden, counts, strict=True):
        prompt.read(own[:count])


@dataclass
class _Part:
    """The columns that are read in one forward; the rows are padded at their end."""

    embeds: Tensor
    """(rows, columns, dim)"""
    ids: Tensor
    """(rows, columns) int64"""
    segments: Tensor
    """(rows, columns) int64"""
    positions: Tensor
    """(rows, columns) int64"""
    invoked: Tensor
    """(rows, columns) bool"""
    adapters: list[str | None]


def _stacked(prompts: Sequence[Prompt], counts: Sequence[int], width: int) -> _Part:
    own = [(each.inputs, slice(each.done, each.done + n)) for each, n in zip(prompts, counts, strict=True)]
    ahead = [slice(each.start, each.start + n) for each, n in zip(prompts, counts, strict=True)]
    nowhere = torch.zeros(1, 1, dtype=torch.bool, device=prompts[0].wanted.device)
    acts = [nowhere.expand(1, i.ids.shape[1]) if i.invoked is None else i.invoked for i, _ in own]
    return _Part(
        _padded([i.embeds[0, at] for i, at in own], width, 0),
        _padded([i.ids[0, at] for i, at in own], width, 0),
        _padded([i.queries[0, at] for i, at in own], width, PADDING),
        _padded([i.positions[0, at] for (i, _), at in zip(own, ahead, strict=True)], width, 0),
        _padded([each[0, at] for each, (_, at) in zip(acts, own, strict=True)], width, False),
        [i.adapters[0] for i, _ in own],
    )


def _padded(rows: Sequence[Tensor], width: int, filling: int | bool) -> Tensor:
    """Tensors (columns, ...) as the rows of one, padded at their end."""
    out = rows[0].new_full((len(rows), width, *rows[0].shape[1:]), filling)
    for row, own in zip(out, rows, strict=True):
        row[: len(own)] = own
    return out


class _ChunkCache(Cache):
    """What a forward of chunks sees as its cache: of every row the prompt's own keys and values."""

    def __init__(self, prompts: Sequence[Prompt], counts: Sequence[int], width: int):
        super().__init__(layers=[])
        self.prompts, self.counts, self.width = prompts, counts, width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """(rows, key heads, columns, head dim) of this forward -> those of all columns that its mask speaks of."""
        own = [
            prompt.write(layer_idx, (key_states[row], value_states[row]), count)
            for row, (prompt, count) in enumerate(zip(self.prompts, self.counts, strict=True))
        ]
        if not any(prompt.start for prompt in self.prompts) and self.width == key_states.shape[2]:
            return key_states, value_states
        return self._together([keys for keys, _ in own]), self._together([values for _, values in own])

    def _together(self, rows: Sequence[Tensor]) -> Tensor:
        if len(rows) == 1 and rows[0].shape[1] >= self.width:
            return rows[0][None, :, : self.width]
        out = rows[0].new_zeros(len(rows), rows[0].shape[0], self.width, rows[0].shape[2])
        for row, own, prompt, count in zip(out, rows, self.prompts, self.counts, strict=True):
            row[:, : prompt.start + count] = own[:, : prompt.start + count]
        return out

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(prompt.start for prompt in self.prompts)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0


@dataclass
class _KeptLayer:
    """(1, key heads, columns, head dim)"""

    keys: Tensor
    values: Tensor


@dataclass
class _Kept:
    """A cache of one row, to be copied from."""

    layers: list[_KeptLayer]
