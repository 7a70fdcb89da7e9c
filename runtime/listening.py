"""Listening sockets, one for each front end, on one port: the kernel spreads connections over them.

The supervisor binds and keeps them, so that what queues at a front end that died is served by its
successor.  Called by the supervisor.
"""

from __future__ import annotations

import socket

from overcommit.runtime.config import LISTEN_BACKLOG
from overcommit.runtime.errors import ConfigurationError


def listen(host: str, port: int, count: int, flag: str) -> tuple[list[int], int]:
    """Bind `count` sockets to a port (0: a free one); return their descriptors and the port.

    Raises ConfigurationError, which names `flag`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets: list[socket.socket] = []
    try:
        if port:
            # With SO_REUSEPORT a second server would silently share the port: look first.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        for _ in range(count):
            listener = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.setblocking(False)
            listener.bind((host, port))
            listener.listen(LISTEN_BACKLOG)
            port = listener.getsockname()[1]
    except OSError as error:
        for listener in sockets:
            listener.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another {flag} or --host"
        ) from error
    return [listener.detach() for listener in sockets], port
