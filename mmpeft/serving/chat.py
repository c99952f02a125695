"""/v1/chat/completions: what OpenAI's clients send and read, whole or as a stream."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmpeft.errors import RefusedError
from mmpeft.inference.requests import Completion
from mmpeft.inference.sampling import Sampling
from mmpeft.inference.tickets import Piece, TokenLogprob
from mmpeft.serving.answers import Answer
from mmpeft.serving.limits import Limits
from mmpeft.serving.refusals import HttpError, invalid, require_at_most
from mmpeft.serving.schemas import INT64, ChatRequest

DONE = "[DONE]"


def samplings(asked: ChatRequest, default_tokens: int, limits: Limits) -> list[Sampling]:
    """The settings of each of the ``n`` answers: their seeds count up from the request's, or from a random one.

    Raises:
        HttpError: more than the server allows, or fields that contradict each other.
    """
    tokens = asked.max_completion_tokens or asked.max_tokens
    if asked.max_tokens not in (None, tokens):
        raise invalid("max_tokens", "max_tokens and max_completion_tokens differ; send one of them")
    name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    require_at_most(tokens or 1, limits.new_tokens, name, "limits.new_tokens")
    number = asked.n or 1
    require_at_most(number, limits.answers, "n", "limits.answers")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options", "stream_options needs stream: true")
    first = secrets.randbelow(INT64) if asked.seed is None else asked.seed
    stop = asked.stop or ()
    return [
        Sampling(
            max_new_tokens=tokens or min(default_tokens, limits.new_tokens),
            temperature=asked.temperature or 0.0,
            top_k=None if asked.top_k in (None, -1, 0) else asked.top_k,
            top_p=asked.top_p,
            seed=(first + place + INT64 + 1) % (2 * INT64 + 2) - INT64 - 1,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
        for place in range(number)
    ]


def logprobs_of(asked: ChatRequest) -> int | None:
    """How many likely tokens to tell at every place; None for no log-probabilities."""
    return (asked.top_logprobs or 0) if asked.logprobs else None


@dataclass
class Reply:
    """The answers of one chat completion, as OpenAI writes them."""

    asked: ChatRequest
    answers: Sequence[Answer]
    tokenizer: Any
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The body of one that is not streamed."""
        done = await asyncio.gather(*(answer.whole() for answer in self.answers))
        choices = [self._choice(index, *own) for index, own in enumerate(done)]
        return self._named("chat.completion") | {"choices": choices, "usage": self._usage()}

    async def begin(self) -> None:
        """Waits until every answer has begun, while its errors can still have a status of their own."""
        await asyncio.gather(*(answer.begin() for answer in self.answers))

    async def events(self) -> AsyncIterator[str]:
        """The data of the stream's events; an error in the middle is the last of them."""
        try:
            async for chunk in self._chunks():
                yield json.dumps(chunk, ensure_ascii=False)
            yield DONE
        except HttpError as refusal:
            yield json.dumps(refusal.body)

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        for index in range(len(self.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in _merged([answer.pieces() for answer in self.answers]):
            if piece is None:
                yield self._chunk(index, {}, finish=_finish(self.answers[index].ticket.completion))
            elif piece.text or piece.logprobs:
                yield self._chunk(index, {"content": piece.text}, self._logprobs(piece))
        if self._tells_usage:
            yield self._named("chat.completion.chunk") | {"choices": [], "usage": self._usage()}

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._tells_usage else {}
        return self._named("chat.completion.chunk") | {"choices": [choice]} | usage

    @property
    def _tells_usage(self) -> bool:
        options = self.asked.stream_options
        return options is not None and bool(options.include_usage)

    def _choice(self, index: int, completion: Completion, written: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(written),
            "finish_reason": _finish(completion),
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        return {"content": [self._token(own) for own in piece.logprobs or []], "refusal": None}

    def _token(self, own: TokenLogprob) -> dict[str, Any]:
        top = [self._likely(*each) for each in own.top[: self.asked.top_logprobs or 0]]
        return self._likely(own.token, own.logprob) | {"top_logprobs": top}

    def _likely(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        whole = (
            "\N{REPLACEMENT CHARACTER}" not in text
        )  # else a part of a character, whose bytes are not known
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _named(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}

    def _usage(self) -> dict[str, Any]:
        written = sum(answer.ticket.written_tokens for answer in self.answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
            "prompt_tokens_details": {"cached_tokens": self.answers[0].ticket.cached_tokens},
        }


def _finish(completion: Completion | None) -> str:
    if completion is None:
        raise RefusedError("an answer ended without completion")
    return completion.finish_reason


async def _merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece | None]]:
    """(number of the stream, its piece; None at its end) as they come."""

    async def one(stream: AsyncIterator[Piece]) -> Piece | None:
        return await anext(stream, None)

    coming = {asyncio.ensure_future(one(stream)): index for index, stream in enumerate(streams)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=coming.__getitem__):
                index, piece = coming.pop(task), task.result()
                if piece is not None:
                    coming[asyncio.ensure_future(one(streams[index]))] = index
                yield index, piece
    finally:
        for task in coming:
            task.cancel()
