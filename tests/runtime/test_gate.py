"""Residency's view of shared memory: whose uses they are."""

from __future__ import annotations

import mmap

from residency_world import CHUNK, SECOND

from overcommit.runtime import _shm
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.gate import SharedGate
from overcommit.runtime.policy import make_policy
from overcommit.runtime.residency import Residency
from overcommit.runtime.residents import StartLoad, State, Terms, Usage

SLOTS = 8


def page() -> _shm.LeasePage:
    return _shm.LeasePage(mmap.mmap(-1, _shm.lease_page_bytes(SLOTS)), 0, SLOTS, True)


def make_gate(pages: list[_shm.LeasePage]) -> SharedGate:
    memory = mmap.mmap(-1, _shm.table_bytes(SLOTS))
    return SharedGate(_shm.ResidencyTable(memory, 0, SLOTS, True), lambda: tuple(pages))


def test_the_uses_of_a_version_are_not_those_of_its_predecessor() -> None:
    pages = [page(), page()]
    gate = make_gate(pages)
    pages[0].add_uses(3, 1000, 50)
    pages[1].add_uses(3, 10, 60)
    assert gate.usage(3) == Usage(waiting=0, uses=1010, last_used_ns=60, leases=0)
    for _ in range(2):  # to say it twice changes nothing
        gate.forget(3)
        assert gate.usage(3) == Usage(waiting=0, uses=0, last_used_ns=0, leases=0)
    pages[1].add_uses(3, 2, 70)
    assert gate.usage(3) == Usage(waiting=0, uses=2, last_used_ns=70, leases=0)
    gate.forget(3)
    pages[0].add_uses(3, 1, 80)
    assert gate.usage(3).uses == 1


def test_a_worker_that_dies_takes_no_use_along_whoever_they_were_of() -> None:
    pages = [page(), page()]
    gate = make_gate(pages)
    pages[0].add_uses(3, 1000, 50)
    gate.forget(3)
    pages[1].add_uses(3, 5, 60)
    gate.keep_uses(pages[0], ())  # it knows of no version now
    del pages[0]
    assert gate.usage(3) == Usage(waiting=0, uses=5, last_used_ns=60, leases=0)
    pages[0].add_uses(4, 7, 70)
    gate.keep_uses(pages[0], (3, 4))
    pages.clear()
    assert (gate.usage(3).uses, gate.usage(4).uses) == (5, 7)


def test_a_successor_is_not_ranked_by_what_its_predecessor_was_asked() -> None:
    pages = [page()]
    gate = make_gate(pages)
    allocator = ChunkAllocator(2 * CHUNK)
    residency = Residency(allocator, None, lambda: make_policy("cost_aware"), gate)
    now_ns = SECOND

    def load(slot: int, uses: int) -> None:
        nonlocal now_ns
        residency.add(slot, f"m{slot}", CHUNK, now_ns, Terms())
        for action in residency.want(slot, 0, now_ns):
            if isinstance(action, StartLoad):
                now_ns += SECOND // 100
                residency.on_load_done(action.job, True, "", now_ns, SECOND // 100)
        now_ns += 1
        pages[0].add_uses(slot, uses, now_ns)
        now_ns += SECOND

    load(0, 1_000_000)
    residency.remove(0, now_ns)
    gate.forget(0)
    load(0, 1)
    load(1, 50_000)
    load(2, 1)
    views = [residency.view(slot) for slot in range(3)]
    states = [view.state for view in views if view is not None]
    assert states == [State.DISK, State.DEVICE, State.DEVICE]
