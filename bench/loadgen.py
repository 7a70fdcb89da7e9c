"""The load generator: closed-loop HTTP clients in processes of their own.

A scenario makes a `Plan` and starts a `Load`; each process of it runs its share of the connections
on uvloop, and says over its standard output how it goes, as JSON lines.  Closing its standard input
stops a process: so it never outlives the scenario.

Run as `python -m overcommit.bench.loadgen`, with the plan as one line on standard input.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec
import uvloop

from overcommit.bench.connection import Connection, Run
from overcommit.bench.errors import BenchError
from overcommit.bench.tally import Tally, merge
from overcommit.bench.workload import EmbeddingPlan, Workload, make_workload

SWEEP_S: Final = 0.05
REPORT_SWEEPS: Final = 5
END_GRACE_S: Final = 20.0  # for the last answers, after the plan's time and its timeout


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do; `Load` gives each process its share of the connections and a seed of its own."""

    workload: EmbeddingPlan
    port: int
    host: str = "127.0.0.1"
    connections: int = 16
    seconds: float = 10.0
    seed: int = 1
    reconnect: bool = True  # False: a connection that the server closes stays closed
    timeout_s: float = 30.0


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How it goes, so far."""

    right: int = 0
    wrong: int = 0
    errors: int = 0
    broken: int = 0


class Result(msgspec.Struct, frozen=True, tag="result"):
    """The end."""

    tally: Tally


_lines = msgspec.json.Decoder(Progress | Result)


async def drive(
    plan: Plan,
    workload: Workload,
    stop: threading.Event,
    on_progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Run a plan in this process and return what was counted.

    Ends when the plan's time is over, when `stop` is set, or when every connection is done.
    """
    run = Run(plan.host, plan.port, workload, plan.seed, plan.reconnect)
    connections = [Connection(run) for _ in range(plan.connections)]
    run.tally.started_ns = run.last_answer_ns = time.monotonic_ns()
    end_ns = run.tally.started_ns + int(plan.seconds * 1e9)
    for connection in connections:
        connection.open()
    sweeps = 0
    while not all(connection.is_done for connection in connections):
        await asyncio.sleep(SWEEP_S)
        now_ns = time.monotonic_ns()
        if not run.is_stopping and (now_ns >= end_ns or stop.is_set()):
            run.stop(now_ns)
        for connection in connections:
            connection.expire(now_ns, int(plan.timeout_s * 1e9))
        sweeps += 1
        if sweeps % REPORT_SWEEPS == 0:
            on_progress(run.tally)
    if not run.is_stopping:
        run.stop(time.monotonic_ns())
    run.tally.histogram = run.times.to_wire()
    return run.tally


class Load:
    """A plan that runs, in one or more child processes; use as a context manager."""

    def __init__(self, plan: Plan, log: Path, processes: int = 1) -> None:
        assert 1 <= processes <= plan.connections
        self.plan = plan
        self._log = log
        self._results: list[Tally] = []
        self._progress = [Progress()] * processes
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._children = [
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "overcommit.bench.loadgen"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
                for _ in range(processes)
            ]
        for number, child in enumerate(self._children):
            share = plan.connections // processes + (number < plan.connections % processes)
            seed = plan.seed * 64 + number
            self._tell(child, msgspec.structs.replace(plan, connections=share, seed=seed))
        self._readers = [
            threading.Thread(target=self._read, args=(number,), daemon=True)
            for number in range(processes)
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _tell(child: subprocess.Popen[bytes], plan: Plan) -> None:
        assert child.stdin is not None
        child.stdin.write(msgspec.json.encode(plan) + b"\n")
        child.stdin.flush()

    def _read(self, number: int) -> None:
        stdout = self._children[number].stdout
        assert stdout is not None
        for line in stdout:
            message = _lines.decode(line)
            if isinstance(message, Result):
                self._results.append(message.tally)
            else:
                self._progress[number] = message

    @property
    def progress(self) -> Progress:
        """How it goes, over all processes; at most a quarter of a second old."""
        names = Progress.__struct_fields__
        return Progress(**{name: sum(getattr(p, name) for p in self._progress) for name in names})

    @property
    def is_running(self) -> bool:
        """Whether a process still runs."""
        return any(child.poll() is None for child in self._children)

    def stop(self) -> None:
        """Ask for the end; each connection still waits for its answer."""
        for child in self._children:
            if child.stdin is not None and not child.stdin.closed:
                child.stdin.close()

    def wait(self) -> Tally:
        """Return the sum of what was counted.

        Raises BenchError when a process failed.
        """
        limit_s = self.plan.seconds + self.plan.timeout_s + END_GRACE_S
        for child, reader in zip(self._children, self._readers, strict=True):
            try:
                child.wait(limit_s)
            except subprocess.TimeoutExpired as error:
                raise BenchError(f"the load generator hangs; its log is {self._log}") from error
            reader.join()
        if len(self._results) != len(self._children):
            tail = self._log.read_text(errors="replace")[-3000:]
            raise BenchError(f"a load generator failed:\n{tail}")
        return merge(self._results)

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for reader in self._readers:
            reader.join()
        for child in self._children:
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()


def main() -> None:
    """Be one process of a load."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    stop = threading.Event()

    def watch() -> None:
        sys.stdin.buffer.read()
        stop.set()

    def say(message: Progress | Result) -> None:
        os.write(1, msgspec.json.encode(message) + b"\n")

    def on_progress(tally: Tally) -> None:
        say(Progress(tally.right, tally.wrong, tally.errors, tally.broken))

    threading.Thread(target=watch, daemon=True).start()
    workload = make_workload(plan.workload, plan.seed)
    tally = uvloop.run(drive(plan, workload, stop, on_progress))
    say(Result(tally))
    # Not through the interpreter's exit: the watching thread blocks in a read of standard input.
    os._exit(0)


if __name__ == "__main__":
    main()
