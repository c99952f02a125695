"""Packed rows in memory while their conversations are answered: what they have read, and where each goes on.

Conversations of one packed row share the row's prefix in the cache; each of their tokens gets a column of its own,
which sees the prefix and its own conversation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmpeft.adapters.routing import Few, Gathered
from mmpeft.data.batch import PADDING, Batch
from mmpeft.data.packing import PREFIX
from mmpeft.inference.attention import attention_for_decoding
from mmpeft.inference.kv_cache import KVCache, Room
from mmpeft.inference.prefill import Prefilled, prefill
from mmpeft.models.masks import additive, sees, within_reach
from mmpeft.models.multimodal import MultimodalModel, last_positions


@dataclass
class _Place:
    """Where a conversation stands."""

    row: int
    segment: int
    position: int
    """Of its last token."""
    invoked: bool
    """Whether its activated adapter acts, as it then does on all that is written."""


@dataclass
class _Layout:
    """Where every conversation's next token goes; the same for all steps between two changes of membership."""

    rows: Tensor
    """(conversations,)"""
    queries: Tensor
    """(conversations,): which of the forward's columns is the conversation's"""
    segments: Tensor
    """(conversations,)"""
    counts: list[int]
    """Unfinished conversations of every row."""
    columns: Tensor
    """(conversations,): its next column in the cache"""
    strides: Tensor
    """(conversations,): from there to its column after the next, one for each conversation of the row"""
    positions: Tensor
    """(rows, queries): of the next tokens"""
    mask: Tensor
    """(rows, 1, queries, capacity), added to the scores; distances are not in it"""
    routing: tuple[dict[str, Tensor], dict[str, bool], dict[str, Few]]
    """Whose rows they are, as the bank was routed for them"""
    invoked: Tensor | None
    """(rows, queries) bool: on which tokens activated adapters act; None where no row has one"""
    in_order: bool
    """Whether every row has one conversation, row by row"""
    gathered: Gathered = field(default_factory=Gathered)
    """What adapters have gathered for the rows"""


class PackedMemory:
    """Keys and values of the rows in one cache; one forward a token for all.

    Args:
        model: whose conversations can share rows.
        room: of the cache.
        share: whether what all prompts of a batch begin with is read once.
    """

    def __init__(self, model: MultimodalModel, room: Room | None = None, share: bool = False):
        self.model, self._share = model, share
        self._cache = KVCache(room)
        self._adapters: list[str | None] = []
        self._places: list[_Place] = []
        self._layout: _Layout | None = None

    def join(self, batch: Batch) -> Tensor:
        """Reads the prompts of a batch, whose conversations are appended, row by row in order of the segments.

        Returns:
            (conversations, dim) hidden states of their last tokens.
        """
        owners = last_positions(batch)[0].tolist()
        prefilled = prefill(self.model, batch, self._share)
        self._drop_rows()
        members = {row: [n for n, owner in enumerate(owners) if owner == row] for row in set(owners)}
        order: list[int] = []
        places: dict[int, _Place] = {}
        for part in prefilled:
            rows = {row: self._cache.num_rows + place for place, row in enumerate(part.rows)}
            numbers = [number for row in part.rows for number in members.get(row, ())]
            for number, position, invoked in zip(numbers, part.last_positions, part.invoked, strict=True):
                row = owners[number]
                places[number] = _Place(rows[row], 1 + members[row].index(number), position, invoked)
            order += numbers
            self._cache.insert(part.cache, part.segments, part.positions)
            self._adapters += [batch.adapters[row] for row in part.rows]
        self._places += [places[number] for number in range(len(owners))]
        self._layout = None
        hidden = torch.cat([part.hidden for part in prefilled])
        return hidden if order == sorted(order) else hidden[sorted(range(len(order)), key=order.__getitem__)]

    def admit(self, read: Prefilled, adapters: Sequence[str | None]) -> None:
        """Appends rows of one conversation each whose prompts are read."""
        self._drop_rows()
        first = self._cache.num_rows
        for row, (position, invoked) in enumerate(zip(read.last_positions, read.invoked, strict=True), first):
            self._places.append(_Place(row, PREFIX + 1, position, invoked))
        self._cache.insert(read.cache, read.segments, read.positions)
        self._adapters += adapters
        self._layout = None

    @property
    def columns(self) -> int:
        """Columns of keys and values in rows that are not done."""
        return sum(self._cache.lengths[row] for row in {place.row for place in self._places})

    def keep(self, numbers: Sequence[int]) -> None:
        """Only these conversations go on."""
        self._places = [self._places[number] for number in numbers]
        self._layout = None

    def advance(self, tokens: Tensor) -> Tensor:
        """(conversations,) tokens just written -> (conversations, dim), from which the next ones' logits come."""
        layout = self._layout = self._layout or self._arrange()
        routing, reader = self.model.bank.routing, self.model.reader
        routing.slots, routing.uniform, routing.few = (
            layout.routing
        )  # another decoder may have stepped in between
        routing.gathered = layout.gathered
        routing.act_on(layout.invoked)
        width = self._cache.extend(layout.counts)
        reader.check_width(max(self._cache.lengths))
        if (missing := self._cache.capacity - layout.mask.shape[-1]) > 0:
            layout.mask = nn.functional.pad(
                layout.mask, (0, missing), value=torch.finfo(self.model.dtype).min
            )
        own = layout.rows, layout.queries
        self._cache.write_next(*own, layout.columns, layout.segments, layout.positions[own], layout.in_order)
        layout.mask[layout.rows, 0, layout.queries, layout.columns] = 0
        ids = torch.zeros_like(layout.positions)
        ids[own] = tokens
        keys = self._cache.positions[: len(ids), :width]
        mask = within_reach(layout.mask[..., :width], reader.reaches, layout.positions, keys)
        last = 1 + max(place.position for place in self._places)
        with attention_for_decoding(reader.decoder):
            hidden, _ = reader.decode(
                reader.embed(ids), mask, layout.positions, self._cache, ids, last_position=last
            )
        routing.gathered, routing.few = None, {}
        layout.positions += 1
        layout.columns += layout.strides
        for place in self._places:
            place.position += 1
        return hidden[own]

    def _arrange(self) -> _Layout:
        """Lets rows without conversations leave and gives every conversation its place among those of its row."""
        self._drop_rows()
        num_rows = self._cache.rows_read
        adapters = [*self._adapters, *[None] * (num_rows - len(self._adapters))]
        self.model.bank.route(adapters)
        routing = self.model.bank.routing
        if not self._cache.room.fixed:
            routing.narrow()
        counts: Counter[int] = Counter()
        places: list[tuple[int, ...]] = []
        for one in self._places:
            number = counts[one.row]
            places.append(
                (one.row, number, one.segment, self._cache.lengths[one.row] + number, one.position + 1)
            )
            counts[one.row] += 1
        device = self.model.device
        rows, queries, segments, columns, positions = torch.tensor(places, device=device).unbind(1)
        num_queries = max(counts.values())

        def per_query(values: Tensor, padding: int | bool) -> Tensor:
            out = values.new_full((num_rows, num_queries), padding)
            out[rows, queries] = values
            return out

        acts = per_query(torch.tensor([one.invoked for one in self._places], device=device), False)
        seen = sees(per_query(segments, PADDING), self._cache.segments[:num_rows])
        return _Layout(
            rows,
            queries,
            segments,
            [counts[row] for row in range(self._cache.num_rows)],
            columns.clone(),
            torch.bincount(rows)[rows],
            per_query(positions, 0),
            additive(seen[:, None], self.model.dtype),
            (routing.slots, routing.uniform, routing.few),
            acts if any(self.model.bank.invocations(adapters)) else None,
            [one.row for one in self._places] == list(range(num_rows)),
        )

    def _drop_rows(self) -> None:
        busy = {one.row for one in self._places}
        for row in reversed(range(self._cache.num_rows)):
            if row in busy:
                continue
            last = self._cache.num_rows - 1
            self._cache.remove(row)
            self._adapters[row] = self._adapters[last]
            self._adapters.pop()
            for one in self._places:
                if one.row == last:
                    one.row = row
