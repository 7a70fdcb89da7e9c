"""SIGKILL to one process of a server, and the wait for who takes its seat.

Called by the scenario `activation`; `killer` is the one that kills at random.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final

from overcommit.bench import processes
from overcommit.bench.server import Server

LIVE_LIMIT_S: Final = 30.0


def _pid(server: Server, kind: str, *, live: bool = False) -> int:
    """Return the pid in the first seat of a kind; 0 when `live` is asked and it is not."""
    row = next(row for row in server.status()["processes"] if row["kind"] == kind)
    return 0 if live and row["state"] != "LIVE" else int(row["pid"])


def kill(server: Server, kind: str) -> None:
    """Kill a process; returns when its successor lives.

    Raises BenchError when there is none.
    """
    with kill_after(server, kind, 0.0):
        pass


@contextlib.contextmanager
def kill_after(server: Server, kind: str, delay_s: float) -> Iterator[None]:
    """Kill a process so long after the block has begun; leave when its successor lives.

    Raises BenchError when there is none.
    """
    old = _pid(server, kind)

    def strike() -> None:
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(old, signal.SIGKILL)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if not processes.wait_for(lambda: _pid(server, kind, live=True) not in (0, old), LIVE_LIMIT_S):
        raise server.blame(f"has no {kind} after one was killed")
