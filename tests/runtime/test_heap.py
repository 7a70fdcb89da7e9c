"""The heap of a worker: what a batch frees stays, what an idle worker has freed goes."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from overcommit.runtime import heap
from overcommit.runtime.config import HEAP_IDLE_NS

START_NS = 1_000_000_000

# Both are settings of a whole process, so it is one of its own.  bytearrays are the C library's.
SCRIPT = """
import resource
from pathlib import Path
from overcommit.runtime import heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def batch():
    blocks = [bytearray(b"x") * (3 << 20) for _ in range(8)]
    return len(blocks)

assert heap.keep()
batch()
before = faults()
for _ in range(10):
    batch()
print(faults() - before)
kept = resident_bytes()
heap.trim()
print(kept - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_a_batch_frees_serves_the_next_one_until_it_is_trimmed() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    faults, given_back = map(int, run.stdout.split())
    # Each batch is 6,144 pages, and the blocks are above the 128 KiB that glibc maps one by one.
    assert faults < 600
    assert given_back > 12 << 20


def test_an_idle_worker_trims_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(heap, "trim", lambda: trims.append(1))
    mine = heap.Heap()
    assert not mine.trim_if_due(3, START_NS)
    assert not mine.trim_if_due(3, START_NS + HEAP_IDLE_NS - 1)
    assert mine.trim_if_due(3, START_NS + HEAP_IDLE_NS)
    assert not mine.trim_if_due(3, START_NS + 9 * HEAP_IDLE_NS)
    assert len(trims) == 1


def test_a_batch_begins_the_time_anew() -> None:
    mine = heap.Heap()
    assert not mine.trim_if_due(1, START_NS)
    assert not mine.trim_if_due(2, START_NS + HEAP_IDLE_NS)
    assert not mine.trim_if_due(2, START_NS + 2 * HEAP_IDLE_NS - 1)
    assert mine.trim_if_due(2, START_NS + 2 * HEAP_IDLE_NS)


def test_a_worker_that_never_ran_has_nothing_to_give() -> None:
    assert not heap.Heap().trim_if_due(0, 99 * HEAP_IDLE_NS)
