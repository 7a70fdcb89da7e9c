"""A peer's processes: started in a session of their own, and all ended afterwards.

Invariants
 1. Whatever happens, no process of the peer outlives the `with` block, also one that has left the
    session and whose parent has died: every process inherits a mark in its environment, and what
    was ever seen of the family is remembered.
 2. The peer's output is in a file of its own, and its end is in every error that blames it.

Called by `peers.serve`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from overcommit.bench.errors import BenchError
from overcommit.bench.processes import Row, all_rows, family, is_same, wait_for
from overcommit.runtime import _shm

START_LIMIT_S: Final = 180.0
STOP_LIMIT_S: Final = 20.0
KILL_LIMIT_S: Final = 10.0
LOOK_EVERY: Final = 10  # polls of `wait_for`; to look at all processes takes some milliseconds
LOG_TAIL_CHARS: Final = 3000
MARK: Final = "OVERCOMMIT_BENCH_PEER"


class PeerProcess:
    """A command that serves; use as a context manager."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        is_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        """`environment` is laid over ours, without our own settings."""
        self.name = name
        self.log = log
        self._argv = list(argv)
        self._mark = uuid.uuid4().hex
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("OVERCOMMIT_", "PYTHON"))}
        self._environment = {**ours, **environment, MARK: self._mark}
        self._is_ready = is_ready
        self._seen: dict[int, Row] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PeerProcess:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment,
                # A harness that is killed must not leave a server behind.
                preexec_fn=lambda: _shm.set_parent_death_signal(signal.SIGTERM),
            )
        try:
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """The first process."""
        assert self._process is not None, "the peer was not started"
        return self._process.pid

    def family(self) -> list[Row]:
        """Every process of the peer that lives."""
        rows = {row.pid: row for row in family(self.pid)}
        rows |= {row.pid: row for row in all_rows() if row.pid not in rows and self._is_marked(row)}
        self._seen |= rows
        return list(rows.values())

    def blame(self, what: str) -> BenchError:
        """Make an error that shows the peer's last words."""
        tail = self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
        return BenchError(f"{self.name} {what}; the end of {self.log}:\n{tail}")

    def _is_marked(self, row: Row) -> bool:
        with contextlib.suppress(OSError):
            return self._mark.encode() in Path(f"/proc/{row.pid}/environ").read_bytes()
        return False

    def _wait_ready(self) -> None:
        assert self._process is not None
        process, polls = self._process, 0

        def check() -> None:
            nonlocal polls
            polls += 1
            if polls % LOOK_EVERY == 0:
                self.family()
            if process.poll() is not None:
                raise self.blame(f"ended with status {process.returncode}")

        if not wait_for(self._is_ready, START_LIMIT_S, check):
            raise self.blame(f"is not ready after {START_LIMIT_S:.0f} s")

    def _end(self) -> None:
        assert self._process is not None
        process = self._process
        self.family()  # while it lives: what hangs on it is found through it
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_LIMIT_S)
        # Twice, because what is being killed may have started something meanwhile.
        for _ in range(2):
            self.family()
            left = [row for row in self._seen.values() if is_same(row)]
            for row in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(row.pid, signal.SIGKILL)
            wait_for(lambda: not any(is_same(row) for row in self._seen.values()), KILL_LIMIT_S)
        process.wait()
