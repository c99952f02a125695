"""The JSON of a body, which names every field once: of two of one name a reader takes the last, and nobody is told."""

import json
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute


class OnceRoute(APIRoute):
    """A route whose bodies are read so."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def read_once(client: Request) -> Response:
            return await handler(_OnceRequest(client.scope, client.receive))

        return read_once


class _OnceRequest(Request):
    async def json(self) -> Any:
        return json.loads(await self.body(), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises:
    HTTPException: 400; FastAPI lets no other error through.
    """
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise HTTPException(400, f"The body has {name!r} twice in one object; name each field once")
        fields[name] = value
    return fields
