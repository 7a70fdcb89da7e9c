"""The load generator: HTTP clients in processes of their own, in a closed or an open loop.

A scenario makes a `Plan` and starts a `Load`; each process of it runs its share of the connections
on uvloop, and says over its standard output how it goes, as JSON lines.  Closing its standard input
stops a process: so it never outlives the scenario.

Run as `python -m overcommit.bench.loadgen`, with the plan as one line on standard input.
"""

from __future__ import annotations

import asyncio
import gc
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

from overcommit.bench.arrivals import QUEUE_MAX, Arrivals, Closed, Schedule
from overcommit.bench.connection import Connection, make_connection
from overcommit.bench.dialect import Grpc
from overcommit.bench.errors import BenchError
from overcommit.bench.grpc_connection import GrpcConnection
from overcommit.bench.pacer import Pacer
from overcommit.bench.run import Run
from overcommit.bench.tally import Tally, merge
from overcommit.bench.workload import Workload, WorkloadPlan, make_workload

SWEEP_S: Final = 0.05
REPORT_SWEEPS: Final = 5
CONNECT_WAIT_S: Final = 2.0  # an open loop begins when its connections are there, or then
END_GRACE_S: Final = 20.0  # for the last answers, after the plan's time and its timeout


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do; `Load` gives each process its part: of the connections, of the arrivals, a seed."""

    workload: WorkloadPlan
    port: int
    host: str = "127.0.0.1"
    connections: int = 16
    seconds: float = 10.0
    seed: int = 1
    reconnect: bool = True  # False: a connection that the server closes stays closed
    timeout_s: float = 30.0
    arrivals: Arrivals = Closed()
    queue_max: int = QUEUE_MAX  # requests of an open loop that are due and wait for a connection
    cpus: tuple[int, ...] = ()  # where it may run; empty: anywhere
    part: int = 0  # filled in by `Load`
    parts: int = 1


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
    pacer = _make_pacer(plan, run)
    connections = [_connect(plan, run) for _ in range(plan.connections)]
    cpu_ns = time.process_time_ns()
    run.tally.started_ns = run.last_answer_ns = time.monotonic_ns()
    for connection in connections:
        connection.open()
    if pacer is not None:
        await _wait_open(connections)
        run.tally.started_ns = run.last_answer_ns = time.monotonic_ns()
        pacer.start(asyncio.get_running_loop(), run.tally.started_ns)
    end_ns = run.tally.started_ns + int(plan.seconds * 1e9)
    sweeps = 0
    while not all(connection.is_done for connection in connections):
        await asyncio.sleep(SWEEP_S)
        now_ns = time.monotonic_ns()
        is_over = now_ns >= end_ns or stop.is_set() or (pacer is not None and pacer.is_over)
        if not run.is_stopping and is_over:
            _stop(run, pacer, now_ns)
        for connection in connections:
            connection.expire(now_ns, int(plan.timeout_s * 1e9))
        run.flush()
        sweeps += 1
        if sweeps % REPORT_SWEEPS == 0:
            on_progress(run.tally)
    if not run.is_stopping:
        _stop(run, pacer, time.monotonic_ns())
    run.tally.cpu_ns = time.process_time_ns() - cpu_ns
    return run.finish()


def _connect(plan: Plan, run: Run) -> Connection:
    if isinstance(getattr(plan.workload, "dialect", None), Grpc):
        return GrpcConnection(run)
    return make_connection(run)


def _make_pacer(plan: Plan, run: Run) -> Pacer | None:
    if isinstance(plan.arrivals, Closed):
        return None
    schedule = Schedule(plan.arrivals, plan.seed, plan.part, plan.parts)
    return Pacer(run, schedule, max(1, plan.queue_max // plan.parts))


async def _wait_open(connections: list[Connection]) -> None:
    limit_ns = time.monotonic_ns() + int(CONNECT_WAIT_S * 1e9)
    while time.monotonic_ns() < limit_ns:
        if all(connection.is_idle or connection.is_done for connection in connections):
            return
        await asyncio.sleep(0.001)


def _stop(run: Run, pacer: Pacer | None, now_ns: int) -> None:
    run.stop(now_ns)
    if pacer is not None:
        pacer.stop(now_ns)


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
            mine = msgspec.structs.replace(
                plan, connections=share, seed=seed, part=number, parts=processes
            )
            self._tell(child, mine)
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
    if plan.cpus:
        os.sched_setaffinity(0, plan.cpus)
    stop = threading.Event()

    def watch() -> None:
        sys.stdin.buffer.read()
        stop.set()

    def say(message: Progress | Result) -> None:
        os.write(1, msgspec.json.encode(message) + b"\n")

    def on_progress(tally: Tally) -> None:
        say(Progress(tally.right, tally.wrong, tally.errors, tally.broken))

    threading.Thread(target=watch, daemon=True).start()
    workload = make_workload(plan.workload, plan.seed, plan.part, plan.parts)
    # What is there stays: looking through it for garbage again and again costs latency.
    gc.collect()
    gc.freeze()
    tally = uvloop.run(drive(plan, workload, stop, on_progress))
    say(Result(tally))
    # Not through the interpreter's exit: the watching thread blocks in a read of standard input.
    os._exit(0)


if __name__ == "__main__":
    main()
