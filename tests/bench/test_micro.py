"""The micro benchmarks run and leave nothing behind; how fast is not a test's business."""

from __future__ import annotations

import os
from contextlib import ExitStack

from overcommit.bench import micro
from overcommit.bench.micro import Operation


def test_every_operation_runs_and_has_a_time() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        chosen = micro.operations(stack)
        found = micro.measure(chosen, rounds=2, round_ns=100_000)
    assert set(found) == {operation.name for operation in chosen}
    assert all(len(values) == 2 and values[0] > 0 for values in found.values())
    assert {operation.limit for operation in chosen} - {""} <= set(found)
    assert set(micro.HEADLINES) <= set(found)
    del chosen  # the link's mapping goes with it
    assert len(os.listdir("/proc/self/fd")) <= before


def test_rounds_alternate_between_operations() -> None:
    order: list[str] = []
    chosen = [Operation(name, lambda count, name=name: order.append(name)) for name in "ab"]
    micro.measure(chosen, rounds=4, round_ns=0)
    assert "".join(order[-8:]) == "baabbaab"
