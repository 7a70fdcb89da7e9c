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
    A step that goes and comes back does not end that: who could be asked once counts as long as it is there.
 2. Each reason is said once, until it is another one.
 3. A look is taken only after something has changed, for LOOK_NS at a time and LOOK_SHARE of a core at
    most, the next one where the last one ended.
 4. A version that is unloaded is nobody's; it is on trial again when it is loaded.

Called by the rehearsals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from overcommit.runtime.ensemble_watch import EnsembleWatch
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.registry import Registry

LOOK_NS: Final = 5_000_000
LOOK_SHARE: Final = 0.2


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
        self._covered: set[int] = set()  # slots for which something else could be asked
        self._round: dict[int, None] = {}  # slots that this round of looks has not come to
        self._looked = -1  # the revision when it began
        self._not_before_ns = 0

    def __contains__(self, slot: int) -> bool:
        """Whether it may still be decided without anything being done about it."""
        reason = self._reasons.get(slot)
        if reason is None:
            return False
        return not reason or slot in self._round or self._looked != self._watch.revision()

    def add(self, slot: int) -> None:
        """Look at this version from now on."""
        self._reasons.setdefault(slot, "")
        self._looked = -1

    def drop(self, slot: int) -> None:
        """It is not wanted any more."""
        self._reasons.pop(slot, None)
        self._round.pop(slot, None)
        self._covered.discard(slot)

    def step(self, now_ns: int) -> None:
        """Look again, if something has changed."""
        if not self._reasons or now_ns < self._not_before_ns:
            return
        if not self._round:
            if self._looked == self._watch.revision():
                return
            self._looked = self._watch.revision()
            self._round = dict.fromkeys(reversed(self._reasons))
        began_ns = time.monotonic_ns()
        taken_ns = 0
        while self._round:
            slot, _ = self._round.popitem()
            self._look(slot)
            taken_ns = time.monotonic_ns() - began_ns
            if taken_ns > LOOK_NS:
                break
        self._not_before_ns = now_ns + int(taken_ns / LOOK_SHARE)

    def _look(self, slot: int) -> None:
        """Decide, if that is possible now."""
        entry = self._registry.by_slot(slot)
        is_gone = entry is None or entry.retired or not entry.on_trial
        if entry is None or is_gone or entry.state is not State.READY:
            self.drop(slot)
            return
        verdict = self._watch.verdict(entry)
        reason = verdict.problem
        if verdict.fate == "ready" or (reason and not self._is_covered(entry)):
            self._decide(slot, True, reason)
            self.drop(slot)
        elif reason != self._reasons[slot]:
            self._reasons[slot] = reason
            if reason:
                self._decide(slot, False, reason)

    def _is_covered(self, entry: Entry) -> bool:
        """Whether something else of its name can be asked, or could be and may be again."""
        others = [
            other
            for other in self._registry.versions(entry.name)
            if other is not entry
            and not other.on_trial
            and other.state in (State.PACKING, State.READY)
        ]
        if others and entry.slot not in self._covered:
            can = (o.state is State.PACKING or not self._watch.verdict(o).problem for o in others)
            if any(can):
                self._covered.add(entry.slot)
        return bool(others) and entry.slot in self._covered
