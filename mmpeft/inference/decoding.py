"""Decoding with continuous batching: conversations join and leave while others are in the middle of their answers.

Every unfinished conversation writes one token a step. What they have read is kept by a memory: a packed one, or one in
which every conversation has a state of its own.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from mmpeft.data.batch import Batch
from mmpeft.errors import RefusedError
from mmpeft.inference.kv_cache import Room
from mmpeft.inference.own_memory import OwnMemory
from mmpeft.inference.packed_memory import PackedMemory
from mmpeft.inference.prefill import Prefilled
from mmpeft.inference.sampling import Sampling, sample
from mmpeft.models.multimodal import MultimodalModel, last_positions

NO_TOKEN = -1
"""The token of a step in which the model ended its answer."""


@dataclass(frozen=True)
class Step:
    """One token of one conversation."""

    conversation: int
    """The handle that `Decoder.join` gave."""
    token: int
    """`NO_TOKEN` where the model wrote its end token, which is not part of the answer."""
    finish_reason: Literal["stop", "length"] | None
    """"stop": the model wrote its end token. "length": max_new_tokens is reached; the token belongs to the answer."""


@dataclass
class _Conversation:
    """An unfinished conversation."""

    handle: int
    adapter: str | None
    sampling: Sampling
    generator: torch.Generator | None
    written: int = 0


class Decoder:
    """The conversations that one model is answering.

    Args:
        model: in eval mode.
        eos_token_id: ends an answer; of several each does.
        room: what is allocated at once, of a model whose conversations can share rows.
        share: whether what all prompts of a batch begin with is read once, of such a model.
    """

    def __init__(
        self,
        model: MultimodalModel,
        eos_token_id: int | Collection[int],
        room: Room | None = None,
        share: bool = False,
    ):
        self.model, self._room = model, room or Room()
        self.end_ids = {eos_token_id} if isinstance(eos_token_id, int) else {*eos_token_id}
        packed = model.reader.reading.packed
        self._memory = PackedMemory(model, self._room, share) if packed else OwnMemory(model)
        self.logits = torch.empty(0)
        """(conversations, vocabulary) of the last step, in the order of what it returned."""
        self.drawn = torch.empty(0, dtype=torch.int64)
        """(conversations,) what was drawn from them, end tokens as they are."""
        self._conversations: list[_Conversation] = []
        self._hidden = torch.empty(0)
        self._tokens = torch.empty(0, dtype=torch.int64)
        """(conversations,): what each has just written."""
        self._handles = count()

    def __len__(self) -> int:
        """Unfinished conversations."""
        return len(self._conversations)

    @torch.no_grad()
    def join(self, batch: Batch, sampling: Sequence[Sampling]) -> list[int]:
        """Prefill: reads the prompts of a batch. Refused, it changes nothing for those that are there.

        Args:
            batch: on the model's device.
            sampling: of every conversation, row by row, in order of the segments.

        Returns:
            A handle for every conversation, in the same order.

        Raises:
            RefusedError: another number of settings than of conversations, or what the model refuses.
        """
        owners = [batch.adapters[row] for row in last_positions(batch)[0].tolist()]
        if len(owners) != len(sampling):
            raise RefusedError(
                f"{len(sampling)} sampling settings for {len(owners)} conversations; give one for each"
            )
        return self._add(owners, sampling, self._memory.join(batch))

    @torch.no_grad()
    def admit(self, read: Prefilled, adapter: str | None, sampling: Sampling) -> int:
        """A row with one conversation whose prompt is read already, of a model whose conversations can share rows.

        Returns:
            Its handle.
        """
        assert isinstance(self._memory, PackedMemory), "others read prompts by themselves"
        self._memory.admit(read, [adapter])
        return self._add([adapter], [sampling], read.hidden)[0]

    @property
    def columns(self) -> int:
        """Tokens whose keys and values, or states, are kept."""
        return self._memory.columns

    def rearrange(self) -> None:
        """The bank has other finetunes than at the last step."""
        self._memory.keep(range(len(self)))

    def _add(self, owners: Sequence[str | None], sampling: Sequence[Sampling], hidden: Tensor) -> list[int]:
        new = [
            _Conversation(next(self._handles), owner, *self._own(each))
            for owner, each in zip(owners, sampling, strict=True)
        ]
        self._conversations += new
        nothing = torch.zeros(len(new), dtype=torch.int64, device=hidden.device)
        self._tokens = torch.cat([self._tokens, nothing]) if len(self._hidden) else nothing
        self._hidden = torch.cat([self._hidden, hidden]) if len(self._hidden) else hidden
        return [one.handle for one in new]

    def step(self) -> list[Step]:
        """One token for every unfinished conversation, and the forward for the next."""
        steps = self.write()
        self.advance()
        return steps

    @torch.no_grad()
    def write(self) -> list[Step]:
        """One token for every unfinished conversation; `advance` is to follow, before others join."""
        if not self._conversations:
            return []
        settings = [(one.sampling, one.generator) for one in self._conversations]
        with self._prepacked():
            self.logits = self._next_logits()
        tokens = self.drawn = sample(self.logits, *zip(*settings, strict=True))
        steps = [self._write(*pair) for pair in zip(self._conversations, tokens.tolist(), strict=True)]
        going_on = [number for number, step in enumerate(steps) if step.finish_reason is None]
        self._tokens = tokens
        self._keep(going_on)
        return steps

    @torch.no_grad()
    def advance(self) -> None:
        """The forward for the next tokens of those that go on."""
        if self._conversations:
            with self._prepacked():
                self._hidden = self._memory.advance(self._tokens)

    def _prepacked(self) -> AbstractContextManager[None]:
        return self.model.reader.prepacked.in_use(self.model.bank.layers.values())

    def _next_logits(self) -> Tensor:
        """(conversations, vocabulary); of fixed shapes where the room is fixed."""
        owners = [one.adapter for one in self._conversations]
        if not self._room.fixed:
            return self.model.logits(self._hidden, owners)
        each = zip(self._hidden.split(1), owners, strict=True)
        return torch.cat([self.model.logits(hidden, [owner]) for hidden, owner in each])

    def leave(self, conversation: int) -> None:
        """Ends a conversation early; nothing happens where it has ended by itself."""
        self._keep([n for n, one in enumerate(self._conversations) if one.handle != conversation])

    def _own(self, sampling: Sampling) -> tuple[Sampling, torch.Generator | None]:
        """Settings and the random stream that they begin."""
        if sampling.greedy:
            return sampling, None
        return sampling, torch.Generator(self.model.device).manual_seed(sampling.seed)

    def _write(self, conversation: _Conversation, token: int) -> Step:
        if token in self.end_ids:
            return Step(conversation.handle, NO_TOKEN, "stop")
        conversation.written += 1
        full = conversation.written >= conversation.sampling.max_new_tokens
        return Step(conversation.handle, token, "length" if full else None)

    def _keep(self, numbers: list[int]) -> None:
        if len(numbers) < len(self._conversations):
            self._conversations = [self._conversations[number] for number in numbers]
            self._hidden, self._tokens = self._hidden[numbers], self._tokens[numbers]
            self._memory.keep(numbers)


def generate(
    model: MultimodalModel,
    batch: Batch,
    eos_token_id: int,
    max_new_tokens: int = 32,
    sampling: Sequence[Sampling] | None = None,
) -> list[list[list[int]]]:
    """Answers every conversation of a batch; greedily, unless ``sampling`` has settings for each.

    Args:
        model: the model.
        batch: prompts, on the model's device.
        eos_token_id: ends an answer.
        max_new_tokens: longest answer, where ``sampling`` is None.
        sampling: of every conversation, row by row, in order of the segments.

    Returns:
        Per row and conversation the new token ids, without the end token.
    """
    rows = last_positions(batch)[0].tolist()
    decoder = Decoder(model, eos_token_id)
    handles = decoder.join(batch, [Sampling(max_new_tokens)] * len(rows) if sampling is None else sampling)
    answers: dict[int, list[int]] = {handle: [] for handle in handles}
    while decoder:
        for step in decoder.step():
            if step.token != NO_TOKEN:
                answers[step.conversation].append(step.token)
    grouped: list[list[list[int]]] = [[] for _ in range(len(batch.input_ids))]
    for row, handle in zip(rows, handles, strict=True):
        grouped[row].append(answers[handle])
    return grouped
