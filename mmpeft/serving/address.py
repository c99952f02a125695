"""The address to listen at, which is looked at before a model is loaded."""

import errno
import socket

from mmpeft.errors import RefusedError


def check_address(host: str, port: int) -> None:
    """Raises:
    RefusedError: nobody can listen there.
    """
    if not 0 <= port < 2**16:
        raise RefusedError(f"port {port} is none; name one below {2**16} with --port")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as own:
            # as servers do: the port of one that has just ended is free
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RefusedError(f"port {port} of {host} is taken; name another with --port") from None
        raise RefusedError(
            f"nothing can listen at {host}, port {port} ({error.strerror or error}); name an address of this machine "
            "with --host, such as 127.0.0.1, and a port with --port"
        ) from None
