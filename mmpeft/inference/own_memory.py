"""A memory in which every conversation has a state of its own, for models whose conversations cannot share rows.

Those of like length are read together, without padding that a state could carry on, and keep a cache of the model's
own kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpeft.data.batch import Batch
from mmpeft.models.multimodal import MultimodalModel


@dataclass
class _Group:
    """Conversations that have read equally many tokens."""

    members: list[int | None]
    """The number of each among all conversations; None has ended, and is computed until all have."""
    adapters: list[str | None]
    invoked: Tensor | None
    """(members, length) bool: on which of the tokens read activated adapters act; None where no member has one."""
    length: int
    cache: Any
    """As the model makes it; None where it keeps nothing."""
    read: tuple[Tensor, Tensor]
    """Embeddings (members, length, dim) and ids (members, length) of everything read, where there is no cache."""


class OwnMemory:
    """One forward a token for every group of conversations of like length.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: MultimodalModel):
        self.model = model
        self._groups: list[_Group] = []
        self._count = 0

    def join(self, batch: Batch) -> Tensor:
        """Reads the prompts of a batch, whose conversations are appended, row by row in order of the segments.

        Returns:
            (conversations, dim) hidden states of their last tokens.

        Raises:
            RefusedError: rows with trained keys and values.
        """
        inputs = self.model.inputs(batch)
        unpacked, embeds, ids = self.model.unpacked(inputs)
        owners, lengths = unpacked.rows.tolist(), unpacked.lengths.tolist()
        acts = None if inputs.invoked is None else unpacked.take(inputs.invoked)
        hidden = embeds.new_zeros(len(owners), embeds.shape[-1])
        for length in sorted(set(lengths)):
            numbers = [number for number, own in enumerate(lengths) if own == length]
            group = _Group(
                members=[self._count + number for number in numbers],
                adapters=[inputs.adapters[owners[number]] for number in numbers],
                invoked=None if acts is None else acts[numbers, :length],
                length=0,
                cache=None,
                read=(embeds[numbers, :0], ids[numbers, :0]),
            )
            hidden[numbers] = self._read(group, embeds[numbers, :length], ids[numbers, :length])
            self._groups.append(group)
        self._count += len(owners)
        return hidden

    @property
    def columns(self) -> int:
        """Tokens that conversations have read whose states are kept."""
        return sum(group.length * len(group.members) for group in self._groups)

    def keep(self, numbers: Sequence[int]) -> None:
        """Only these conversations go on."""
        renumbered: dict[int | None, int] = {old: new for new, old in enumerate(numbers)}
        for group in self._groups:
            group.members = [renumbered.get(member) for member in group.members]
        self._groups = [group for group in self._groups if any(each is not None for each in group.members)]
        self._count = len(numbers)

    def advance(self, tokens: Tensor) -> Tensor:
        """(conversations,) tokens just written -> (conversations, dim), from which the next ones' logits come."""
        parts: list[Tensor] = []
        order: list[int] = []
        for group in self._groups:
            going_on = [place for place, member in enumerate(group.members) if member is not None]
            # a conversation that has ended reads some other's token; nobody looks at it
            numbers = [member or 0 for member in group.members]
            ids = tokens[numbers][:, None]
            if group.invoked is not None:  # what is written goes on as the prompt ended
                group.invoked = torch.cat([group.invoked, group.invoked[:, -1:]], 1)
            parts.append(self._read(group, self.model.reader.embed(ids), ids)[going_on])
            order += [numbers[place] for place in going_on]
        return torch.cat(parts)[torch.tensor(order, device=tokens.device).argsort()]

    def _read(self, group: _Group, embeds: Tensor, ids: Tensor) -> Tensor:
        """(members, dim) of the last of these tokens, behind all that the group has read."""
        self.model.bank.route(group.adapters)
        reader = self.model.reader
        start, stop = group.length, group.length + ids.shape[1]
        if not reader.reading.cached:
            embeds, ids = (
                torch.cat([old, new], 1) for old, new in zip(group.read, (embeds, ids), strict=True)
            )
            group.read, start = (embeds, ids), 0
        self.model.bank.routing.act_on(None if group.invoked is None else group.invoked[:, -ids.shape[1] :])
        positions = torch.arange(start, stop, device=ids.device).expand(len(ids), -1)
        hidden, cache = reader.decode(embeds, None, positions, group.cache, ids, keep=reader.reading.cached)
        group.cache, group.length = (cache if reader.reading.cached else None), stop
        return hidden[:, -1]
