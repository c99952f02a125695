"""Server-sent events: a stream that ends with its client, and whose answers end with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi.responses import StreamingResponse


class EventStream(StreamingResponse):
    """``data: ...`` and an empty line for every event.

    Args:
        events: the data of each.
        answers: what is given up when the stream has ended, however it did.
        seconds: that a client may take to read the next event.
    """

    def __init__(self, events: AsyncIterator[str], answers: AsyncExitStack, seconds: float):
        super().__init__(
            (f"data: {event}\n\n" async for event in events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._answers, self._seconds = answers, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def in_time(event: Any) -> None:
            async with asyncio.timeout(self._seconds):
                await send(event)

        try:
            await super().__call__(scope, receive, in_time)
        except* TimeoutError:  # it reads no more; the connection is closed
            pass
        finally:
            await self._answers.aclose()
