"""Answers of the live engine for asyncio: piece by piece, in time, and cancelled with whoever asked for them."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from mmpeft.inference.live import LiveEngine
from mmpeft.inference.requests import Completion, Request
from mmpeft.inference.tickets import Event, FailedError, Piece
from mmpeft.serving.refusals import HttpError, of_engine, of_fault, too_late

Result = TypeVar("Result")


class GoneError(Exception):
    """The client has closed its connection; there is nobody to answer."""


class Deadline:
    """Until when a request's answer must be whole; what it waits for before the engine knows of it counts too.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @asynccontextmanager
    async def kept(self):
        """Raises:
        HttpError: 504, what is inside is not done by then.
        """
        try:
            async with asyncio.timeout(self._end - time.monotonic()):
                yield
        except TimeoutError:
            raise too_late(self.seconds) from None


class Answer:
    """One request at the engine. What it has written waits here for a slow reader, at most the longest answer; the
    batch waits for nobody.

    Args:
        live: the engine.
        request: written or ranked.
        logprobs: as of `LiveEngine.submit`.
        deadline: of the whole answer.

    Raises:
        RefusedError: the engine does not take it in.
    """

    def __init__(self, live: LiveEngine, request: Request, logprobs: int | None, deadline: Deadline):
        self._deadline = deadline
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.ticket = live.submit(request, logprobs=logprobs, on_event=tell)
        self._first: Event | None = None

    async def begin(self) -> None:
        """Waits for the first token.

        Raises:
            HttpError: the engine refuses it.
        """
        self._first = await self._next()
        if isinstance(self._first, Completion):
            _require_answer(self._first)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is written, piece by piece; what came while the reader was slow as one.

        Raises:
            HttpError: it ends without an answer.
        """
        while True:
            event = self._first or await self._next()
            self._first = None
            waiting: list[Piece] = []
            while isinstance(event, Piece):
                waiting.append(event)
                event = None if self._events.empty() else self._events.get_nowait()
            if waiting:
                yield _together(waiting)
            if event is not None:
                _require_answer(event)
                return

    async def whole(self) -> tuple[Completion, Piece]:
        """The completion, and all that was written as one piece."""
        written = [piece async for piece in self.pieces()]
        completion = self.ticket.completion
        assert completion is not None, "the pieces end with it"
        return completion, _together(written)

    def cancel(self) -> None:
        """Its row is free within a step; nothing happens where it has ended."""
        self.ticket.cancel()

    async def _next(self) -> Event:
        async with self._deadline.kept():
            return await self._events.get()


async def unless_gone(client: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled when the client closes its connection.

    Raises:
        GoneError: it did.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(client))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def _left(client: HttpRequest) -> None:
    while (await client.receive())["type"] != "http.disconnect":
        pass


def _together(pieces: list[Piece]) -> Piece:
    told = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return Piece(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [each for own in told for each in own] if told else None,
    )


def _require_answer(completion: Event) -> None:
    refusal = completion.refusal if isinstance(completion, Completion) else None
    if isinstance(refusal, FailedError):
        failed = of_fault()
        raise HttpError(500, f"{refusal}", failed.kind, "model_failed")
    if refusal is not None:
        raise of_engine(refusal)
