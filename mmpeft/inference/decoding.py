"""Decoding with continuous batching: conversations join and leave while others are in the middle of their answers.

Every unfinished conversation writes one token a step. Those of one packed row share the row's prefix in the cache;
each of their tokens gets a column of its own, which sees the prefix and its own conversation.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.data.batch import PADDING, Batch
from mmpeft.errors import RefusedError
from mmpeft.inference.attention import attention_for_decoding
from mmpeft.inference.kv_cache import KVCache
from mmpeft.inference.prefill import prefill
from mmpeft.inference.sampling import Sampling, sample
from mmpeft.models.multimodal import MultimodalModel, additive, last_positions, sees

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
    row: int
    segment: int
    position: int
    """Of its last token."""
    sampling: Sampling
    generator: torch.Generator | None
    written: int = 0


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
    """(rows, 1, queries, capacity), added to the scores"""
    routing: tuple[dict[str, Tensor], dict[str, bool]]
    """Whose rows they are, as the bank was routed for them"""


class Decoder:
    """The conversations that one model is answering.

    Args:
        model: in eval mode.
        eos_token_id: ends an answer; of several each does.
    """

    def __init__(self, model: MultimodalModel, eos_token_id: int | Collection[int]):
        self.model = model
        self.end_ids = {eos_token_id} if isinstance(eos_token_id, int) else {*eos_token_id}
        self._cache = KVCache()
        self._adapters: list[str | None] = []
        self._conversations: list[_Conversation] = []
        self._hidden = torch.empty(0)
        self._layout: _Layout | None = None
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
        owners = last_positions(batch)[0].tolist()
        if len(owners) != len(sampling):
            raise RefusedError(
                f"{len(sampling)} sampling settings for {len(owners)} conversations; give one for each"
            )
        prefilled = prefill(self.model, batch)
        self._drop_rows()
        handles = [next(self._handles) for _ in owners]
        members = {row: [n for n, owner in enumerate(owners) if owner == row] for row in set(owners)}
        for part in prefilled:
            numbers = [number for row in part.rows for number in members.get(row, ())]
            places = {row: self._cache.num_rows + place for place, row in enumerate(part.rows)}
            for number, position in zip(numbers, part.positions, strict=True):
                row = owners[number]
                segment = 1 + members[row].index(number)
                self._conversations.append(
                    _Conversation(
                        handles[number], places[row], segment, position, *self._own(sampling[number])
                    )
                )
            self._cache.insert(part.cache, part.segments)
            self._adapters += [batch.adapters[row] for row in part.rows]
        self._hidden = torch.cat(
            [*([self._hidden] if len(self._hidden) else []), *(p.hidden for p in prefilled)]
        )
        self._layout = None
        return handles

    @torch.no_grad()
    def step(self) -> list[Step]:
        """One token for every unfinished conversation, and the forward for the next."""
        if not self._conversations:
            return []
        settings = [(one.sampling, one.generator) for one in self._conversations]
        tokens = sample(self.model.logits(self._hidden), *zip(*settings, strict=True))
        steps = [self._write(*pair) for pair in zip(self._conversations, tokens.tolist(), strict=True)]
        going_on = [number for number, step in enumerate(steps) if step.finish_reason is None]
        self._keep(going_on)
        if going_on:
            self._hidden = self._decode_one_token(tokens if len(going_on) == len(steps) else tokens[going_on])
        return steps

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
            self._hidden = self._hidden[numbers]
            self._layout = None

    def _decode_one_token(self, tokens: Tensor) -> Tensor:
        """(conversations,) tokens just written -> (conversations, dim), from which the next ones' logits come."""
        layout = self._layout = self._layout or self._arrange()
        routing = self.model.bank.routing
        routing.slots, routing.uniform = layout.routing  # another decoder may have stepped in between
        width = self._cache.extend(layout.counts)
        self.model.check_window(max(self._cache.lengths))
        if (missing := self._cache.capacity - layout.mask.shape[-1]) > 0:
            layout.mask = nn.functional.pad(
                layout.mask, (0, missing), value=torch.finfo(self.model.dtype).min
            )
        self._cache.write_next(layout.rows, layout.queries, layout.columns, layout.segments)
        layout.mask[layout.rows, 0, layout.queries, layout.columns] = 0
        ids = torch.zeros_like(layout.positions)
        ids[layout.rows, layout.queries] = tokens
        embeds = self.model.language_model.get_input_embeddings()(ids)
        with attention_for_decoding(self.model.language_model.get_decoder()):
            hidden = self.model.decode(embeds, layout.mask[..., :width], layout.positions, self._cache)
        layout.positions += 1
        layout.columns += layout.strides
        for conversation in self._conversations:
            conversation.position += 1
        return hidden[layout.rows, layout.queries]

    def _arrange(self) -> _Layout:
        """Lets rows without conversations leave and gives every conversation its place among those of its row."""
        self._drop_rows()
        self.model.bank.route(self._adapters)
        counts: Counter[int] = Counter()
        places: list[tuple[int, ...]] = []
        for one in self._conversations:
            number = counts[one.row]
            places.append(
                (one.row, number, one.segment, self._cache.lengths[one.row] + number, one.position + 1)
            )
            counts[one.row] += 1
        device = self.model.device
        rows, queries, segments, columns, positions = torch.tensor(places, device=device).unbind(1)
        num_rows, num_queries = len(self._adapters), max(counts.values())

        def per_query(values: Tensor, padding: int) -> Tensor:
            out = values.new_full((num_rows, num_queries), padding)
            out[rows, queries] = values
            return out

        seen = sees(per_query(segments, PADDING), self._cache.segments[:num_rows])
        return _Layout(
            rows,
            queries,
            segments,
            [counts[row] for row in range(num_rows)],
            columns.clone(),
            torch.bincount(rows)[rows],
            per_query(positions, 0),
            additive(seen[:, None], self.model.dtype),
            (self.model.bank.routing.slots, self.model.bank.routing.uniform),
        )

    def _drop_rows(self) -> None:
        busy = {one.row for one in self._conversations}
        for row in reversed(range(self._cache.num_rows)):
            if row in busy:
                continue
            last = self._cache.num_rows - 1
            self._cache.remove(row)
            self._adapters[row] = self._adapters[last]
            self._adapters.pop()
            for one in self._conversations:
                if one.row == last:
                    one.row = row


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
