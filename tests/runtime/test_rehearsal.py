"""Versions on trial: who is asked, and when it is too late."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from overcommit.runtime.children import Child
from overcommit.runtime.ensemble_trials import EnsembleTrials
from overcommit.runtime.ensemble_watch import EnsembleWatch
from overcommit.runtime.entries import new_entry, to_route
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.front_end_messages import Rehearse, Rehearsed
from overcommit.runtime.registry import Registry
from overcommit.runtime.rehearsal import IN_FLIGHT_MAX, REHEARSAL_NS, RETRY_NS, Rehearsals
from overcommit.runtime.repository import VersionSource
from overcommit.runtime.rollout import Rollout


@dataclass
class FrontEnd:
    """Keeps what it is sent."""

    incarnation: tuple[int, int] = (0, 1)
    asked: list[int] = field(default_factory=list)

    def post(self, message: Rehearse) -> None:
        self.asked.append(message.route.slot)


@dataclass
class Fronts:
    """A fleet of front ends."""

    fronts: list[FrontEnd] = field(default_factory=lambda: [FrontEnd()])

    def of_kind(self, kind: str) -> Iterator[FrontEnd]:
        assert kind == "front_end"
        return iter(self.fronts)


def begin(fleet: Fronts, count: int) -> tuple[Rehearsals, list[tuple[int, bool]]]:
    decided: list[tuple[int, bool]] = []

    def decide(slot: int, ok: bool, message: str) -> None:
        decided.append((slot, ok))

    registry = Registry("nowhere")
    watch = EnsembleWatch(registry, Rollout("nowhere", registry), lambda: 0)
    ensembles = EnsembleTrials(registry, watch, decide)
    trials = Rehearsals(cast(Fleet, fleet), ensembles, decide)
    for slot in range(count):
        source = VersionSource(f"m{slot}", "1", f"/m{slot}", "a", None)
        trials.add(to_route(new_entry(slot, source)), 0)
    return trials, decided


def answer(trials: Rehearsals, front: FrontEnd, now_ns: int, **said: Any) -> None:
    slot = front.asked[-1]
    trials.on_rehearsed(cast(Child, front), Rehearsed(slot=slot, **said), now_ns)


def test_a_few_are_asked_at_a_time() -> None:
    fleet = Fronts()
    trials, decided = begin(fleet, IN_FLIGHT_MAX + 1)
    assert len(fleet.fronts[0].asked) == IN_FLIGHT_MAX
    answer(trials, fleet.fronts[0], 1, ok=True, message="")
    trials.step(2)
    assert len(fleet.fronts[0].asked) == IN_FLIGHT_MAX + 1
    assert decided == [(IN_FLIGHT_MAX - 1, True)]


def test_who_waits_for_his_turn_is_not_too_late() -> None:
    fleet = Fronts()
    trials, decided = begin(fleet, IN_FLIGHT_MAX + 1)
    late_ns = REHEARSAL_NS + 1
    trials.step(late_ns)
    assert decided == [(slot, False) for slot in range(IN_FLIGHT_MAX)]
    assert fleet.fronts[0].asked[-1] == IN_FLIGHT_MAX
    answer(trials, fleet.fronts[0], late_ns, ok=True, message="")
    assert decided[-1] == (IN_FLIGHT_MAX, True)


def test_who_is_asked_again_and_again_is_too_late_at_last() -> None:
    fleet = Fronts()
    trials, decided = begin(fleet, 1)
    now_ns = 0
    while now_ns <= REHEARSAL_NS and not decided:
        answer(trials, fleet.fronts[0], now_ns, ok=False, message="", retry=True)
        now_ns += RETRY_NS
        trials.step(now_ns)
    assert decided == [(0, False)]


def test_without_a_front_end_nothing_is_decided() -> None:
    fleet = Fronts([])
    trials, decided = begin(fleet, 1)
    trials.step(2 * REHEARSAL_NS)
    assert decided == []
    fleet.fronts.append(FrontEnd())
    trials.step(2 * REHEARSAL_NS)
    assert fleet.fronts[0].asked == [0]
