"""The real server as a child process: start it, wait until it is ready, ask it, stop it.

Invariants
 1. Whatever happens, no process of the server outlives the `with` block.
 2. The server's output is in a file of its own; it is kept, and its end is in every error that
    blames the server.

Called by the scenarios.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec

from overcommit.bench.errors import BenchError
from overcommit.bench.processes import Row, family, is_same, wait_for
from overcommit.runtime import _shm

START_LIMIT_S: Final = 120.0  # to listen and be ready, packing apart
STALL_LIMIT_S: Final = 180.0  # packing that gets no further
ASK_LIMIT_S: Final = 20.0
STOP_LIMIT_S: Final = 60.0
LOG_TAIL_CHARS: Final = 4000
PAGE_ROWS: Final = 1000  # the server's own limit
_SERVING: Final = re.compile(r"serving on http://[^\s]*?:(\d+)")
_GRPC: Final = re.compile(r"gRPC on [^\s]*?:(\d+)")


class Server:
    """`overcommit serve`; use as a context manager."""

    def __init__(
        self,
        repository: Path,
        cache: Path,
        work: Path,
        flags: Sequence[str] = (),
        name: str = "server",
        serve: Sequence[str] = ("-m", "overcommit", "serve"),
    ) -> None:
        """`work` gets the log, which is named after `name`, and the server's own TMPDIR.

        `serve` is what Python runs.
        """
        self._command = [sys.executable, "-P", *serve, str(repository)]
        self._command += ["--port", "0", "--cache-dir", str(cache), *flags]
        self.log = work / f"{name}.log"
        self.temporary = work / "tmp"
        self.port = 0
        self.grpc_port = 0
        self.ready_s = 0.0
        self._connection: http.client.HTTPConnection | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # --- life -----------------------------------------------------------------------------------
    def __enter__(self) -> Server:
        self.temporary.mkdir(parents=True, exist_ok=True)
        # The operator's own settings must not change what is measured.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OVERCOMMIT_")}
        environment["TMPDIR"] = str(self.temporary)
        started = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
                # A harness that is killed must not leave a server behind.
                preexec_fn=lambda: _shm.set_parent_death_signal(signal.SIGTERM),
            )
        try:
            self._wait(lambda: self._find_port() and self._is_ready(), "is not ready")
        except BaseException:
            self._end()
            raise
        self.ready_s = time.monotonic() - started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The supervisor."""
        assert self._process is not None, "the server was not started"
        return self._process

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        return self.process.pid

    def family(self) -> list[Row]:
        """Every process of this server that lives."""
        return family(self.pid)

    def terminate(self) -> None:
        """SIGTERM: the server drains."""
        self.process.send_signal(signal.SIGTERM)

    def wait_end(self) -> int:
        """Return the exit status.

        Raises BenchError when the server does not end.
        """
        self._disconnect()
        try:
            return self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise self.blame(f"did not end within {STOP_LIMIT_S:.0f} s") from error

    def kill_supervisor(self) -> None:
        """SIGKILL to the supervisor alone; reaps it."""
        self._disconnect()
        self.process.kill()
        self.process.wait()

    def _end(self) -> None:
        self._disconnect()
        process = self.process
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_LIMIT_S)
        for row in family(process.pid):
            if is_same(row):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(row.pid, signal.SIGKILL)
        process.wait()

    # --- blame ----------------------------------------------------------------------------------
    def tail(self) -> str:
        """Return the end of the server's log."""
        return self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]

    def blame(self, what: str) -> BenchError:
        """Make an error that shows the server's last words."""
        return BenchError(f"the server {what}; the end of {self.log}:\n{self.tail()}")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        def check() -> None:
            if self.process.poll() is not None:
                raise self.blame(f"ended with status {self.process.returncode}")

        if not wait_for(condition, START_LIMIT_S, check):
            raise self.blame(f"{what} after {START_LIMIT_S:.0f} s")

    def _find_port(self) -> bool:
        if not self.port:
            text = self.log.read_text(errors="replace")
            found = _SERVING.search(text)
            self.port = int(found[1]) if found else 0
            if found_grpc := _GRPC.search(text):
                self.grpc_port = int(found_grpc[1])
        return self.port != 0

    def _is_ready(self) -> bool:
        return self.request("GET", "/v2/health/ready")[0] == 200

    # --- asking ---------------------------------------------------------------------------------
    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send a request on the kept connection, on a new one when the front end behind it died.

        Raises BenchError when nobody answers.
        """
        deadline = time.monotonic() + ASK_LIMIT_S
        while True:
            connection = self._connection
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ASK_LIMIT_S)
                self._connection = connection
            try:
                connection.request(method, path, body)
                response = connection.getresponse()
                data = response.read()
                if response.will_close:
                    self._disconnect()
                return response.status, data
            except (OSError, http.client.HTTPException) as error:
                self._disconnect()
                if self.process.poll() is not None:
                    raise self.blame(f"ended with {self.process.returncode}") from error
                if time.monotonic() >= deadline:
                    raise self.blame(f"does not answer {method} {path}: {error!r}") from error

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _json(self, path: str) -> Any:
        status, body = self.request("GET", path)
        if status != 200:
            raise self.blame(f"answered {path} with {status}: {body[:300]!r}")
        return msgspec.json.decode(body)

    def status(self) -> Any:
        """Return `/v2/overcommit/status`."""
        return self._json("/v2/overcommit/status")

    def models(self) -> dict[str, Any]:
        """Return the rows of `/v2/overcommit/models`, by model name; page by page."""
        rows: list[dict[str, Any]] = []
        while True:
            page = self._json(f"/v2/overcommit/models?offset={len(rows)}&limit={PAGE_ROWS}")
            rows += page["models"]
            if not page["models"] or len(rows) >= page["total"]:
                return {row["name"]: row for row in rows}

    def image_of(self, name: str) -> Path:
        """Return the file of a model's newest image."""
        return Path(self._json(f"/v2/overcommit/models/{name}")["versions"][-1]["image"])

    def metrics(self) -> dict[str, float]:
        """Return the samples of `/metrics`; names as they stand there, labels included."""
        status, body = self.request("GET", "/metrics")
        if status != 200:
            raise self.blame(f"answered /metrics with {status}")
        samples = {}
        for line in body.decode().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def wait_packed(
        self,
        names: Sequence[str],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Wait until every model has its image.

        Raises BenchError when one is unavailable, or when nothing gets on.
        """
        best, since = -1, time.monotonic()
        while True:
            rows = self.models()
            states = {name: rows[name]["state"] if name in rows else "ABSENT" for name in names}
            for name, state in states.items():
                if state == "UNAVAILABLE":
                    raise self.blame(f"cannot serve {name}: {rows[name]['reason']}")
            done = sum(state == "READY" for state in states.values())
            on_progress(done, len(names))
            if done == len(names):
                return
            if done > best:
                best, since = done, time.monotonic()
            if time.monotonic() - since > STALL_LIMIT_S:
                waiting = [
                    f"{name} is {state}" for name, state in states.items() if state != "READY"
                ]
                raise self.blame(f"does not get its models ready ({', '.join(waiting[:5])})")
            time.sleep(0.2)
