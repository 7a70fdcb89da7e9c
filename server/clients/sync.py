"""The blocking client.

One connection per thread that asks at the same time, kept open between requests; the client may be
shared between threads.

Invariants
 1. A connection is in the hands of one request at a time.
 2. A request is sent again only when the server has said when to come back, or when a connection
    that had been idle turned out to be closed before a byte of an answer came.
"""

from __future__ import annotations

import http.client
import itertools
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from numpy.typing import ArrayLike

from overcommit.runtime.errors import (
    BadRequest,
    DeadlineExceeded,
    NotFound,
    Unavailable,
)
from overcommit.server.clients import exchange, shared_calls
from overcommit.server.clients.exchange import (
    ConnectionWasClosed,
    ModelInfo,
    ModelState,
    Received,
    Result,
    Sent,
    ServerError,
)
from overcommit.server.clients.shared_calls import Ask, Steps, T
from overcommit.server.clients.sharing import Sharing
from overcommit.server.clients.tensors import Array
from overcommit.server.urls import DEFAULT_URL, place_of

TIMEOUT_S: Final = 120.0
IDLE_MAX: Final = 64  # connections that are kept


class Client:
    """A client of one server.

    ```python
    with overcommit.Client("http://127.0.0.1:8000") as client:
        result = client.infer("scorer", {"x": [[1.0, 2.0]]})
        print(result["y"])
    ```

    `timeout_s` bounds each call.  Raises errors of `overcommit.runtime.errors`: NotFound, BadRequest,
    Unavailable (with `retry_after_s`), DeadlineExceeded, ServerError for anything else.

    Where the server is on the same machine and allows it (`--client-shared-memory`), long tensors go
    through shared memory by themselves; `shared_memory=False` sends them in bodies all the same.  `tls`
    is for an https URL whose certificate the system does not know: `ssl.create_default_context(cafile=...)`.
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
        self._place = place_of(url)
        self._tls = tls
        self._timeout_s = timeout_s
        self._sharing = Sharing() if shared_memory else None
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._infos: dict[tuple[str, str | None], ModelInfo] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all idle connections, give shared memory back; the client can be used again."""
        if self._sharing is not None:
            self._run(shared_calls.drop(self._sharing.close()))
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # --- inference ------------------------------------------------------------------------------
    def infer(
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
        """Run a model; return its outputs by name.

        `inputs` are arrays or nested lists, converted to what the model takes where no value can
        change.  `outputs` names the ones that are wanted; None: all.  With `timeout_s` the server
        refuses at once what it cannot answer in time.  A model with state is told by `sequence_id`
        which requests belong together, and which of them is the first and the last.
        """
        key = model, version
        info = self._infos.get(key)
        try:
            if info is None:
                info = self._infos[key] = self.model(model, version=version)
            sequence = exchange.sequence_of(sequence_id, start=sequence_start, end=sequence_end)
            asked = exchange.inference(
                model, version, inputs, outputs, info, timeout_s, id, sequence
            )
            result = None
            if self._sharing is not None and not asked.is_once:
                result = self._run(shared_calls.infer(self._sharing, asked, timeout_s))
            if result is None:
                received = self._send_patiently(asked.in_body(), timeout_s)
                result = exchange.infer_result(received)
            if self._sharing is not None:
                self._sharing.learn(asked, result)
            return result
        except (NotFound, BadRequest):
            self._infos.pop(key, None)  # it may have become another model
            raise

    def embed(
        self,
        model: str,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> Array:
        """Return the vectors of texts: FP32 `[texts, width]`."""
        sent = exchange.embeddings_request(model, texts, dimensions, truncate)
        return exchange.embeddings_result(self._send_patiently(sent, None))

    # --- models ---------------------------------------------------------------------------------
    def model(self, name: str, *, version: str | None = None) -> ModelInfo:
        """Describe a model: its inputs, outputs and versions."""
        info: ModelInfo = self._get(exchange.model_path(name, version), ModelInfo)
        return info

    def models(self) -> list[ModelState]:
        """List every version in the repository."""
        sent = exchange.index_request()
        states: list[ModelState] = exchange.decode(
            self._send(sent, self._timeout_s), list[ModelState]
        )
        return states

    def load(self, name: str) -> None:
        """Make a model available again, and look at its folder."""
        exchange.check(self._send(exchange.repository_request(name, "load"), self._timeout_s))

    def unload(self, name: str) -> None:
        """Take a model out of service."""
        exchange.check(self._send(exchange.repository_request(name, "unload"), self._timeout_s))

    # --- the server -----------------------------------------------------------------------------
    def is_ready(self, name: str | None = None, *, version: str | None = None) -> bool:
        """Whether the server, or a model, can be asked."""
        path = "/v2/health/ready" if name is None else exchange.model_path(name, version, "/ready")
        return self._send(Sent("GET", path), self._timeout_s).status == 200

    def status(self) -> dict[str, Any]:
        """What is in which tier, and how the processes are."""
        status: dict[str, Any] = self._get("/v2/overcommit/status", dict[str, Any])
        return status

    # --- inside ---------------------------------------------------------------------------------
    def _get(self, path: str, kind: type[Any]) -> Any:
        return exchange.decode(self._send(Sent("GET", path), self._timeout_s), kind)

    def _run(self, steps: Steps[T]) -> T:
        """Send what the steps ask, and return what they return."""
        try:
            ask = next(steps)
            while True:
                try:
                    received = self._ask(ask)
                except BaseException as error:  # the steps put things right, and raise it again
                    ask = steps.throw(error)
                else:
                    ask = steps.send(received)
        except StopIteration as end:
            value: T = end.value
            return value

    def _ask(self, ask: Ask) -> Received:
        if ask.is_patient:
            return self._send_patiently(ask.sent, ask.timeout_s)
        timeout_s = self._timeout_s if ask.timeout_s is None else ask.timeout_s
        return self._send(ask.sent, timeout_s)

    def _send_patiently(self, sent: Sent, timeout_s: float | None) -> Received:
        """Send, and again when the server says that it will have time."""
        end_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        for tries in itertools.count():
            received = self._send(sent, max(0.001, end_s - time.monotonic()))
            wait_s = exchange.pause_s(sent, received, tries, end_s - time.monotonic())
            if wait_s is None:
                return received
            time.sleep(wait_s)
        raise AssertionError("counting does not end")

    def _send(self, sent: Sent, timeout_s: float) -> Received:
        while True:
            connection, was_idle = self._take(timeout_s)
            try:
                connection.request(
                    sent.method, self._place.path + sent.path, sent.body, sent.headers
                )
                response = connection.getresponse()
            except TimeoutError as error:
                connection.close()
                raise self._too_late(sent, timeout_s) from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if was_idle and not sent.may_repeat:
                    raise ConnectionWasClosed(f"{self.url} has closed the connection") from error
                if was_idle:
                    continue  # the server closed it meanwhile; nothing of an answer came
                raise Unavailable(
                    f"no server answers at {self.url}: {error or type(error).__name__}"
                ) from error
            return self._read(connection, response, sent, timeout_s)

    def _read(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        sent: Sent,
        timeout_s: float,
    ) -> Received:
        try:
            body = response.read()
        except TimeoutError as error:
            connection.close()
            raise self._too_late(sent, timeout_s) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServerError(f"{self.url}{sent.path}: the answer broke off: {error}") from error
        headers = {name.lower(): value for name, value in response.getheaders()}
        if not response.will_close:
            with self._lock:
                if len(self._idle) < IDLE_MAX:
                    self._idle.append(connection)
                    return Received(response.status, headers, body)
        connection.close()
        return Received(response.status, headers, body)

    def _too_late(self, sent: Sent, timeout_s: float) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.url}{sent.path}: no answer within {timeout_s:.1f} s")

    def _take(self, timeout_s: float) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None and connection.sock is not None:
            connection.sock.settimeout(timeout_s)
            return connection, True
        place = self._place
        if not place.is_https:
            return http.client.HTTPConnection(place.host, place.port, timeout=timeout_s), False
        secure = http.client.HTTPSConnection(
            place.host, place.port, timeout=timeout_s, context=self._tls
        )
        return secure, False
