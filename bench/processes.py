"""What the kernel knows of a server's processes: family, descriptors, I/O, and what they leave.

Everything is read from /proc, so that it holds also when the server's own books are wrong.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

POLL_S: Final = 0.02
SHARED_MEMORY: Final = Path("/dev/shm")
TEMPORARY: Final = Path("/tmp")
_INODE: Final = re.compile(r":\[\d+\]$")


@dataclass(slots=True, frozen=True)
class Row:
    """One living process; zombies are not alive."""

    pid: int
    parent: int
    session: int
    started_ticks: int  # tells a process from a later one with the same pid


def read_row(pid: int) -> Row | None:
    """Return a process's row, None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    return Row(pid, int(fields[1]), int(fields[3]), int(fields[19]))


def all_rows() -> list[Row]:
    """Return every living process."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [row for pid in pids if (row := read_row(pid)) is not None]


def family(root: int) -> list[Row]:
    """Return a server's processes: the root, its descendants, and what shares its session.

    A child whose parent has died hangs on init, but it is still of the session.
    """
    rows = all_rows()
    found = {row.pid: row for row in rows if row.pid == root or row.session == root}
    while True:
        more = {row.pid: row for row in rows if row.parent in found and row.pid not in found}
        if not more:
            return list(found.values())
        found |= more


def is_same(row: Row) -> bool:
    """Whether this very process still lives."""
    now = read_row(row.pid)
    return now is not None and now.started_ticks == row.started_ticks


def command(pid: int) -> str:
    """Return a process's command line, for messages."""
    with contextlib.suppress(OSError):
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:160]
    return "?"


def descriptors(pid: int) -> dict[str, int]:
    """Return a process's open descriptors, counted by what they are.

    Inode numbers are taken off, so that two sockets count as the same kind of thing.
    """
    kinds: dict[str, int] = {}
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            with contextlib.suppress(OSError):
                kind = _INODE.sub("", os.readlink(f"{folder}/{entry}"))
                kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def difference(before: dict[str, int], after: dict[str, int]) -> str:
    """Say in words which descriptors are more or fewer; empty when none."""
    changes = [
        f"{kind} {before.get(kind, 0)} -> {after.get(kind, 0)}"
        for kind in sorted(before.keys() | after.keys())
        if before.get(kind, 0) != after.get(kind, 0)
    ]
    return ", ".join(changes)


@dataclass(slots=True, frozen=True)
class Io:
    """Bytes that a process has read: from the device, and by read calls of any kind."""

    device_bytes: int
    call_bytes: int


def read_io(pid: int) -> Io | None:
    """Return what /proc says a process has read; None where the kernel does not tell."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(": ") for line in lines)
    return Io(int(values["read_bytes"]), int(values["rchar"]))


def pss_bytes(pid: int) -> int:
    """Memory of a process, what it shares counted in part; 0 for one that is gone."""
    return _rollup(pid, ("Pss:",))


def own_bytes(pid: int) -> int:
    """Memory that a process alone has written to; 0 for one that is gone.

    Clean pages of libraries are left out: whose they are depends on what else happens to run.
    """
    return _rollup(pid, ("Private_Dirty:",))


def _rollup(pid: int, names: tuple[str, ...]) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))


def mappings(pid: int) -> int:
    """How many ranges of memory a process has mapped; 0 for one that is gone."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(
    condition: Callable[[], bool], limit_s: float, on_wait: Callable[[], None] = lambda: None
) -> bool:
    """Poll until a condition holds; False when it never did."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        on_wait()
        time.sleep(POLL_S)
    return True


class Residue:
    """Files that appear in /dev/shm, /tmp and the given folders while a server runs.

    /tmp is everybody's: there, only names that say they are ours count.  The server's own TMPDIR is
    one of the given folders, and there everything counts.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._before = self._list()

    def _list(self) -> set[str]:
        found = {str(path) for folder in self._folders for path in folder.rglob("*")}
        found |= {str(path) for path in TEMPORARY.glob("*overcommit*")}
        with contextlib.suppress(OSError):
            for entry in os.scandir(SHARED_MEMORY):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                        found.add(entry.path)
        return found

    def new(self) -> list[str]:
        """Return what is there now and was not at the start."""
        return sorted(self._list() - self._before)
