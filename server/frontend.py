"""A front end: the process that speaks HTTP, owns payload memory and talks to workers by rings.

One thread, uvloop.  Two readers besides the sockets: the doorbell (completions) and the control
socket (links, routes, answers of the supervisor).

    STARTING --first complete Routes--> SERVING --Drain--> DRAINING --nothing in flight--> exit 0

Invariants
 1. It sleeps only with every completion ring armed and empty.
 2. While draining every response says `Connection: close`, and a connection that is idle is closed
    only after a grace, so that a request that was already on its way is still answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import mmap
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from fastapi import Response

from overcommit.runtime import _shm
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.errors import DeadlineExceeded, Overloaded, PayloadTooLarge, ProtocolError
from overcommit.runtime.front_end_messages import (
    Admin,
    AdminReply,
    AskUsed,
    Counters,
    Homes,
    LinkBroken,
    Pressure,
    RegionsChanged,
    Rehearse,
    Route,
    Routes,
    SeatNews,
    TellCounts,
)
from overcommit.runtime.messages import Drain, LinkDown, LinkUp, LogLevel, Ready, Start, Stop
from overcommit.server import tls
from overcommit.server.app import make_app
from overcommit.server.dispatch import Dispatch
from overcommit.server.heads import Heads
from overcommit.server.inference import Prepared
from overcommit.server.limits import (
    ADMIN_PENDING_MAX,
    ADMIN_TIMEOUT_S,
    COUNTERS_MODELS_MAX,
    COUNTERS_PERIOD_S,
    DRAIN_GRACE_S,
    DRAIN_ROUNDS_MAX,
    LEASES_PERIOD_S,
    SWEEP_S,
)
from overcommit.server.parcels import populate
from overcommit.server.plans import Plans
from overcommit.server.protocol import HotProtocol, protocol_class
from overcommit.server.regions import Regions
from overcommit.server.rehearsing import rehearse
from overcommit.server.routing import RouteTable
from overcommit.server.uses import Uses
from overcommit.server.worker_link import incarnation_of

if TYPE_CHECKING:
    import ssl

    from overcommit.server.grpc_server import GrpcServer

log = logging.getLogger("overcommit.front_end")

_COUNTED = ("metrics", "model", "models", "statistics", "status")


class FrontEnd:
    """One incarnation of a front end."""

    def __init__(self, control: ControlSocket, start: Start, fds: dict[str, int]) -> None:
        self.settings = start.settings
        self._timeout_ns = start.settings.request_timeout_ms * 1_000_000
        self.table = RouteTable()
        self.heads = Heads()
        self.regions = Regions(is_allowed=start.settings.client_shared_memory)
        self.plans = Plans(self.regions)
        self.bodies_bytes = 0  # of long bodies that are being received
        self.clock_s = time.monotonic()  # as of the last sweep
        self.is_draining = False
        self.thrashing = ""  # what is wrong with the memory, for health
        self._control = control
        self._bell = fds["doorbell"]
        self._listener = socket.socket(fileno=fds["listen"])
        self._grpc_listener = socket.socket(fileno=fds["grpc"]) if "grpc" in fds else None
        self._grpc: GrpcServer | None = None
        nbytes = start.settings.payload_bytes
        self._ingress = mmap.mmap(fds["ingress"], nbytes)
        egress = mmap.mmap(fds["egress"], nbytes, prot=mmap.PROT_READ)
        for name in ("ingress", "egress"):
            os.close(fds[name])
        call_soon = asyncio.get_running_loop().call_soon
        self.regions.look = self.on_control
        self.plans.is_split = self.table.is_split
        self.dispatch = Dispatch(
            *(start.seat, start.epoch, self._ingress, egress, call_soon),
            seats=start.settings.workers,
        )
        self.dispatch.on_broken = self._tell_of_broken
        self.uses = Uses(self.dispatch.pending)
        self._routes_changed = asyncio.Event()
        self._asked: dict[int, tuple[asyncio.Future[tuple[int, bytes]], list[bytes]]] = {}
        self._ask_id = 0
        self._is_ready_sent = False
        self._rehearsals: set[asyncio.Task[None]] = set()
        self._drain_task: asyncio.Task[None] | None = None
        self._server: uvicorn.Server | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served: routes known, a worker linked, not draining."""
        return self.table.is_complete and bool(self.dispatch.links) and not self.is_draining

    # --- routes ---------------------------------------------------------------------------------
    def find(self, name: str, version: str | None) -> Route | None:
        """Return the route that is meant; None: its image is being made.  Raises as the table."""
        return self.table.find_usable(name, version)

    async def wait_for_route(self, name: str, version: str | None) -> Route:
        """Return the route as soon as it serves.  Raises as `find`, and DeadlineExceeded."""
        deadline_s = time.monotonic() + self.settings.request_timeout_ms / 1000
        while (route := self.find(name, version)) is None:
            packing = self.table.find(name, version)
            self._control.send(Admin(id=0, operation="ensure", arguments={"slot": packing.slot}))
            self._routes_changed.clear()
            try:
                left_s = deadline_s - time.monotonic()
                await asyncio.wait_for(self._routes_changed.wait(), left_s)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"model '{name}': its weight image is still being made; try again later, or "
                    f"run `overcommit pack` before serving",
                    retry_after_s=10,
                ) from None
        return route

    def timeout_ns(self, prepared: Prepared) -> int:
        """Time that a request has: its own `timeout`, the model's, the server's; the least."""
        limit_ns = prepared.limit_ns
        return min(self._timeout_ns, limit_ns) if limit_ns else self._timeout_ns

    # --- the supervisor -------------------------------------------------------------------------
    async def ask(self, operation: str, **arguments: str | int | bool) -> Response:
        """Have the supervisor answer.  Raises Overloaded, PayloadTooLarge, DeadlineExceeded."""
        if len(self._asked) >= ADMIN_PENDING_MAX:
            raise Overloaded("too many administrative requests wait; try again", retry_after_s=1)
        self._ask_id += 1
        future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._asked[self._ask_id] = (future, [])
        ask_id = self._ask_id
        if operation in _COUNTED:
            self.send_counters()
        try:
            self._control.send(Admin(id=ask_id, operation=operation, arguments=dict(arguments)))
            status, body = await asyncio.wait_for(future, ADMIN_TIMEOUT_S)
        except ProtocolError as error:
            raise PayloadTooLarge(f"'{operation}' asks too much at once: {error}") from error
        except TimeoutError:
            raise DeadlineExceeded(f"'{operation}' took over {ADMIN_TIMEOUT_S:.0f} s") from None
        finally:
            self._asked.pop(ask_id, None)
        text = operation == "metrics" and status == 200
        kind = "text/plain; version=0.0.4; charset=utf-8" if text else "application/json"
        return Response(body, status, media_type=kind)

    def send_counters(self, told: int = 0) -> None:
        """Tell the supervisor our totals, and what was counted for each model since the last time.

        `told`: the question that this answers, with the last message.
        """
        dispatch = self.dispatch
        while True:
            models, batches = dispatch.tallies.take(COUNTERS_MODELS_MAX)
            self._control.send(
                Counters(
                    requests=dispatch.requests,
                    errors=dispatch.errors,
                    in_flight=len(dispatch.pending),
                    blocks_used=dispatch.parcels.blocks_used,
                    late_completions=dispatch.late,
                    retries=dispatch.retried,
                    models=models,
                    batches=batches,
                    told=0 if dispatch.tallies else told,
                )
            )
            if not dispatch.tallies:
                return

    def on_control(self) -> None:
        """Handle everything that the supervisor has said."""
        while True:
            try:
                received = self._control.try_receive()
            except EOFError:
                os._exit(0)  # the supervisor is gone, and so are we
            if received is None:
                return
            message, fds = received
            if isinstance(message, Routes):
                self.table.apply(message)
                self.plans.forget_names()
                self.plans.labels.forget()
                self._routes_changed.set()
                if self.table.is_complete and not self._is_ready_sent:
                    self._is_ready_sent = True
                    self._control.send(Ready(pid=os.getpid()))
            elif isinstance(message, LinkUp):
                self.dispatch.link_up(message, fds)
                self.on_bell()
            elif isinstance(message, LinkDown):
                self.dispatch.link_down(message.seat, message.epoch)
                self.on_bell()
            elif isinstance(message, Homes):
                self.dispatch.spread(message.homes)
                self.on_bell()
            elif isinstance(message, SeatNews):
                self.dispatch.hear(message)
                self.on_bell()
            elif isinstance(message, AdminReply):
                self._on_reply(message)
            elif isinstance(message, Pressure):
                self.thrashing = message.thrashing
            elif isinstance(message, RegionsChanged):
                self.regions.apply(message)
            elif isinstance(message, TellCounts):
                self.send_counters(message.id)
            elif isinstance(message, AskUsed):
                self._control.send(self.uses.answer(message))
            elif isinstance(message, Rehearse):
                task = asyncio.get_running_loop().create_task(self._rehearse(message.route))
                self._rehearsals.add(task)
                task.add_done_callback(self._rehearsals.discard)
            elif isinstance(message, LogLevel):
                logging.getLogger().setLevel(message.level)
            elif isinstance(message, Drain):
                self._drain_task = asyncio.get_running_loop().create_task(
                    self._drain(message.timeout_s)
                )
            elif isinstance(message, Stop):
                os._exit(0)

    async def _rehearse(self, route: Route) -> None:
        self._control.send(await rehearse(self, route))

    def _on_reply(self, message: AdminReply) -> None:
        asked = self._asked.get(message.id)
        if asked is None:
            return  # its client has waited long enough, or nobody wants to know ("ensure")
        future, parts = asked
        parts.append(message.body)
        if not message.more and not future.done():
            future.set_result((message.status, b"".join(parts)))

    # --- the rings ------------------------------------------------------------------------------
    def _tell_of_broken(self, key: int) -> None:
        seat, epoch = incarnation_of(key)
        self._control.send(LinkBroken(seat=seat, epoch=epoch))

    def on_bell(self) -> None:
        """Take completions until every ring is empty and armed; give others a turn in between."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        rings = self.dispatch.rings()
        _shm.disarm(rings)
        for _ in range(DRAIN_ROUNDS_MAX):
            self.dispatch.drain()
            if _shm.arm(self.dispatch.rings()):
                return
        asyncio.get_running_loop().call_soon(self.on_bell)

    async def _tick(self) -> None:
        next_s = leases_s = 0.0
        while True:
            await asyncio.sleep(SWEEP_S)
            self.dispatch.expire(time.monotonic_ns())
            self.clock_s = now_s = time.monotonic()
            if now_s < next_s:
                continue
            next_s = now_s + COUNTERS_PERIOD_S
            self.send_counters()
            assert self._server is not None
            for connection in list(self._server.server_state.connections):
                if isinstance(connection, HotProtocol):
                    connection.check_times(now_s)
            if self._grpc is not None:
                self._grpc.check_times(now_s)
            if now_s >= leases_s:
                leases_s = now_s + LEASES_PERIOD_S
                self._drop_abandoned()

    def _drop_abandoned(self) -> None:
        """Forget the regions of clients that are gone."""
        for name in self.regions.abandoned():
            log.info("shared memory region '%s' is dropped: its owner is gone", name)
            self._control.send(Admin(id=0, operation="region_remove", arguments={"name": name}))

    # --- life -----------------------------------------------------------------------------------
    async def serve(self) -> None:
        """Serve until drained."""
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            make_app(self),
            http=protocol_class(self),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=self.settings.keep_alive_s,
            server_header=False,
            date_header=False,
            backlog=2048,
        )
        config.load()
        if self.settings.ssl_certfile:
            config.ssl = self._tls()
        self._server = uvicorn.Server(config)
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
        loop.add_reader(self._bell, self.on_bell)
        loop.add_reader(self._control.fileno(), self.on_control)
        touch = (self._ingress,)
        threading.Thread(target=populate, args=touch, name="populate", daemon=True).start()
        tick = loop.create_task(self._tick())
        if self._grpc_listener is not None:
            # Here, for who serves without gRPC need not have protobuf.
            from overcommit.server.grpc_server import GrpcServer

            self._grpc = GrpcServer(self)
            context = self._tls("h2") if self.settings.ssl_certfile else None
            await self._grpc.start(self._grpc_listener, context)
        gc.collect()
        gc.freeze()
        await self._server.serve(sockets=[self._listener])
        tick.cancel()
        self.send_counters()

    def _tls(self, *protocols: str) -> ssl.SSLContext:
        return tls.context_of(self.settings.ssl_certfile, self.settings.ssl_keyfile, *protocols)

    async def _drain(self, timeout_s: float) -> None:
        """Stop accepting, answer what is in flight, let idle connections end in peace."""
        server = self._server
        assert server is not None
        self.is_draining = True
        await asyncio.sleep(SWEEP_S)  # what the kernel has accepted already is taken
        for listener in server.servers:
            listener.close()
        if self._grpc is not None:
            self._grpc.drain()
        grace_s = time.monotonic() + DRAIN_GRACE_S
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            busy = bool(self.dispatch.pending) or bool(server.server_state.tasks)
            idle = bool(server.server_state.connections)
            if self._grpc is not None:
                # Clients are told to go; whoever has no call open is gone at once.
                busy = busy or bool(self._grpc.connections)
            if not busy and (not idle or time.monotonic() >= grace_s):
                break
            await asyncio.sleep(SWEEP_S)
        self.dispatch.end()
        server.should_exit = server.force_exit = True


def main(control_fd: int) -> None:
    """Serve HTTP until drained or until the supervisor is gone."""
    control = ControlSocket(control_fd)
    received = control.receive()
    assert received is not None
    start, fds = received
    assert isinstance(start, Start)

    async def run() -> None:
        await FrontEnd(control, start, fds).serve()

    uvloop.run(run())
