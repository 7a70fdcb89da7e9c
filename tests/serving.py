"""Run the real server in a test: start it on a free port, talk to it, leave nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from overcommit.runtime import _shm

WATCHDOG_S = 90.0  # a test that waits longer than this has failed


def children_of(pid: int) -> list[int]:
    """Every descendant of a process, from /proc."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{entry}/stat").read_text()
                fields = text.rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry)] = int(fields[1])
    found: list[int] = []
    wave = [pid]
    while wave:
        wave = [child for child, parent in parents.items() if parent in wave]
        found += wave
    return found


def files_of(pid: int) -> list[str]:
    """What a process has open or mapped, by name; nothing when it is gone."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            names += line.split(maxsplit=5)[5:]
    return names


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Answer:
    """Status, headers and body of one HTTP answer."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """`overcommit serve` as a child process; use as a context manager."""

    def __init__(
        self,
        *repositories: Path,
        cache: Path,
        flags: tuple[str, ...] = (),
        serve: tuple[str, ...] = ("-m", "overcommit", "serve"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, *serve, *map(str, repositories)]
        defaults = {"--port": "0", "--cache-dir": str(cache), "--device-memory": "64MiB"}
        defaults |= {
            "--host-memory": "64MiB",
            "--payload-memory": "32MiB",
            "--scan-interval": "0.3",
        }
        for flag, value in defaults.items():
            if flag not in flags:
                command += [flag, value]
        self.process = subprocess.Popen(
            [*command, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
            # Tests that are killed must not leave a server behind.
            preexec_fn=lambda: _shm.set_parent_death_signal(signal.SIGTERM),
        )
        self.log: list[str] = []
        self.port = 0
        self.grpc_port = 0
        self._serving = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip()
            self.log.append(text)
            if found := re.search(r"gRPC on [^:]+:(\d+)", text):
                self.grpc_port = int(found[1])
            if found := re.search(r"serving on https?://[^:]+:(\d+)", text):
                self.port = int(found[1])
                self._serving.set()
        self._serving.set()

    def __enter__(self) -> Server:
        try:
            self._serving.wait(WATCHDOG_S)
            assert self.port, "the server did not start:\n" + "\n".join(self.log)
            self.wait_until(lambda: self.get("/v2/health/ready").status == 200)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            print("\n".join(self.log[-80:]))
        if self.process.poll() is None:
            self.stop()
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(WATCHDOG_S)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(WATCHDOG_S)
        finally:
            self._reader.join(WATCHDOG_S)

    def wait_until(self, condition: Any) -> None:
        """Poll a condition; a watchdog, not an assertion on speed."""
        deadline = time.monotonic() + WATCHDOG_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain:\n" + "\n".join(self.log[-80:])
            assert self.process.poll() is None, "the server ended:\n" + "\n".join(self.log[-80:])
            time.sleep(0.02)

    def wait_for_log(self, text: str) -> None:
        """Wait for a line with this text: another thread reads them."""
        self.wait_until(lambda: any(text in line for line in self.log))

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own, for each request."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WATCHDOG_S)

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, value: Any) -> Answer:
        return self.request("POST", path, json.dumps(value).encode())

    def infer(self, model: str, inputs: dict[str, Any]) -> Answer:
        """Infer with INT64 inputs given as nested lists."""
        tensors = []
        for name, rows in inputs.items():
            shape = [len(rows), len(rows[0])]
            flat = [value for row in rows for value in row]
            tensors.append({"name": name, "datatype": "INT64", "shape": shape, "data": flat})
        return self.post(f"/v2/models/{model}/infer", {"inputs": tensors})

    def status(self) -> Any:
        return self.get("/v2/overcommit/status").json()

    def models(self) -> dict[str, Any]:
        rows = self.get("/v2/overcommit/models?limit=1000").json()["models"]
        return {f"{row['name']}/{row['version']}": row for row in rows}

    def pids(self, kind: str) -> list[int]:
        rows = self.status()["processes"]
        return [row["pid"] for row in rows if row["kind"] == kind and row["state"] == "LIVE"]
