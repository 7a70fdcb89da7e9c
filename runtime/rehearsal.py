"""New versions try out before they are what a model's name means.

A front end sends one request of zeros to the version, the way of every request: so it is loaded, bound and
warm in a worker, or it is known why not, while clients still get the version before.

    WAITING --a front end serves--> ASKED --answer, or too long--> (decided)
    ASKED --its front end dies, or nobody could take it--> WAITING, up to TRIES_MAX times

Invariants
 1. `decide` is called once for each version that was added, unless it was dropped.
 2. The time that a version has to answer begins when it is first asked: thousands may wait for their turn.
 3. Of an ensemble nothing is asked: its steps say whether it can be (`ensemble_trials`).

Called by the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.children import Child
from overcommit.runtime.ensemble_trials import EnsembleTrials
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.front_end_messages import Rehearse, Rehearsed, Route

TRIES_MAX: Final = 10
RETRY_NS: Final = 1_000_000_000
REHEARSAL_NS: Final = 300 * 1_000_000_000  # of loading a giant, too
IN_FLIGHT_MAX: Final = 4  # each may push a model out of memory that is in use

Decide = Callable[[int, bool, str], None]  # slot, whether it works, why not


@dataclass(slots=True)
class _Trial:
    route: Route
    began_ns: int = 0  # when it was first asked
    not_before_ns: int = 0
    tries: int = 0
    asked: tuple[int, int] | None = None  # the front end's seat and epoch


class Rehearsals:
    """Versions on trial, by slot."""

    def __init__(self, fleet: Fleet, ensembles: EnsembleTrials, decide: Decide) -> None:
        self._fleet = fleet
        self._ensembles = ensembles
        self._decide = decide
        self._trials: dict[int, _Trial] = {}

    def __len__(self) -> int:
        return len(self._trials)

    def __contains__(self, slot: int) -> bool:
        return slot in self._trials or slot in self._ensembles

    def add(self, route: Route, now_ns: int) -> None:
        """Try this version out."""
        if route.steps:
            self._ensembles.add(route.slot)
            return
        self._trials[route.slot] = _Trial(route)
        self._ask(now_ns)

    def drop(self, slot: int) -> None:
        """It is not wanted any more."""
        self._trials.pop(slot, None)
        self._ensembles.drop(slot)

    def on_rehearsed(self, front: Child, said: Rehearsed, now_ns: int) -> None:
        """A front end has an answer."""
        trial = self._trials.get(said.slot)
        if trial is None or trial.asked != front.incarnation:
            return
        if said.retry and trial.tries < TRIES_MAX:
            trial.asked, trial.not_before_ns = None, now_ns + RETRY_NS
            return
        del self._trials[said.slot]
        self._decide(said.slot, said.ok, said.message)

    def step(self, now_ns: int) -> None:
        """Ask those who wait, and look at the steps of ensembles."""
        self._ensembles.step(now_ns)
        self._ask(now_ns)

    def _ask(self, now_ns: int) -> None:
        """Ask those who wait, again where who was asked has died."""
        if not self._trials:
            return
        fronts = {front.incarnation: front for front in self._fleet.of_kind("front_end")}
        for slot, trial in list(self._trials.items()):
            if trial.tries and (
                now_ns - trial.began_ns > REHEARSAL_NS
                or (trial.tries >= TRIES_MAX and trial.asked not in fronts)
            ):
                del self._trials[slot]
                self._decide(slot, False, "it was not ready in time")
            elif trial.asked is not None and trial.asked not in fronts:
                trial.asked = None
        free = IN_FLIGHT_MAX - sum(trial.asked is not None for trial in self._trials.values())
        for trial in self._trials.values():
            if free > 0 and fronts and trial.asked is None and now_ns >= trial.not_before_ns:
                name, front = next(iter(fronts.items()))
                trial.began_ns = trial.began_ns or now_ns
                trial.asked, trial.tries, free = name, trial.tries + 1, free - 1
                front.post(Rehearse(route=trial.route))
