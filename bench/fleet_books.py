"""What the scenario `fleet` reads of a server and of the machine: memory, listings, the page cache."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from overcommit.bench import processes
from overcommit.bench.server import Server

SAMPLE_S: Final = 0.5
_DROP: Final = Path("/proc/sys/vm/drop_caches")


@dataclass(slots=True)
class Watch:
    """The memory of a server's process tree, sampled while a load runs."""

    server: Server
    largest_bytes: int = 0
    _next_s: float = 0.0
    by_kind: dict[str, int] = field(default_factory=dict)

    def tick(self) -> None:
        """Take a sample if it is time."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + SAMPLE_S
        sample = tree_bytes(self.server)
        if sum(sample.values()) > self.largest_bytes:
            self.largest_bytes, self.by_kind = sum(sample.values()), sample


def tree_bytes(server: Server) -> dict[str, int]:
    """Return the PSS of every process of a server, by kind."""
    seats = {row["pid"]: row["kind"] for row in server.status()["processes"]}
    found: dict[str, int] = {}
    for row in server.family():
        kind = "supervisor" if row.pid == server.pid else seats.get(row.pid, "other")
        found[kind] = found.get(kind, 0) + processes.pss_bytes(row.pid)
    return found


def index_of(server: Server, offset: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of the repository index."""
    path = "/v2/repository/index"
    if limit is not None:
        path += f"?offset={offset}&limit={limit}"
    status, body = server.request("POST", path, b"{}")
    if status != 200:
        raise server.blame(f"answered {path} with {status}: {body[:200]!r}")
    rows: list[dict[str, Any]] = msgspec.json.decode(body)
    return rows


def drop_page_cache() -> bool:
    """Have the kernel forget what it has read; False where we may not."""
    os.sync()
    with contextlib.suppress(OSError):
        _DROP.write_text("3")
        return True
    return False
