"""gRPC in a front end: the listening socket, its connections, which method a call means.

HTTP/2 is spoken by `h2_connection` in the front end's own loop and thread, beside HTTP/1.1: requests
go into the same blocks and rings, and while nobody speaks gRPC nothing of it runs.

Invariants
 1. At most CONNECTIONS_MAX connections are open; the next one is told so and closed.
 2. When the front end drains, clients are told to go (GOAWAY); calls that came before are answered.

Called by the front end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from overcommit.server import grpc_wire, hpack
from overcommit.server.grpc_answers import Answers
from overcommit.server.grpc_call import Call, OtherCall, Refused
from overcommit.server.grpc_infer_calls import InferCall, StreamCall
from overcommit.server.grpc_methods import Methods
from overcommit.server.grpc_requests import Requests
from overcommit.server.grpc_wire import CallFailed, CallHead, Status
from overcommit.server.h2_connection import Connection
from overcommit.server.limits import CONNECTIONS_MAX, DRAIN_GRACE_S

if TYPE_CHECKING:
    import ssl

    from overcommit.server.frontend import FrontEnd

SERVICE = "/inference.GRPCInferenceService/"
_INFER = SERVICE + "ModelInfer"
_STREAM = SERVICE + "ModelStreamInfer"


class GrpcServer:
    """The gRPC side of one front end."""

    def __init__(self, front: FrontEnd) -> None:
        self.front = front
        self.requests = Requests()
        self.answers = Answers()
        self.connections: set[Connection] = set()
        self._methods = Methods(front).by_path(SERVICE)
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connect, sock=listener, ssl=tls)

    def _connect(self) -> Connection:
        is_full = len(self.connections) >= CONNECTIONS_MAX
        return Connection(self.front, self, self.connections, is_full=is_full)

    def check_times(self, now_s: float) -> None:
        """Once a second."""
        for connection in list(self.connections):
            connection.check_times(now_s)

    def drain(self) -> None:
        """Take no new connections, and send clients away."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.leave(now=False)
        # Calls that were on their way when the client heard of it are answered.
        asyncio.get_running_loop().call_later(DRAIN_GRACE_S, self._leave)

    def _leave(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.leave(now=True)

    # --- calls ----------------------------------------------------------------------------------
    def read_head(self, headers: Sequence[hpack.Header] | None) -> CallHead:
        """Read the headers of a call; None: they are too long."""
        return grpc_wire.TOO_LONG if headers is None else grpc_wire.read_head(headers)

    def open(self, connection: Connection, number: int, head: CallHead) -> Call:
        """Make a call of its headers; one that cannot be is refused already."""
        if head.fault is not None:
            return self._refuse(connection, number, head, head.fault)
        if head.path == _INFER:
            return InferCall(connection, number, self, head)
        if head.path == _STREAM:
            return StreamCall(connection, number, self, head)
        handler = self._methods.get(head.path)
        if handler is None:
            fault = CallFailed(Status.UNIMPLEMENTED, f"there is no method {head.path}")
            return self._refuse(connection, number, head, fault)
        return OtherCall(connection, number, self, head, handler)

    def _refuse(
        self, connection: Connection, number: int, head: CallHead, failure: CallFailed
    ) -> Call:
        call = Refused(connection, number, self, head)
        call.refuse(failure)
        return call
