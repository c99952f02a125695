"""uvicorn's HTTP protocol, which closes connections whose request does not come, or comes a byte a second."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """Headers must be there within `seconds` of a connection's start, or of its last answer."""

    seconds = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()

    def on_response_complete(self) -> None:
        self._start()
        super().on_response_complete()

    def _start(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self.seconds, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol(seconds: float) -> type[PatientProtocol]:
    """The class with its time."""
    return type("Protocol", (PatientProtocol,), {"seconds": seconds})
