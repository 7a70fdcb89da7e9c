"""Memory ordering between two processes: outcomes that must never be seen, and the proof that the test
would see them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROUNDS = 1_000_000
# Of the test without a fence: one has always been enough with two free cores, and when others keep
# them busy, the two threads may take turns for long.
TRIES = 100

Litmus = Callable[[str], int]

needs_two_cpus = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="stores of two CPUs are needed to be out of order"
)


def build(folder: Path, *flags: str) -> Litmus:
    program = folder / "litmus"
    include = HERE.parents[1] / "runtime"
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{include}", *flags]
    subprocess.run([*command, str(HERE / "litmus.c"), "-o", str(program)], check=True)

    def run(test: str) -> int:
        done = subprocess.run(
            [str(program), test, str(ROUNDS)], check=True, capture_output=True, timeout=300
        )
        return int(done.stdout)

    return run


@needs_two_cpus
def test_no_wake_up_and_no_lease_is_missed_with_the_fence(tmp_path: Path) -> None:
    litmus = build(tmp_path)
    assert [litmus("store_load") for _ in range(2)] == [0, 0]


@needs_two_cpus
def test_without_the_fence_the_same_test_sees_the_bug(tmp_path: Path) -> None:
    litmus = build(tmp_path, "-DOVERCOMMIT_OMIT_FENCE")
    assert any(litmus("store_load") for _ in range(TRIES))


@needs_two_cpus
def test_a_slot_is_never_seen_before_its_bytes(tmp_path: Path) -> None:
    assert build(tmp_path)("message") == 0
