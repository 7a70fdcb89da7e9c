"""Rings, doorbells and the words of residency: edges, lies of a peer, and two real processes."""

from __future__ import annotations

import collections
import mmap
import os
import select
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overcommit.runtime import _shm

ROOT = Path(__file__).resolve().parents[2]
SLOTS = 4


def memory(slots: int = SLOTS) -> mmap.mmap:
    made = mmap.mmap(-1, _shm.ring_bytes(slots))
    _shm.create_ring(made, 0, slots, 1, 7, 9)
    return made


def ends(made: mmap.mmap) -> tuple[_shm.SubmissionRing, _shm.SubmissionRing]:
    return _shm.SubmissionRing(made, 0, True, 7, 9), _shm.SubmissionRing(made, 0, False, 7, 9)


def push(ring: _shm.SubmissionRing, request_id: int) -> bool:
    return ring.push(request_id, 1, 2, 3, 4, 5, _shm.SUBMIT, 6, 0)


def ids(ring: _shm.SubmissionRing, limit: int = 100) -> list[int]:
    return [submission[0] for submission in ring.pop(limit)]


def test_what_is_pushed_is_popped_with_every_field() -> None:
    producer, consumer = ends(memory())
    assert producer.push(2**64 - 1, 2**63, 3, 4, 2**32 - 1, 6, 65535, 65535, 2**32 - 1)
    got = consumer.pop(1)[0]
    assert got[:2] == (2**64 - 1, 2**63)
    assert got[3:] == (3, 4, 2**32 - 1, 6, 65535, 65535, 2**32 - 1)
    assert got[2] > 0  # submitted_ns


def test_a_look_at_the_next_submission_leaves_it_there() -> None:
    made = memory()
    producer, consumer = ends(made)
    assert consumer.peek() == -1
    for model in (65535, 3):
        assert producer.push(1, 1, 2, 3, 4, 5, _shm.SUBMIT, model, 0)
    assert [consumer.peek(), consumer.peek(), consumer.depth()] == [65535, 65535, 2]
    consumer.pop(1)
    assert consumer.peek() == 3
    consumer.pop(1)
    assert consumer.peek() == -1
    assert producer.push(1, 1, 2, 3, 4, 5, _shm.CANCEL, 3, 0)
    assert consumer.peek() == -1
    with pytest.raises(ValueError, match="only the consumer"):
        producer.peek()


def test_a_slot_that_lies_is_nothing_to_look_at() -> None:
    made = memory()
    producer, consumer = ends(made)
    push(producer, 1)
    struct.pack_into("=Q", made, _shm.RING_HEADER_BYTES, 77)
    assert consumer.peek() == -1
    with pytest.raises(_shm.RingCorrupt):
        consumer.pop(1)


def test_completions_carry_every_field() -> None:
    made = mmap.mmap(-1, _shm.ring_bytes(SLOTS))
    _shm.create_ring(made, 0, SLOTS, 2, 9, 7)
    producer = _shm.CompletionRing(made, 0, True, 9, 7)
    consumer = _shm.CompletionRing(made, 0, False, 9, 7)
    assert producer.push(1, 2, 3, 4, 5, _shm.TOO_LARGE, 7, 2**64 - 1)
    assert consumer.pop(5) == [(1, 2, 3, 4, 5, _shm.TOO_LARGE, 7, 2**64 - 1)]


def test_a_full_ring_refuses_and_takes_again_after_a_pop() -> None:
    producer, consumer = ends(memory())
    assert [push(producer, i) for i in range(SLOTS + 1)] == [True] * SLOTS + [False]
    assert ids(consumer, 1) == [0]
    assert push(producer, 99)
    assert ids(consumer) == [1, 2, 3, 99]
    assert consumer.depth() == 0


def test_pop_returns_nothing_until_tail_moves() -> None:
    producer, consumer = ends(memory())
    assert ids(consumer) == []
    push(producer, 1)
    assert ids(consumer) == [1]


def test_a_ring_of_one_slot_works() -> None:
    producer, consumer = ends(memory(1))
    for i in range(5):
        assert push(producer, i)
        assert not push(producer, i)
        assert ids(consumer) == [i]


def test_an_attached_end_goes_on_where_the_counters_are() -> None:
    made = memory()
    producer, consumer = ends(made)
    for i in range(3):
        push(producer, i)
    ids(consumer, 2)
    assert ids(ends(made)[1]) == [2]


@pytest.mark.parametrize("slots", [0, 3, -1])
def test_a_slot_count_that_is_no_power_of_two_is_refused(slots: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        _shm.ring_bytes(slots)


def test_wrong_headers_are_refused() -> None:
    made = memory()
    with pytest.raises(_shm.RingCorrupt, match="incarnations"):
        _shm.SubmissionRing(made, 0, True, 8, 9)
    with pytest.raises(_shm.RingCorrupt, match="kind"):
        _shm.CompletionRing(made, 0, True, 7, 9)
    with pytest.raises(_shm.RingCorrupt, match="kind"):
        _shm.SubmissionRing(mmap.mmap(-1, 8192), 0, True, 7, 9)
    with pytest.raises(ValueError, match="needs"):
        _shm.SubmissionRing(made, len(made) - 128, True, 7, 9)
    with pytest.raises(ValueError, match="aligned"):
        _shm.SubmissionRing(made, 8, True, 7, 9)
    struct.pack_into("=I", made, 8, 1 << 10)  # a slot count that does not fit
    with pytest.raises(_shm.RingCorrupt, match="fit"):
        _shm.SubmissionRing(made, 0, True, 7, 9)


def test_a_peer_that_lies_about_the_tail_or_the_sequence_is_found() -> None:
    made = memory()
    producer, consumer = ends(made)
    struct.pack_into("=Q", made, _shm.LINE, SLOTS + 1)
    with pytest.raises(_shm.RingCorrupt, match="tail"):
        consumer.pop(1)
    made = memory()
    producer, consumer = ends(made)
    push(producer, 1)
    struct.pack_into("=Q", made, _shm.RING_HEADER_BYTES, 77)
    with pytest.raises(_shm.RingCorrupt, match="sequence"):
        consumer.pop(1)


def test_values_over_their_field_are_refused_and_nothing_is_published() -> None:
    producer, consumer = ends(memory())
    with pytest.raises(OverflowError):
        producer.push(1, 1, 1, 1, 2**32, 1, 1, 1, 1)
    with pytest.raises(OverflowError):
        producer.push(1, 1, 1, 1, 1, 1, 1, 2**16, 1)
    with pytest.raises(OverflowError):
        producer.push(2**64, 1, 1, 1, 1, 1, 1, 1, 1)
    assert ids(consumer) == []


def test_only_the_producer_pushes_and_only_the_consumer_pops() -> None:
    producer, consumer = ends(memory())
    with pytest.raises(ValueError, match="producer"):
        push(consumer, 1)
    with pytest.raises(ValueError, match="consumer"):
        producer.pop(1)


def test_arming_finds_what_was_pushed_before_and_asks_for_what_comes_after() -> None:
    producer, consumer = ends(memory())
    assert not producer.must_wake()
    assert _shm.arm([consumer])
    push(producer, 1)
    assert producer.must_wake()
    assert not _shm.arm([consumer])  # and is disarmed again
    assert not producer.must_wake()
    ids(consumer)
    assert _shm.arm([consumer])
    _shm.disarm([consumer])
    assert not producer.must_wake()


def test_wait_returns_which_bell_rang_and_clears_it() -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    read, write = os.pipe()
    assert _shm.wait(bell, read, 0) == 0
    os.eventfd_write(bell, 3)
    assert _shm.wait(bell, read, -1) == _shm.DOORBELL
    assert _shm.wait(bell, read, 1000) == 0
    os.write(write, b"x")
    os.eventfd_write(bell, 1)
    assert _shm.wait(bell, read, -1) == _shm.DOORBELL | _shm.CONTROL
    for fd in (bell, read, write):
        os.close(fd)


class RingMachine(RuleBasedStateMachine):
    """A ring against a deque."""

    def __init__(self) -> None:
        super().__init__()
        self.producer, self.consumer = ends(memory())
        self.model: collections.deque[int] = collections.deque()
        self.armed = False
        self.next = 0

    @rule()
    def push_one(self) -> None:
        pushed = push(self.producer, self.next)
        assert pushed == (len(self.model) < SLOTS)
        if pushed:
            self.model.append(self.next)
            self.next += 1
            assert self.producer.must_wake() == self.armed

    @rule(limit=st.integers(0, 2 * SLOTS))
    def pop_some(self, limit: int) -> None:
        want = [self.model.popleft() for _ in range(min(limit, len(self.model)))]
        assert ids(self.consumer, limit) == want

    @precondition(lambda self: not self.armed)
    @rule()
    def arm(self) -> None:
        self.armed = _shm.arm([self.consumer])
        assert self.armed == (not self.model)

    @precondition(lambda self: self.armed)
    @rule()
    def disarm(self) -> None:
        _shm.disarm([self.consumer])
        self.armed = False

    @invariant()
    def counts(self) -> None:
        assert self.consumer.depth() == len(self.model)
        assert self.producer.tail() == self.next


TestRingMachine = RingMachine.TestCase


def test_no_wake_up_is_lost_between_two_processes() -> None:
    trips = 20_000
    half = _shm.ring_bytes(SLOTS)
    fd = os.memfd_create("link")
    os.ftruncate(fd, 2 * half)
    link = mmap.mmap(fd, 2 * half)
    _shm.create_ring(link, 0, SLOTS, 1, 7, 9)
    _shm.create_ring(link, half, SLOTS, 2, 9, 7)
    mine, theirs = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    life, hold = os.pipe()
    program = textwrap.dedent(
        f"""
        import mmap, os, sys
        from overcommit.runtime import _shm
        fd, mine, peer, life = map(int, sys.argv[1:])
        link = mmap.mmap(fd, {2 * half})
        take = _shm.SubmissionRing(link, 0, False, 7, 9)
        give = _shm.CompletionRing(link, {half}, True, 9, 7)
        while True:
            for item in take.pop(8):
                assert give.push(item[0], 0, 0, 0, 0, 0, 1, 0)
                if give.must_wake():
                    os.eventfd_write(peer, 1)
            if _shm.arm([take]):
                if _shm.wait(mine, life, -1) & _shm.CONTROL:
                    os._exit(0)
                _shm.disarm([take])
        """
    )
    arguments = [str(n) for n in (fd, theirs, mine, life)]
    child = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        pass_fds=(fd, theirs, mine, life),
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    give = _shm.SubmissionRing(link, 0, True, 7, 9)
    take = _shm.CompletionRing(link, half, False, 9, 7)
    quiet, _ = os.pipe()
    try:
        for trip in range(trips):
            assert push(give, trip)
            if give.must_wake():
                os.eventfd_write(theirs, 1)
            while not (got := take.pop(8)):
                if _shm.arm([take]):
                    # A watchdog, not a limit: a lost wake-up would sleep here for ever.
                    bits = _shm.wait(mine, quiet, 60_000_000_000)
                    assert bits, f"trip {trip} was never answered"
                    _shm.disarm([take])
            assert [item[0] for item in got] == [trip]
    finally:
        os.close(hold)
        child.wait(30)
    assert child.returncode == 0


# --- residency words ------------------------------------------------------------------------------
def words(count: int = 8) -> tuple[_shm.ResidencyTable, _shm.LeasePage, _shm.LeasePage]:
    table = _shm.ResidencyTable(mmap.mmap(-1, _shm.table_bytes(count)), 0, count, True)
    pages = [
        _shm.LeasePage(mmap.mmap(-1, _shm.lease_page_bytes(count)), 0, count, True)
        for _ in range(2)
    ]
    return table, pages[0], pages[1]


def test_a_leased_version_is_not_evicted_and_an_evicted_one_is_not_leased() -> None:
    table, one, two = words()
    table.set(3, _shm.RESIDENT, 5)
    assert one.take(table, 3, 5)
    assert not _shm.try_evict(table, (one, two), 3, 5)
    assert table.get(3) == (_shm.RESIDENT, 5)
    one.drop(3)
    assert _shm.try_evict(table, (one, two), 3, 5)
    assert table.get(3) == (_shm.EVICTING, 5)
    assert not two.take(table, 3, 5)
    assert two.read(3)[0] == 0


def test_leases_taken_together_are_refused_one_by_one() -> None:
    table, one, two = words()
    for slot, state in ((1, _shm.RESIDENT), (2, _shm.EVICTING), (3, _shm.RESIDENT)):
        table.set(slot, state, 5)
    table.set(4, _shm.RESIDENT, 6)
    slots = [1, 2, 3, 4]
    assert one.take_all(table, slots, [5, 5, 5, 5]) == [1, 3]
    assert [one.read(slot)[0] for slot in slots] == [1, 0, 1, 0]
    assert not _shm.try_evict(table, (one, two), 3, 5)
    one.drop_all([1, 3])
    assert [one.read(slot)[0] for slot in slots] == [0, 0, 0, 0]
    assert _shm.try_evict(table, (one, two), 3, 5)


@pytest.mark.parametrize(
    ("slots", "generations", "error"),
    [
        ([1, 8], [5, 5], IndexError),
        ([1], [5, 5], TypeError),
        ([1] * 65, [5] * 65, TypeError),
        ((1,), (5,), TypeError),
        ([1], [-1], OverflowError),
    ],
)
def test_leases_that_cannot_be_taken_together_take_none(
    slots: list[int], generations: list[int], error: type[Exception]
) -> None:
    table, one, _ = words()
    table.set(1, _shm.RESIDENT, 5)
    with pytest.raises(error):
        one.take_all(table, slots, generations)
    assert one.read(1)[0] == 0


def test_a_lease_of_another_generation_is_refused() -> None:
    table, one, _ = words()
    table.set(3, _shm.RESIDENT, 5)
    assert not one.take(table, 3, 4)
    with pytest.raises(ValueError, match="generation"):
        _shm.try_evict(table, (one,), 3, 4)


def test_counters_and_the_hungry_word() -> None:
    table, one, _ = words()
    one.set_waiting(2, 7)
    one.add_uses(2, 3, 100)
    one.add_uses(2, 1, 200)
    assert one.read(2) == (0, 7, 4, 200)
    one.add_all_uses([2, 3], [5, 1], 300)
    assert [one.read(slot)[2:] for slot in (2, 3)] == [(9, 300), (1, 300)]
    assert not table.hungry()
    table.set_hungry(True)
    assert table.hungry()


@pytest.mark.parametrize(
    ("slots", "requests", "error"),
    [([1, 9], [1, 1], IndexError), ([1], [1, 1], TypeError), ((1,), (1,), TypeError)],
)
def test_uses_of_versions_that_are_not_there_are_refused(
    slots: list[int], requests: list[int], error: type[Exception]
) -> None:
    _, one, _ = words()
    with pytest.raises(error):
        one.add_all_uses(slots, requests, 100)


def test_slots_out_of_range_and_read_only_views_are_refused() -> None:
    table, one, _ = words()
    for call in (lambda: table.get(8), lambda: one.read(8), lambda: one.drop(9)):
        with pytest.raises(IndexError):
            call()
    readable = _shm.LeasePage(mmap.mmap(-1, 4096), 0, 8, False)
    with pytest.raises(ValueError, match="read-only"):
        readable.drop(1)


def test_the_status_page_names_the_batch_until_it_ends() -> None:
    page = mmap.mmap(-1, _shm.STATUS_BYTES)
    status = _shm.StatusPage(page, 0, True)
    status.begin(5, _shm.PHASE_COMPUTE, 100, list(range(70)))
    status.heartbeat(7)
    heartbeat, started, phase, model, suspects = _shm.StatusPage(page, 0, False).read()
    assert (heartbeat, started, phase, model) == (7, 100, _shm.PHASE_COMPUTE, 5)
    assert suspects == list(range(_shm.STATUS_BATCH_MAX))
    status.end()
    assert status.read()[1:] == (0, _shm.PHASE_IDLE, 5, [])


def test_select_can_wait_for_a_doorbell() -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(bell, 1)
    assert select.select([bell], [], [], 0)[0] == [bell]
    os.close(bell)
