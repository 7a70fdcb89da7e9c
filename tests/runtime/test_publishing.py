"""Versions that the mover publishes: when the word is written, who is woken, and what its death leaves."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from mover_rig import WATCHDOG_S, Memory, MoverProcess, make_image
from residency_world import CHUNK, SECOND

from overcommit.runtime import _shm
from overcommit.runtime.activation import Activations
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.children import Child
from overcommit.runtime.config import MIB, Settings
from overcommit.runtime.copier import Memcpy
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.image_file import Span
from overcommit.runtime.messages import Message
from overcommit.runtime.mover import Mover
from overcommit.runtime.mover_messages import Load, LoadDone, Populated, Urgency
from overcommit.runtime.places import Base
from overcommit.runtime.policy import make_policy
from overcommit.runtime.publishing import Publisher
from overcommit.runtime.quarantine import Quarantine
from overcommit.runtime.registry import Registry
from overcommit.runtime.residency import Residency
from overcommit.runtime.residents import NOBODY, State, Terms, Usage
from overcommit.runtime.worker_messages import Activate, Placed

SLOTS = 8
Word = tuple[int, int]


def make_table() -> _shm.ResidencyTable:
    return _shm.ResidencyTable(mmap.mmap(-1, _shm.table_bytes(SLOTS)), 0, SLOTS, True)


class Watching(Memcpy):
    """Notes what the word of slot 3 said at each copy."""

    def __init__(self, table: _shm.ResidencyTable) -> None:
        super().__init__()
        self.words: list[Word] = []
        self._table = table

    def copy(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        self.words.append(self._table.get(3))
        super().copy(sources, targets, urgency)


@dataclass
class Bench:
    """A mover's threads over 32 MiB twice, a table, and the bell of the worker in seat 2."""

    table: _shm.ResidencyTable = field(default_factory=make_table)
    bell: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))

    def __post_init__(self) -> None:
        self.device, self.host = Memory("device", 32 * MIB), Memory("host", 32 * MIB)
        self.said: queue.Queue[tuple[Message, Word]] = queue.Queue()
        self.copier = Watching(self.table)
        publisher = Publisher(self.table)
        publisher.on_bell(2, os.dup(self.bell))
        self.table.set(3, _shm.LOADING, 6)
        self.make_mover(self.copier, publisher)

    def make_mover(self, copier: Memcpy, publisher: Publisher) -> None:
        """Any former one is closed."""
        self.mover = Mover(
            Base("device", self.device.address, 32 * MIB),
            Base("host", self.host.address, 32 * MIB),
            lambda message: self.said.put((message, self.table.get(3))),
            copier,
            publisher,
        )

    def end_of(self, load: Load) -> tuple[LoadDone, Word]:
        """Do a load; return its LoadDone, and what the word said when that was sent."""
        self.mover.add(load)
        while True:
            message, word = self.said.get(timeout=WATCHDOG_S)
            if not isinstance(message, Populated):
                assert isinstance(message, LoadDone)
                self.mover.close()  # what follows LoadDone has been done
                return message, word

    def close(self) -> None:
        self.mover.close()
        self.device.close()
        self.host.close()
        os.close(self.bell)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def load_of(nbytes: int, source: str = "host", path: str = "nowhere") -> Load:
    return Load(
        job=1,
        slot=3,
        source=source,  # type: ignore[arg-type]
        path=path,
        nbytes=nbytes,
        host=((0, nbytes),),
        device=((2 * MIB, nbytes),),
        publishes=7,
        waiters=(NOBODY, 2, 5),
    )


@pytest.mark.parametrize("nbytes", [MIB, 24 * MIB])
def test_the_word_is_written_after_the_last_byte_and_before_load_done(
    nbytes: int, bench: Bench
) -> None:
    done, word = bench.end_of(load_of(nbytes))
    assert done.ok
    assert word == (_shm.RESIDENT, 7)
    assert all(state == _shm.LOADING for state, _ in bench.copier.words)
    assert os.eventfd_read(bench.bell) > 0


def test_a_load_of_one_step_is_announced_before_it_is_copied(bench: Bench) -> None:
    bench.end_of(load_of(MIB))
    assert bench.copier.words == [(_shm.LOADING, 7)]
    assert os.eventfd_read(bench.bell) == 2, "announced, and there"


class LastToEnd(Watching):
    """Has the thread that begins a load end its piece when the load was announced."""

    def __init__(self, table: _shm.ResidencyTable) -> None:
        super().__init__(table)
        self.is_announced = threading.Event()

    def copy(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        super().copy(sources, targets, urgency)
        if threading.current_thread() is threading.main_thread():
            assert self.is_announced.wait(WATCHDOG_S)


def test_who_has_the_last_step_cannot_end_it_while_another_announces_the_load(
    bench: Bench,
) -> None:
    bench.mover.close()
    could_end: list[bool] = []
    copier = LastToEnd(bench.table)

    class Table:
        def set(self, slot: int, state: int, generation: int) -> None:
            if state == _shm.LOADING:
                # Where another could end the load now, this word would come after RESIDENT.
                could_end.append(bench.mover._lock.acquire(blocking=False))
                if could_end[-1]:
                    bench.mover._lock.release()
            bench.table.set(slot, state, generation)
            copier.is_announced.set()

    bench.make_mover(copier, Publisher(cast(_shm.ResidencyTable, Table())))
    done, word = bench.end_of(load_of(24 * MIB))
    assert done.ok
    assert could_end == [False]
    assert word == bench.table.get(3) == (_shm.RESIDENT, 7)


def test_a_load_that_fails_publishes_nothing(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "torn.image"
    make_image(path, MIB)
    os.truncate(path, MIB // 2)
    done, word = bench.end_of(load_of(MIB, "disk", str(path)))
    assert not done.ok
    assert word[0] == _shm.LOADING
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bench.bell)


def test_a_worker_that_took_a_seat_over_is_rung_in_its_place(bench: Bench) -> None:
    successor = os.eventfd(0, os.EFD_NONBLOCK)
    bench.mover.publisher.on_bell(2, os.dup(successor))
    bench.end_of(load_of(MIB))
    assert os.eventfd_read(successor) > 0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bench.bell)
    os.close(successor)


def test_a_bell_that_is_replaced_while_it_is_rung_rings_one_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publisher = Publisher()
    former, successor = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    publisher.on_bell(2, os.dup(former))
    ring = os.eventfd_write

    def ring_late(bell: int, value: int) -> None:
        """Between the look at the bell and its system call another thread runs."""
        publisher.on_bell(2, os.dup(successor))
        ring(bell, value)

    monkeypatch.setattr(os, "eventfd_write", ring_late)
    publisher.ring(load_of(MIB))
    assert os.eventfd_read(successor) == 1
    assert not os.get_inheritable(publisher._bells[2])
    with pytest.raises(BlockingIOError):
        os.eventfd_read(former)
    for bell in (former, successor, publisher._bells[2]):
        os.close(bell)


def test_a_rehearsal_moves_and_says_nothing(bench: Bench) -> None:
    assert not bench.mover.rehearse(), "nothing to rehearse yet"
    done, _ = bench.end_of(load_of(24 * MIB))
    assert done.ok
    bench.host.fill(5)
    bench.device.fill(6)
    copies = len(bench.copier.words)
    assert bench.mover.rehearse()
    assert len(bench.copier.words) == copies
    assert bench.said.empty()
    assert bytes(bench.device.view) == b"\6" * (32 * MIB)


def test_a_mover_that_is_rung_serves_as_before(bench: Bench) -> None:
    bench.mover.close()
    process = MoverProcess(bench.device, bench.host)
    for number in range(3):  # at first it has nothing to rehearse
        bench.device.fill(1)
        bench.host.fill(10 + number)
        os.eventfd_write(process.bell, 1)
        assert process.load(load_of(MIB)).ok
        assert process.load(load_of(24 * MIB)).ok
        assert (
            bench.device.read(((2 * MIB, 24 * MIB),), 24 * MIB) == bytes([10 + number]) * 24 * MIB
        )
    process.close()


# --- the supervisor's side ------------------------------------------------------------------------
class TablePort:
    """Residency's words in a real table, nobody's leases."""

    def __init__(self, table: _shm.ResidencyTable) -> None:
        self.table = table

    def try_evict(self, slot: int, generation: int) -> bool:
        return _shm.try_evict(self.table, (), slot, generation)

    def usage(self, slot: int) -> Usage:
        return Usage(waiting=1, uses=0, last_used_ns=0, leases=0)

    def set_state(self, slot: int, state: int, generation: int) -> None:
        self.table.set(slot, state, generation)

    def set_hungry(self, hungry: bool) -> None:
        self.table.set_hungry(hungry)


class Supervisor:
    """Activations of one version in slot 3, with a mover and a worker that only listen."""

    def __init__(self, table: _shm.ResidencyTable) -> None:
        self.to_mover: list[Message] = []
        self.to_worker: list[Message] = []
        mover = SimpleNamespace(post=self.to_mover.append)
        worker = SimpleNamespace(post=self.to_worker.append)
        self.rung: list[int] = []
        fleet = SimpleNamespace(
            of_kind=lambda kind, site: [mover],
            worker=lambda seat: worker,
            mover_bells=SimpleNamespace(ring=self.rung.append),
        )
        entry = SimpleNamespace(slot=3, image_path="nowhere", nbytes=CHUNK, ended=False)
        registry = SimpleNamespace(by_slot=lambda slot: entry)
        self.residency = Residency(
            *(ChunkAllocator(4 * CHUNK), ChunkAllocator(4 * CHUNK), lambda: make_policy("lru")),
            TablePort(table),
        )
        self.residency.add(3, "m", CHUNK, SECOND, Terms())
        self.activations = Activations(
            *(Settings(), self.residency, cast(Registry, registry), cast(Fleet, fleet)),
            *(Quarantine(), 0, lambda slot: True, table),
        )

    def ask(self) -> Load:
        self.activations.apply(self.residency.want(3, 2, SECOND), SECOND)
        (load,) = (message for message in self.to_mover if isinstance(message, Load))
        self.to_mover.clear()
        return load

    def activate(self) -> None:
        worker = SimpleNamespace(
            post=self.to_worker.append, seat=SimpleNamespace(index=2), told={3}
        )
        self.activations.on_activate(cast(Child, worker), Activate(slot=3), SECOND)

    def placed(self) -> list[Placed]:
        return [message for message in self.to_worker if isinstance(message, Placed)]


def test_what_a_mover_had_published_when_it_died_is_not_loaded_again() -> None:
    table = make_table()
    supervisor = Supervisor(table)
    load = supervisor.ask()
    assert (load.publishes, load.waiters) == (1, (2,))
    assert supervisor.placed() == []
    table.set(3, _shm.RESIDENT, load.publishes)  # its last deed
    supervisor.activations.on_mover_ready(2 * SECOND)
    assert supervisor.to_mover == []
    assert [placed.generation for placed in supervisor.placed()] == [1]
    view = supervisor.residency.view(3)
    assert view is not None
    assert view.state is State.DEVICE


def test_what_it_had_only_announced_is() -> None:
    table = make_table()
    supervisor = Supervisor(table)
    load = supervisor.ask()
    table.set(3, _shm.LOADING, load.publishes)
    supervisor.activations.on_mover_ready(2 * SECOND)
    assert supervisor.to_mover == [load]
    assert supervisor.placed() == []


def test_the_mover_is_rung_before_a_load_and_not_for_what_is_there() -> None:
    table = make_table()
    supervisor = Supervisor(table)
    supervisor.activate()
    (load,) = (message for message in supervisor.to_mover if isinstance(message, Load))
    assert supervisor.rung == [0]
    supervisor.activations.on_load_done(LoadDone(job=load.job, ok=True), 2 * SECOND)
    supervisor.activate()
    assert len(supervisor.placed()) == 2
    assert supervisor.rung == [0]
