from __future__ import annotations

import sys
from pathlib import Path

import pytest

from overcommit.bench.errors import BenchError
from overcommit.bench.peers.process import PeerProcess
from overcommit.bench.processes import Row, is_same, read_row, wait_for

# A process that leaves an orphan in a session of its own, as Ray and others do, and says its pid.
ORPHAN = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    with open(sys.argv[1] + ".aside", "w") as file:
        file.write(str(os.getpid()))
    os.rename(sys.argv[1] + ".aside", sys.argv[1])
    time.sleep(600)
os.wait()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print("last words", flush=True)
if sys.argv[2] == "stay":
    time.sleep(600)
sys.exit(3)
"""


def start(tmp_path: Path, how: str) -> tuple[PeerProcess, Path]:
    said = tmp_path / "orphan.pid"
    argv = [sys.executable, "-c", ORPHAN, str(said), how]
    is_ready = said.exists if how == "stay" else lambda: False
    return PeerProcess("peer", argv, tmp_path / "peer.log", {}, is_ready), said


def orphan_of(said: Path) -> Row | None:
    return read_row(int(said.read_text()))


def test_all_processes_are_gone_when_the_block_fails(tmp_path: Path) -> None:
    process, said = start(tmp_path, "stay")
    with pytest.raises(RuntimeError), process:  # noqa: PT012
        orphan = orphan_of(said)
        assert orphan is not None
        rows = process.family()
        assert {orphan.pid, process.pid} <= {row.pid for row in rows}
        raise RuntimeError("the scenario fails")
    assert not any(is_same(row) for row in rows)


def test_an_orphan_of_a_peer_that_does_not_start_is_ended_too(tmp_path: Path) -> None:
    process, said = start(tmp_path, "fail")
    with pytest.raises(BenchError, match=r"(?s)status 3.*last words"):
        process.__enter__()
    pid = int(said.read_text())
    assert wait_for(lambda: read_row(pid) is None, 60.0)


def test_our_settings_do_not_reach_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERCOMMIT_WORKERS", "9")
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    code = "import os; print(sorted(os.environ)); raise SystemExit(1)"
    log = tmp_path / "log"
    with pytest.raises(BenchError):
        PeerProcess(
            "peer", [sys.executable, "-c", code], log, {"A": "b"}, lambda: False
        ).__enter__()
    names = log.read_text()
    assert "'A'" in names
    assert "OVERCOMMIT_WORKERS" not in names
    assert "PYTHONPATH" not in names
