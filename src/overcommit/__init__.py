"""An inference server that serves far more models than fit in GPU memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overcommit.server.clients.aio import AsyncClient
    from overcommit.server.clients.sync import Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    # When they are asked for: every process imports this package, and few of them are clients.
    if name == "Client":
        from overcommit.server.clients.sync import Client

        return Client
    if name == "AsyncClient":
        from overcommit.server.clients.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module 'overcommit' has no attribute '{name}'")
