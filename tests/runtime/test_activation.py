"""Residency's decisions, carried out: what fails takes nothing along."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from residency_world import CHUNK, SECOND, FakePort

from overcommit.runtime.activation import Activations
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.boundary import Boundary
from overcommit.runtime.config import Settings
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.messages import Message
from overcommit.runtime.mover_messages import Load, LoadDone
from overcommit.runtime.policy import make_policy
from overcommit.runtime.quarantine import Quarantine
from overcommit.runtime.registry import Registry
from overcommit.runtime.residency import Residency
from overcommit.runtime.residents import State, Terms
from overcommit.runtime.worker_messages import ActivationFailed, Coming, Placed

BAD = 5  # of its slot nothing can be told


class Bench:
    """Activations of versions in slots 3 and BAD, a mover and two workers that only listen."""

    def __init__(self, mute: type[Message]) -> None:
        self.mute = mute
        self.to_mover: list[Message] = []
        self.to_worker: dict[int, list[Message]] = {1: [], 2: []}
        workers = {
            seat: SimpleNamespace(post=lambda message, told=told: self.post(message, told))
            for seat, told in self.to_worker.items()
        }
        mover = SimpleNamespace(post=lambda message: self.post(message, self.to_mover))
        fleet = SimpleNamespace(of_kind=lambda kind, site: [mover], worker=workers.__getitem__)
        registry = SimpleNamespace(
            by_slot=lambda slot: SimpleNamespace(slot=slot, image_path="nowhere", nbytes=CHUNK)
        )
        self.residency = Residency(
            ChunkAllocator(4 * CHUNK), None, lambda: make_policy("lru"), FakePort()
        )
        self.boundary = Boundary()
        for slot in (3, BAD):
            self.residency.add(slot, f"m{slot}", CHUNK, SECOND, Terms())
        self.activations = Activations(
            *(Settings(), self.residency, cast(Registry, registry), cast(Fleet, fleet)),
            Quarantine(),
            boundary=self.boundary,
        )

    def post(self, message: Message, told: list[Message]) -> None:
        if isinstance(message, self.mute) and getattr(message, "slot", None) == BAD:
            raise ProtocolError("too long")
        told.append(message)

    def want_both(self) -> None:
        actions = [
            *self.residency.want(BAD, 1, SECOND),
            *self.residency.want(3, 2, SECOND),
        ]
        self.activations.apply(actions, SECOND)

    def told(self, seat: int) -> list[type[Message]]:
        return [type(message) for message in self.to_worker[seat]]

    def state(self, slot: int) -> State:
        view = self.residency.view(slot)
        assert view is not None
        return view.state


def test_a_load_that_cannot_be_asked_for_has_failed_and_the_others_of_its_event_begin() -> None:
    bench = Bench(mute=Load)
    bench.want_both()
    assert [load.slot for load in bench.to_mover if isinstance(load, Load)] == [3]
    assert bench.told(1) == [ActivationFailed]
    assert bench.told(2) == [Coming]
    assert (bench.state(BAD), bench.state(3)) == (State.DISK, State.LOADING)
    assert [load.slot for load in bench.residency.loads_in_flight()] == [3]
    bench.to_mover.clear()
    bench.activations.on_mover_ready(2 * SECOND)  # the next mover gets what is in flight
    assert [load.slot for load in bench.to_mover if isinstance(load, Load)] == [3]
    assert [failure.what for failure in bench.boundary.failures()] == ["the start of a load"]


def test_a_worker_that_cannot_be_told_keeps_no_other_from_hearing() -> None:
    for mute in (Coming, Placed):
        bench = Bench(mute=mute)
        bench.want_both()
        jobs = [load.job for load in bench.to_mover if isinstance(load, Load)]
        actions = [
            action
            for job in jobs
            for action in bench.residency.on_load_done(job, True, "", 2 * SECOND, SECOND)
        ]
        bench.activations.apply(actions, 2 * SECOND)
        assert bench.told(2) == [Coming, Placed]
        assert bench.told(1) == [Placed if mute is Coming else Coming]
        for job in jobs:
            bench.activations.on_load_done(LoadDone(job=job, ok=True), 3 * SECOND)
