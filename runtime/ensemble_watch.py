"""What the supervisor says of ensembles: READY as long as their steps are, and why where they are not.

In the registry an ensemble is READY, for it has nothing to pack; whether it can be asked follows from other
entries, and is worked out (`steps`) when somebody asks, at most once between two changes of what front ends
are told.  The routing table of a front end does the same for requests.

    reason of an ensemble, as the log has it:  "" -> said [step: a step is gone, broken or contradicts]
                                               said -> "" [step: it is ready]      waits: as before

Invariants
 1. Nothing is kept of a verdict when a version, a name or a state has changed since.
 2. The log says a reason once, until it is another one, and that an ensemble is ready where it said one.
 3. Saying takes at most SAY_SHARE of a core, however often things change and however many ensembles there
    are.

Called by the catalogue, administration and client loads, from the supervisor's one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from overcommit.runtime.entries import Entry, State, to_route
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.registry import Registry
from overcommit.runtime.rollout import Rollout
from overcommit.runtime.steps import READY, Verdict, verdict_of

log = logging.getLogger("overcommit.catalogue")

SAY_NS: Final = 500_000_000  # between two looks, at least
SAY_SHARE: Final = 0.03
_STATES: Final = {
    "ready": State.READY,
    "waits": State.PACKING,
    "missing": State.UNAVAILABLE,
    "broken": State.UNAVAILABLE,
}


class EnsembleWatch:
    """See the module.  `revision`: another number after each change."""

    def __init__(self, registry: Registry, rollout: Rollout, revision: Callable[[], int]) -> None:
        self._registry = registry
        self._rollout = rollout
        self.revision = revision
        self._seen = -1
        self._verdicts: dict[int, Verdict] = {}  # by slot
        self._routes: dict[int, Route] = {}  # of steps
        self._said: dict[int, str] = {}  # reasons, by slot
        self._looked = -1
        self._not_before_ns = 0

    def verdict(self, entry: Entry) -> Verdict:
        """Say what a version is good for as far as its steps go; ready, if it has none."""
        if not entry.config.steps or entry.state is not State.READY:
            return READY
        if self._seen != self.revision():
            self._seen = self.revision()
            self._verdicts.clear()
            self._routes.clear()
        found = self._verdicts.get(entry.slot)
        if found is None:
            find = partial(self._find_after, entry) if entry.on_trial else self._find
            found = self._verdicts[entry.slot] = verdict_of(to_route(entry), find)
        return found

    def state(self, entry: Entry) -> State:
        """The state that clients are told."""
        if not entry.config.steps or entry.state is not State.READY:
            return entry.state
        return _STATES[self.verdict(entry).fate]

    def step(self, now_ns: int) -> None:
        """Log which ensembles cannot be asked, and which can again."""
        if self._looked == self.revision() or now_ns < self._not_before_ns:
            return
        self._looked = self.revision()
        began_ns = time.monotonic_ns()
        said: dict[int, str] = {}
        for entry in self._registry.ensembles():
            if entry.on_trial:
                continue  # another one serves
            before, verdict = self._said.get(entry.slot, ""), self.verdict(entry)
            reason = before if verdict.fate == "waits" else verdict.reason
            if reason:
                said[entry.slot] = reason
            if reason and reason != before:
                log.warning("%s version %s: %s", entry.name, entry.version, reason)
            elif before and not reason and entry.state is State.READY:
                log.info("%s version %s: its steps are there", entry.name, entry.version)
        self._said = said
        taken_ns = time.monotonic_ns() - began_ns
        self._not_before_ns = now_ns + max(SAY_NS, int(taken_ns / SAY_SHARE))

    # --- what steps lead to ---------------------------------------------------------------------
    def _find_after(self, trial: Entry, name: str, version: str) -> Route | None:
        """As `_find`, once the version on trial has taken over: its steps may lead back to it."""
        found = self._find(name, version)
        if found is None or found.name != trial.name:
            return found
        return to_route(trial) if not version or found.version == trial.version else found

    def _find(self, name: str, version: str) -> Route | None:
        """As a front end's routing table finds it, but for shares of a rollout."""
        if not self._registry.has(name):
            name, pinned = self._rollout.alias(name)
            version = version or pinned
            if not self._registry.has(name):
                return None
        versions = self._registry.versions(name)
        if version:
            entry = next((each for each in versions if _is_called(each, version)), None)
        else:
            usable = [e for e in reversed(versions) if e.state in (State.READY, State.PACKING)]
            proven = [each for each in usable if not each.on_trial] or usable
            shares = self._rollout.weights(name)
            entry = next((each for each in proven if each.version not in shares), None)
            entry = entry or next(iter(proven), versions[-1])
        if entry is None:
            return None
        if entry.slot not in self._routes:
            self._routes[entry.slot] = to_route(entry)
        return self._routes[entry.slot]


def _is_called(entry: Entry, version: str) -> bool:
    naming = None if entry.source_config is None else entry.source_config.naming
    return entry.version == version or (naming is not None and naming.called == version)
