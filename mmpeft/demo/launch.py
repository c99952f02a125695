"""`mmpeft demo`: the page of loaded runs or of a server, until it is told to stop."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack

from mmpeft.demo.of_runs import OfRuns
from mmpeft.demo.of_server import OfServer
from mmpeft.demo.page import LAUNCH, build
from mmpeft.errors import RefusedError
from mmpeft.serving.address import check_address
from mmpeft.serving.client import Server


def launch(runs: Sequence[str], server: Server | None, host: str, port: int, share: bool) -> None:
    """Loads and serves; the arguments are those of `mmpeft demo`.

    Raises:
        RefusedError: a run or the server cannot be asked, or the port is taken.
    """
    served = OfServer(server) if server else None
    check_address(host, port)  # before a run is loaded
    with ExitStack() as stack:
        source = served or stack.enter_context(OfRuns(runs))
        if share or host not in ("127.0.0.1", "localhost", "::1"):
            print(
                "warning: whoever reaches this address can use the model; there is no login", file=sys.stderr
            )
        try:
            build(source).launch(server_name=host, server_port=port, share=share, **LAUNCH)
        except OSError as error:
            if "empty port" not in str(error):
                raise
            raise RefusedError(f"port {port} of {host} is taken; name another with --port") from None
