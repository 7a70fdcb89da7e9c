"""The client for asyncio, over aiohttp (`pip install 'overcommit[client]'`).

The same calls as `Client`, awaited; see there.

Invariants
 1. The session is made in the loop that asks first, and closed by `close` or the context manager.
 2. A call that is cancelled closes its connection, and the server drops what it waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from numpy.typing import ArrayLike

from overcommit.runtime.errors import (
    BadRequest,
    DeadlineExceeded,
    NotFound,
    Unavailable,
)
from overcommit.server.clients import exchange, shared_calls
from overcommit.server.clients.exchange import (
    ModelInfo,
    ModelState,
    Received,
    Result,
    Sent,
    ServerError,
)
from overcommit.server.clients.shared_calls import Ask, Steps, T
from overcommit.server.clients.sharing import Sharing
from overcommit.server.clients.sync import TIMEOUT_S
from overcommit.server.clients.tensors import Array
from overcommit.server.urls import DEFAULT_URL, place_of

CONNECTIONS_MAX = 256


class AsyncClient:
    """A client of one server, for asyncio.

    ```python
    async with overcommit.AsyncClient("http://127.0.0.1:8000") as client:
        result = await client.infer("scorer", {"x": [[1.0, 2.0]]})
    ```
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = TIMEOUT_S,
        shared_memory: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url = url
        self._tls = tls
        self._sharing = Sharing() if shared_memory else None
        place = place_of(url)
        host = f"[{place.host}]" if ":" in place.host else place.host
        scheme = "https" if place.is_https else "http"
        self._base = f"{scheme}://{host}:{place.port}{place.path}"
        self._timeout_s = timeout_s
        self._session: Any = None
        self._infos: dict[tuple[str, str | None], ModelInfo] = {}

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections, give shared memory back; the client can be used again."""
        if self._sharing is not None:
            await self._run(shared_calls.drop(self._sharing.close()))
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # --- inference ------------------------------------------------------------------------------
    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        version: str | None = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        id: str | None = None,
        sequence_id: int | str | None = None,
        sequence_start: bool = False,
        sequence_end: bool = False,
    ) -> Result:
        """Run a model; return its outputs by name.  See `Client.infer`."""
        key = model, version
        info = self._infos.get(key)
        try:
            if info is None:
                info = self._infos[key] = await self.model(model, version=version)
            sequence = exchange.sequence_of(sequence_id, start=sequence_start, end=sequence_end)
            asked = exchange.inference(
                model, version, inputs, outputs, info, timeout_s, id, sequence
            )
            result = None
            if self._sharing is not None and not asked.is_once:
                result = await self._run(shared_calls.infer(self._sharing, asked, timeout_s))
            if result is None:
                received = await self._send_patiently(asked.in_body(), timeout_s)
                result = exchange.infer_result(received)
            if self._sharing is not None:
                self._sharing.learn(asked, result)
            return result
        except (NotFound, BadRequest):
            self._infos.pop(key, None)  # it may have become another model
            raise

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> Array:
        """Return the vectors of texts: FP32 `[texts, width]`."""
        sent = exchange.embeddings_request(model, texts, dimensions, truncate)
        return exchange.embeddings_result(await self._send_patiently(sent, None))

    # --- models ---------------------------------------------------------------------------------
    async def model(self, name: str, *, version: str | None = None) -> ModelInfo:
        """Describe a model: its inputs, outputs and versions."""
        info: ModelInfo = await self._get(exchange.model_path(name, version), ModelInfo)
        return info

    async def models(self) -> list[ModelState]:
        """List every version in the repository."""
        sent = exchange.index_request()
        received = await self._send(sent, self._timeout_s)
        states: list[ModelState] = exchange.decode(received, list[ModelState])
        return states

    async def load(self, name: str) -> None:
        """Make a model available again, and look at its folder."""
        exchange.check(await self._send(exchange.repository_request(name, "load"), self._timeout_s))

    async def unload(self, name: str) -> None:
        """Take a model out of service."""
        exchange.check(
            await self._send(exchange.repository_request(name, "unload"), self._timeout_s)
        )

    # --- the server -----------------------------------------------------------------------------
    async def is_ready(self, name: str | None = None, *, version: str | None = None) -> bool:
        """Whether the server, or a model, can be asked."""
        path = "/v2/health/ready" if name is None else exchange.model_path(name, version, "/ready")
        return (await self._send(Sent("GET", path), self._timeout_s)).status == 200

    async def status(self) -> dict[str, Any]:
        """What is in which tier, and how the processes are."""
        status: dict[str, Any] = await self._get("/v2/overcommit/status", dict[str, Any])
        return status

    # --- inside ---------------------------------------------------------------------------------
    async def _get(self, path: str, kind: type[Any]) -> Any:
        return exchange.decode(await self._send(Sent("GET", path), self._timeout_s), kind)

    async def _run(self, steps: Steps[T]) -> T:
        """Send what the steps ask, and return what they return."""
        try:
            ask = next(steps)
            while True:
                try:
                    received = await self._ask(ask)
                except BaseException as error:  # the steps put things right, and raise it again
                    ask = steps.throw(error)
                else:
                    ask = steps.send(received)
        except StopIteration as end:
            value: T = end.value
            return value

    async def _ask(self, ask: Ask) -> Received:
        if ask.is_patient:
            return await self._send_patiently(ask.sent, ask.timeout_s)
        timeout_s = self._timeout_s if ask.timeout_s is None else ask.timeout_s
        return await self._send(ask.sent, timeout_s)

    async def _send_patiently(self, sent: Sent, timeout_s: float | None) -> Received:
        """Send, and again when the server says that it will have time."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + (self._timeout_s if timeout_s is None else timeout_s)
        for tries in itertools.count():
            received = await self._send(sent, max(0.001, end_s - loop.time()))
            wait_s = exchange.pause_s(sent, received, tries, end_s - loop.time())
            if wait_s is None:
                return received
            await asyncio.sleep(wait_s)
        raise AssertionError("counting does not end")

    async def _send(self, sent: Sent, timeout_s: float) -> Received:
        aiohttp = _aiohttp()
        if self._session is None:
            secure = True if self._tls is None else self._tls
            connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX, ssl=secure)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=True)
        where = self._base + sent.path
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.request(
                    sent.method, _as_it_is(where), data=sent.body or None, headers=sent.headers
                ) as response:
                    body = await response.read()
                    headers = {name.lower(): value for name, value in response.headers.items()}
                    return Received(response.status, headers, body)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{where}: no answer within {timeout_s:.1f} s") from error
        except aiohttp.ClientPayloadError as error:
            raise ServerError(f"{where}: the answer broke off: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"no server answers at {self.url}: {error}") from error


def _as_it_is(url: str) -> Any:
    # aiohttp would decode and encode what is quoted already.
    from yarl import URL

    return URL(url, encoded=True)


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError as error:
        raise Unavailable(
            "AsyncClient needs the package aiohttp: pip install 'overcommit[client]'"
        ) from error
    return aiohttp
