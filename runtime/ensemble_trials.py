"""Ensembles that are new, or whose files have changed, take over when they can be asked.

There is nothing to load and nothing to run: `ensemble_watch` says what an ensemble is good for, and that
changes with the models of its steps, which may be copied in later than the ensemble itself.

    OPEN --its steps are there [step]---------------------------> (takes over)
    OPEN --its steps cannot run, nor can anything else of its name-> (takes over: who asks is told why)
    OPEN --its steps cannot run [step]----> REFUSED, with a reason
    REFUSED --the image of a step is being made [step]--> OPEN
    REFUSED --another reason [step]--> REFUSED
    REFUSED --as OPEN-> (takes over)
    any --dropped-> (gone)

Invariants
 1. What served before serves on until a version takes over, which each does once, unless it was dropped.
 2. Each reason is said once, until it is another one.
 3. A look is taken only after something has changed, and looks take at most LOOK_SHARE of a core.

Called by the rehearsals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from overcommit.runtime.ensemble_watch import EnsembleWatch
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.registry import Registry

LOOK_SHARE: Final = 0.03
DECISIONS_MAX: Final = 64  # in one look: front ends are told of each


class EnsembleTrials:
    """Ensembles on trial, by slot.

    `decide` takes a slot, whether it takes over, and why its steps cannot run, if they cannot.
    """

    def __init__(
        self,
        registry: Registry,
        watch: EnsembleWatch,
        decide: Callable[[int, bool, str], None],
    ) -> None:
        self._registry = registry
        self._watch = watch
        self._decide = decide
        self._reasons: dict[int, str] = {}  # by slot; "": it is open
        self._looked = -1
        self._not_before_ns = 0

    def __contains__(self, slot: int) -> bool:
        """Whether it may still be decided without anything being done about it."""
        return self._reasons.get(slot) == ""

    def add(self, slot: int) -> None:
        """Look at this version from now on."""
        self._reasons.setdefault(slot, "")
        self._looked = -1

    def drop(self, slot: int) -> None:
        """It is not wanted any more."""
        self._reasons.pop(slot, None)

    def step(self, now_ns: int) -> None:
        """Look again, if something has changed."""
        if not self._reasons or now_ns < self._not_before_ns:
            return
        if self._looked == self._watch.revision():
            return
        self._looked = self._watch.revision()
        began_ns = time.monotonic_ns()
        decisions = 0
        for slot in list(self._reasons):
            entry = self._registry.by_slot(slot)
            if entry is None or entry.retired or not entry.on_trial:
                self.drop(slot)
            elif self._look(entry):
                decisions += 1
                if decisions == DECISIONS_MAX:
                    break  # what they change makes the next look due
        self._not_before_ns = now_ns + int((time.monotonic_ns() - began_ns) / LOOK_SHARE)

    def _look(self, entry: Entry) -> bool:
        """Decide, if that is possible now."""
        verdict = self._watch.verdict(entry)
        reason = verdict.problem
        if verdict.fate == "ready" or (reason and not self._has_other(entry)):
            self.drop(entry.slot)
            self._decide(entry.slot, True, reason)
            return True
        if reason != self._reasons[entry.slot]:
            self._reasons[entry.slot] = reason
            if reason:
                self._decide(entry.slot, False, reason)
        return False

    def _has_other(self, entry: Entry) -> bool:
        """Whether something else of its name can be asked, or will be."""
        return any(
            other is not entry
            and not other.on_trial
            and (
                other.state is State.PACKING
                or (other.state is State.READY and not self._watch.verdict(other).problem)
            )
            for other in self._registry.versions(entry.name)
        )
