"""Free ports of the loop-back interface."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port that nobody listens on now; whoever is quick may still take it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
