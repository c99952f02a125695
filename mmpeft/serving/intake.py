"""What is asked of a request before it is understood: a key, a place, and a body of bounded size and time."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from mmpeft.serving.keys import Keys
from mmpeft.serving.limits import Limits
from mmpeft.serving.refusals import HttpError, overloaded

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
API = "/v1/"
CLOSE = {"Connection": "close"}
"""Of an answer that leaves a part of the body unread."""


class Intake:
    """ASGI middleware: hands a request of the API on with its `Tenant`, once its whole body is there.

    A request whose body is still coming takes no place from those that are whole, and of more than ``most`` such bodies
    the one that has been coming longest makes way: slow clients keep nobody out.

    Args:
        app: gets the requests.
        keys: of tenants.
        limits: of the server.
        most: requests with a body that are under way at the same time, and bodies that are coming beside them.
    """

    def __init__(self, app: App, keys: Keys, limits: Limits, most: int):
        self.app, self.keys, self.limits, self.most = app, keys, limits, most
        self.under_way = 0
        self.coming: dict[asyncio.Timeout, None] = {}
        """The bodies that are not there yet, the oldest first, each by its deadline."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(API):
            return await self.app(scope, receive, send)
        try:
            authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            scope.setdefault("state", {})["tenant"] = self.keys.tenant(authorization)
            if scope["method"] in ("GET", "HEAD"):
                return await self.app(scope, receive, send)
            self._require_place()
            body = await self._body(scope, receive)
            if body is None:
                return
            self._require_place()
            self.under_way += 1
            try:
                await self.app(scope, _replay(body, receive), send)
            finally:
                self.under_way -= 1
        except HttpError as refusal:
            await _send(refusal, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None of a client that has gone."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self.limits.body_bytes:
            raise self._too_large()
        body = bytearray()
        async with self._patience():
            while True:
                event = await receive()
                if event["type"] == "http.disconnect":
                    return None
                body += event.get("body", b"")
                if len(body) > self.limits.body_bytes:
                    raise self._too_large()
                if not event.get("more_body", False):
                    return bytes(body)

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """Inside, a body is waited for as long as it may take and there is room.

        Raises:
            HttpError: 408, it was not there by then.
        """
        deadline = asyncio.timeout(self.limits.body_seconds)
        told = f"The body was not there within {self.limits.body_seconds:g} s (limits.body_seconds)"
        try:
            async with deadline:
                self._make_way()
                self.coming[deadline] = None
                yield
        except TimeoutError:
            if deadline not in self.coming:
                told = f"The body made way for {self.most} that began to come after it; send it faster, or again later"
            raise HttpError(408, told, "timeout_error", "timeout", headers=CLOSE) from None
        finally:
            self.coming.pop(deadline, None)

    def _make_way(self) -> None:
        """Room for one more body: where there is none, the oldest is waited for no longer."""
        if len(self.coming) < self.most:
            return
        oldest = next(iter(self.coming))
        if not oldest.expired():  # else it is about to go by itself
            del self.coming[oldest]
            oldest.reschedule(0)

    def _require_place(self) -> None:
        if self.under_way >= self.most:
            raise overloaded(1)

    def _too_large(self) -> HttpError:
        return HttpError(
            413,
            f"The body is larger than {self.limits.body_mb:g} MiB (limits.body_mb); send smaller or fewer images",
            code="body_too_large",
            headers=CLOSE,
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that has the body at once, and then what comes after it."""
    told = False

    async def again() -> Event:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _send(refusal: HttpError, send: Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
