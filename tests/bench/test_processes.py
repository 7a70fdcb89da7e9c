"""What /proc says, about processes that we know."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from overcommit.bench import processes
from overcommit.bench.killer import Killer
from overcommit.bench.processes import Residue

# A parent in a session of its own with one child; both wait until standard input ends.
PARENT = "import subprocess, sys; c = subprocess.Popen(['cat']); print(c.pid, flush=True); c.wait()"


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        yield process
        process.kill()


def child_of(parent: subprocess.Popen[bytes]) -> int:
    assert parent.stdout is not None
    return int(parent.stdout.readline())


def test_a_family_has_its_children_also_when_their_parent_is_dead(
    parent: subprocess.Popen[bytes],
) -> None:
    child = child_of(parent)
    assert {row.pid for row in processes.family(parent.pid)} == {parent.pid, child}
    parent.kill()
    parent.wait()
    assert [row.pid for row in processes.family(parent.pid)] == [child]


def test_a_process_that_ended_is_not_the_same_any_more(parent: subprocess.Popen[bytes]) -> None:
    child_of(parent)
    row = processes.read_row(parent.pid)
    assert row is not None
    assert processes.is_same(row)
    parent.kill()
    processes.wait_for(lambda: processes.read_row(parent.pid) is None, 30)
    assert not processes.is_same(row)  # a zombie until it is reaped


def test_one_more_descriptor_is_named() -> None:
    before = processes.descriptors(os.getpid())
    fd = os.memfd_create("overcommit-test")
    try:
        after = processes.descriptors(os.getpid())
    finally:
        os.close(fd)
    assert "memfd:overcommit-test" in processes.difference(before, after)
    assert processes.difference(before, before) == ""


def test_sockets_are_one_kind_whatever_their_number() -> None:
    reader, writer = os.pipe()
    try:
        assert all("[" not in kind.rpartition(":")[2] for kind in ("pipe", "socket"))
        assert processes.descriptors(os.getpid())["pipe"] >= 2
    finally:
        os.close(reader)
        os.close(writer)


def test_what_a_process_reads_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    before = processes.read_io(os.getpid())
    path.read_bytes()
    after = processes.read_io(os.getpid())
    if before is None or after is None:
        pytest.skip("this kernel does not account for I/O")
    assert after.call_bytes - before.call_bytes >= 1 << 20


def test_a_file_left_behind_is_found(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    residue = Residue(tmp_path)
    assert residue.new() == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "new").touch()
    assert residue.new() == [str(tmp_path / "folder"), str(tmp_path / "folder" / "new")]


def test_a_wait_that_is_in_vain_ends() -> None:
    assert not processes.wait_for(lambda: False, 0.0)
    assert processes.wait_for(lambda: True, 0.0)


class FakeServer:
    """A server whose only worker is a known process."""

    def __init__(self, root: int, pid: int) -> None:
        self.root = root
        self.rows = [
            {"kind": "worker", "seat": 0, "state": "LIVE", "pid": pid},
            {"kind": "front_end", "seat": 0, "state": "LIVE", "pid": os.getpid()},
            {"kind": "worker", "seat": 1, "state": "STARTING", "pid": os.getpid()},
        ]

    def status(self) -> dict[str, object]:
        return {"processes": self.rows}

    def family(self) -> list[processes.Row]:
        return processes.family(self.root)


def test_the_killer_hits_live_processes_in_the_named_seats_only(
    parent: subprocess.Popen[bytes],
) -> None:
    child = child_of(parent)
    server = FakeServer(parent.pid, child)
    killer = Killer(server, [("worker", 0), ("worker", 1)], seed=1)  # type: ignore[arg-type]
    assert processes.wait_for(lambda: bool(killer.kills), 30, killer.tick)
    assert [(kill.kind, kill.seat, kill.pid) for kill in killer.kills] == [("worker", 0, child)]
    assert processes.wait_for(lambda: processes.read_row(child) is None, 30)


def test_the_killer_spares_a_process_that_is_not_the_servers(
    parent: subprocess.Popen[bytes],
) -> None:
    child = child_of(parent)
    server = FakeServer(parent.pid, child)
    stranger = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    with stranger:
        server.rows[0]["pid"] = stranger.pid
        killer = Killer(server, [("worker", 0)], seed=1)  # type: ignore[arg-type]
        looks: list[int] = []
        server.family = lambda: looks.append(1) or processes.family(parent.pid)  # type: ignore
        assert processes.wait_for(lambda: bool(looks), 30, killer.tick)
        assert killer.kills == []
        assert stranger.poll() is None
        stranger.kill()
