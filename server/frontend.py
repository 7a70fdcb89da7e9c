"""Stop-gap front end."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
import time
from typing import Any

import numpy as np
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response

from overcommit.runtime import _shm
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.errors import BadRequest, NotFound, OvercommitError, Unavailable
from overcommit.runtime.messages import (
    Admin,
    AdminReply,
    Counters,
    Drain,
    LinkDown,
    LinkUp,
    Ready,
    Route,
    Routes,
    Start,
    Stop,
)
from overcommit.runtime.payload import DATATYPES
from overcommit.server import binary, codec
from overcommit.server.dispatch import Dispatch


class FrontEnd:
    def __init__(self, control: ControlSocket, start: Start, fds: dict[str, int]) -> None:
        self.control, self.start, self.settings = control, start, start.settings
        n = start.settings.payload_bytes
        self.bell = fds["doorbell"]
        self.listen = fds["listen"]
        self.dispatch = Dispatch(
            start.seat,
            start.epoch,
            mmap.mmap(fds["ingress"], n),
            mmap.mmap(fds["egress"], n, prot=mmap.PROT_READ),
        )
        self.routes: dict[int, Route] = {}
        self.by_name: dict[str, dict[str, Route]] = {}
        self.ready = self.draining = False
        self.admin: dict[int, tuple[asyncio.Future[tuple[int, bytes]], list[bytes]]] = {}
        self.admin_id = 0
        self.app = FastAPI(title="overcommit")
        self.changed = asyncio.Event()
        self._routes_app()

    async def ask(self, operation: str, **arguments: Any) -> Response:
        self.admin_id += 1
        future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self.admin[self.admin_id] = (future, [])
        if operation in ("metrics", "status", "models"):
            self.send_counters()
        self.control.send(Admin(id=self.admin_id, operation=operation, arguments=arguments))
        status, body = await asyncio.wait_for(future, 60)
        kind = "text/plain; version=0.0.4" if operation == "metrics" else "application/json"
        return Response(body, status, media_type=kind)

    def send_counters(self) -> None:
        d = self.dispatch
        self.control.send(
            Counters(
                requests=d.requests,
                errors=d.errors,
                in_flight=len(d.pending),
                blocks_used=d.ingress.blocks_used + d.egress.blocks_used,
                late_completions=d.late,
                retries=d.retried,
                models=d.model_counters()[:500],
            )
        )

    def find(self, name: str, version: str | None) -> Route:
        versions = self.by_name.get(name)
        if not versions:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if version:
            if version not in versions:
                raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
            return versions[version]
        for v in sorted(versions, key=int, reverse=True):
            if versions[v].state in ("ready", "packing"):
                return versions[v]
        return versions[max(versions, key=int)]

    async def usable(self, name: str, version: str | None) -> Route:
        end = time.monotonic() + 60
        while True:
            route = self.find(name, version)
            if route.state == "ready":
                return route
            if route.state == "unloaded":
                raise NotFound(f"Request for unknown model: '{name}' has no available versions")
            if route.state == "unavailable":
                raise Unavailable(f"model '{name}' is unavailable: {route.reason}")
            self.control.send(Admin(id=0, operation="ensure", arguments={"slot": route.slot}))
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), max(0.1, end - time.monotonic()))

    async def infer(self, name: str, version: str | None, request: Request) -> Response:
        body = await request.body()
        header = request.headers.get("inference-header-content-length")
        text, tail = binary.split(body, int(header) if header else None)
        route = await self.usable(name, version)
        parsed = codec.decode_request(text)
        specs = {spec.name: (i, spec) for i, spec in enumerate(route.inputs)}
        tensors = []
        at = 0
        for item in parsed.inputs:
            if item.name not in specs:
                raise BadRequest(f"model '{name}' has no input '{item.name}'")
            i, spec = specs[item.name]
            size = codec.whole(item.parameters, "binary_data_size")
            if size is not None:
                data: Any = tail[at : at + size]
                at += size
            elif bytes(item.data):
                data = codec.decode_data(item.data, item.datatype, item.shape)
            else:
                raise BadRequest(f"input '{item.name}' has no data")
            tensors.append((i, item.datatype, data, item.shape))
        batch = parsed.inputs[0].shape[0] if parsed.inputs and parsed.inputs[0].shape else 1
        axes = {}
        for item in parsed.inputs:
            for axis, dim in zip(specs[item.name][1].axes, item.shape, strict=False):
                if axis:
                    axes[axis] = dim
        out = 4096
        for spec in route.outputs:
            n = DATATYPES[spec.datatype][1] or 64
            for axis, dim in zip(spec.axes or [None] * len(spec.shape), spec.shape, strict=False):
                n *= dim if dim >= 0 else axes.get(axis or "", 1)
            out += n + 512
        deadline = time.monotonic_ns() + self.settings.request_timeout_ms * 1_000_000
        result = await self.dispatch.submit(route, tensors, out, deadline)
        want_binary = codec.flag(parsed.parameters, "binary_data_output")
        wanted = {o.name: o for o in parsed.outputs} if parsed.outputs else None
        outputs, blobs = [], []
        view = memoryview(result.data)
        for place in result.places:
            spec = route.outputs[place.index]
            if wanted is not None and spec.name not in wanted:
                continue
            is_binary = want_binary
            if wanted is not None:
                own = codec.flag(wanted[spec.name].parameters, "binary_data")
                is_binary = own if own is not None else want_binary
            data = view[place.offset : place.offset + place.nbytes]
            if is_binary:
                blobs.append(bytes(data))
                outputs.append(
                    codec.ResponseOutput(
                        spec.name,
                        place.datatype,
                        place.shape,
                        {"binary_data_size": place.nbytes},
                    )
                )
            else:
                outputs.append(
                    codec.ResponseOutput(
                        spec.name,
                        place.datatype,
                        place.shape,
                        data=codec.encode_data(data, place.datatype),
                    )
                )
        head = codec.encode_response(
            codec.InferResponse(route.name, route.version, outputs, parsed.id)
        )
        headers = {"Inference-Header-Content-Length": str(len(head))} if blobs else {}
        return Response(
            head + b"".join(blobs),
            media_type="application/octet-stream" if blobs else "application/json",
            headers=headers,
        )

    def _routes_app(self) -> None:
        app = self.app

        @app.exception_handler(OvercommitError)
        async def _(request: Request, error: OvercommitError) -> Response:
            return Response(
                json.dumps({"error": error.message}), error.http_status, media_type="application/json"
            )

        @app.get("/v2/health/live")
        async def live() -> Any:
            return {"live": True}

        @app.get("/v2/health/ready")
        async def ready() -> Any:
            ok = bool(self.ready and self.dispatch.links)
            return Response(json.dumps({"ready": ok}), 200 if ok else 503)

        @app.get("/v2/models/{name}")
        async def meta(name: str) -> Any:
            r = await self.usable(name, None)
            f = lambda s: {"name": s.name, "datatype": s.datatype, "shape": s.shape}  # noqa: E731
            return {
                "name": r.name,
                "versions": [r.version],
                "platform": r.platform,
                "inputs": [f(s) for s in r.inputs],
                "outputs": [f(s) for s in r.outputs],
            }

        @app.post("/v2/models/{name}/infer")
        async def infer(name: str, request: Request) -> Response:
            return await self.infer(name, None, request)

        @app.post("/v2/models/{name}/versions/{version}/infer")
        async def infer_v(name: str, version: str, request: Request) -> Response:
            return await self.infer(name, version, request)

        @app.post("/v2/repository/index")
        async def index() -> Response:
            return await self.ask("index")

        @app.post("/v2/repository/models/{name}/load")
        async def load(name: str) -> Response:
            return await self.ask("load", name=name)

        @app.post("/v2/repository/models/{name}/unload")
        async def unload(name: str) -> Response:
            return await self.ask("unload", name=name)

        @app.get("/metrics")
        async def metrics() -> Response:
            return await self.ask("metrics")

        @app.get("/v2/overcommit/models")
        async def models(offset: int = 0, limit: int = 100) -> Response:
            return await self.ask("models", offset=offset, limit=limit)

        @app.get("/v2/overcommit/status")
        async def status() -> Response:
            return await self.ask("status")

    def on_bell(self) -> None:
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            pass
        rings = self.dispatch.rings()
        _shm.disarm(rings)
        while True:
            self.dispatch.drain()
            if _shm.arm(self.dispatch.rings()):
                return

    def on_control(self) -> None:
        while True:
            try:
                received = self.control.try_receive()
            except EOFError:
                os._exit(0)
            if received is None:
                break
            message, fds = received
            if isinstance(message, Routes):
                for route in message.upsert:
                    self.routes[route.slot] = route
                    self.by_name.setdefault(route.name, {})[route.version] = route
                for slot in message.removed:
                    route = self.routes.pop(slot, None)
                    if route and self.by_name.get(route.name, {}).get(route.version) is route:
                        del self.by_name[route.name][route.version]
                        if not self.by_name[route.name]:
                            del self.by_name[route.name]
                self.changed.set()
                if message.complete and not self.ready:
                    self.ready = True
                    self.control.send(Ready(pid=os.getpid()))
            elif isinstance(message, LinkUp):
                self.dispatch.link_up(message, fds)
            elif isinstance(message, LinkDown):
                self.dispatch.link_down(message.seat, message.epoch)
            elif isinstance(message, AdminReply):
                if message.id in self.admin:
                    future, parts = self.admin[message.id]
                    parts.append(message.body)
                    if not message.more:
                        del self.admin[message.id]
                        if not future.done():
                            future.set_result((message.status, b"".join(parts)))
            elif isinstance(message, Drain):
                self.server.should_exit = True
            elif isinstance(message, Stop):
                os._exit(0)
        self.on_bell()

    async def ticker(self) -> None:
        n = 0
        while True:
            await asyncio.sleep(0.05)
            n += 1
            self.dispatch.expire(time.monotonic_ns())
            if n % 20 == 0:
                self.send_counters()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.bell, self.on_bell)
        loop.add_reader(self.control.fileno(), self.on_control)
        config = uvicorn.Config(self.app, http="httptools", loop="uvloop", log_level="warning")
        self.server = uvicorn.Server(config)
        self.server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.create_task(self.ticker())
        self.on_control()
        await self.server.serve(sockets=[socket.socket(fileno=self.listen)])
        task.cancel()
        os._exit(0)


def main(control_fd: int) -> None:
    control = ControlSocket(control_fd)
    received = control.receive()
    assert received is not None
    start, fds = received
    assert isinstance(start, Start)

    async def run() -> None:
        await FrontEnd(control, start, fds).serve()

    uvloop.run(run())
