"""`mmpeft serve`: a run, loaded and answering until it is told to stop."""

import signal
import sys
from collections.abc import Callable
from typing import Any

import uvicorn

from mmpeft.errors import RefusedError
from mmpeft.inference.live import LiveEngine
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.inference.vlm import load
from mmpeft.serving.address import check_address
from mmpeft.serving.app import make_app
from mmpeft.serving.finetunes import named_folders
from mmpeft.serving.keys import Keys, read_keys
from mmpeft.serving.limits import Limits
from mmpeft.serving.protocol import protocol
from mmpeft.serving.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_open(host: str, keys: str | None) -> None:
    """Raises:
    RefusedError: everybody in the network could ask.
    """
    if keys is None and host not in LOOPBACK:
        raise RefusedError(
            f"--host {host} is open to others, and there are no keys; give a file with --keys, or listen on 127.0.0.1"
        )


def serve_run(
    run: str,
    adapters: list[str],
    host: str,
    port: int,
    keys: str | None,
    limits: Limits,
    engine: LiveSettings,
    device: str = "auto",
) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers what is under way; the arguments are those of `mmpeft serve`.

    Raises:
        RefusedError: the run, a finetune or the keys cannot be used.
    """
    check_open(host, keys)
    check_address(host, port)
    known = Keys() if keys is None else read_keys(keys)
    vlm = load(run, device)
    folders = list(named_folders(adapters, vlm.manifest))
    with LiveEngine(vlm.engine, engine) as live:
        for name, folder in folders:
            if name in live.names():
                raise RefusedError(f"{folder}: there is a finetune {name!r} already; rename the folder")
            live.load(name, folder)
        service = Service(vlm, live, limits, known)
        try:
            _run_until_told(make_server(service, host, port))
        finally:
            service.close()


def make_server(
    service: Service, host: str, port: int, ready: Callable[[str], None] | None = None
) -> uvicorn.Server:
    """The HTTP server of a service.

    Args:
        ready: gets its address once it listens; by default it is printed.
    """
    limits = service.limits
    config = uvicorn.Config(
        make_app(service),
        host=host,
        port=port,
        http=protocol(limits.header_seconds),
        ws="none",
        lifespan="off",
        log_level="warning",
        timeout_keep_alive=int(limits.header_seconds) or 1,
        timeout_graceful_shutdown=int(limits.drain_seconds) or 1,
        h11_max_incomplete_event_size=2**16,
        server_header=False,
    )
    return _Server(config, ready or _tell)


class _Server(uvicorn.Server):
    """Says where it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]):
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self.ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")


def _tell(address: str) -> None:
    print(f"serving at {address}/v1", file=sys.stderr, flush=True)


def _run_until_told(server: uvicorn.Server) -> None:
    """uvicorn hands the signal that ended it on to the handler of before: that one has nothing left to do."""

    def stop(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run()
