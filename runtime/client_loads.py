"""Loads that a client waits for: they are answered when it is known whether the model works.

    asked --try_out--> TRIED --all versions settled--> confirmed: 200 | given up: 400, the old one serves
    asked plainly --> WAITING --all versions settled--> 200 | 400, if the newest does not work

Invariants
 1. Each Admin is answered once: when it is decided, or after LOAD_ANSWER_NS, while the load goes on.
 2. Every load that is tried is decided, whether anybody waits for it or not.

Called by administration, from the supervisor's one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from overcommit.runtime.catalogue import Catalogue
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.errors import BadRequest, OvercommitError, RepositoryError, Unavailable
from overcommit.runtime.fleet import Child
from overcommit.runtime.front_end_messages import Admin

LOAD_ANSWER_NS: Final = 50_000_000_000  # sooner than a front end gives up

Answer = Callable[[Child, Admin, int, bytes], None]  # to whom, to what, status, body


@dataclass(slots=True)
class _Load:
    front: Child
    request: Admin
    name: str
    began_ns: int
    is_tried: bool
    was_unloaded: bool = False
    is_answered: bool = False


class ClientLoads:
    """Answers the operations `load_begin`, `load_end` and `load_override`."""

    operations: Final = ("load_begin", "load_end", "load_override")

    def __init__(self, catalogue: Catalogue, answer: Answer) -> None:
        self._catalogue = catalogue
        self._answer = answer
        self._loads: dict[str, _Load] = {}  # those that are tried
        self._waiting: list[_Load] = []  # those that are plain

    def on_admin(self, front: Child, request: Admin, now_ns: int) -> None:
        """Carry one of the operations out; raises OvercommitError, or answers now or later."""
        overrides = self._catalogue.overrides
        owner = front.incarnation
        folder = str(request.arguments.get("folder", ""))
        if request.operation == "load_begin":
            try:
                folder = overrides.begin(owner)
            except OSError as error:
                raise OvercommitError(f"the cache folder cannot be written: {error}") from error
            self._answer(front, request, 200, msgspec.json.encode({"folder": folder}))
        elif request.operation == "load_end":
            overrides.abandon(owner, folder or "-")
            self._answer(front, request, 200, b"{}")
        else:
            name, config = request.arguments.get("name"), request.arguments.get("config")
            if not isinstance(name, str) or not isinstance(config, str):
                raise BadRequest("'load_override' needs the arguments 'name' and 'config'")
            if not folder and not self._catalogue.is_scanned(name):
                overrides.abandon(owner, folder or "-")
                raise RepositoryError(
                    f"failed to load '{name}', failed to poll from model repository: there is no "
                    f"such model, and no files came with it"
                )
            overrides.try_out(name, config, folder, owner)
            was_unloaded = self._catalogue.registry.want(name)
            if name in self._loads:
                self._say(self._loads[name], _gone(name))
            self._loads[name] = _Load(front, request, name, now_ns, True, was_unloaded)
            self._catalogue.apply(now_ns)
            self._hurry(name)
            self.step(now_ns)

    def leave(self, front: Child, request: Admin, name: str, now_ns: int) -> bool:
        """Load the repository's own again; False: no client's is loaded, or there is no other."""
        overrides = self._catalogue.overrides
        if not overrides.has(name) or not self._catalogue.is_scanned(name):
            return False
        overrides.drop(name)
        self._catalogue.registry.want(name)
        self._catalogue.apply(now_ns)
        self.wait(front, request, name, now_ns)
        return True

    def wait(self, front: Child, request: Admin, name: str, now_ns: int) -> None:
        """Answer when all versions of a model are what they will be."""
        load = _Load(front, request, name, now_ns, False)
        if self._catalogue.is_settled(name):
            self._say(load, self._problem(load))
        else:
            self._waiting.append(load)
            self._hurry(name)

    def unload(self, name: str, now_ns: int) -> None:
        """The model was unloaded: what a client gave for it is gone."""
        if self._catalogue.overrides.drop(name):
            self._catalogue.apply(now_ns)

    def on_front_end_gone(self, front: Child) -> None:
        """Nobody waits any more; what it was about to give comes to nothing."""
        self._catalogue.overrides.abandon(front.incarnation)
        for load in (*self._loads.values(), *self._waiting):
            load.is_answered = load.is_answered or load.front is front

    def step(self, now_ns: int) -> None:
        """Decide what is settled; answer who has waited long enough."""
        for name, load in list(self._loads.items()):
            if self._catalogue.is_settled(name):
                del self._loads[name]
                self._decide(load, now_ns)
        for load in self._waiting:
            if self._catalogue.is_settled(load.name):
                self._say(load, self._problem(load))
        for load in (*self._loads.values(), *self._waiting):
            if now_ns - load.began_ns > LOAD_ANSWER_NS:
                text = f"model '{load.name}' is still being loaded; the index says how it ends"
                self._say(load, Unavailable(text))
        self._waiting = [load for load in self._waiting if not load.is_answered]

    def _decide(self, load: _Load, now_ns: int) -> None:
        name, catalogue = load.name, self._catalogue
        problem = self._problem(load)
        if not catalogue.overrides.is_tried(name):
            self._say(load, _gone(name))
            return
        if problem is None:
            catalogue.overrides.confirm(name)
        else:
            catalogue.overrides.give_up(name)
        catalogue.apply(now_ns)
        if problem is not None and load.was_unloaded and catalogue.registry.has(name):
            catalogue.take_out(name, now_ns)
        self._say(load, problem)

    def _problem(self, load: _Load) -> OvercommitError | None:
        name, registry = load.name, self._catalogue.registry
        entries = {e.version: e for e in (registry.versions(name) if registry.has(name) else ())}
        if not load.is_tried:
            newest = next(reversed(entries.values()), None)
            if newest is None or newest.state is State.UNLOADED:
                return _gone(name)
            reason = newest.reason
            return RepositoryError(f"failed to load '{name}': {reason}") if reason else None
        sought = self._catalogue.overrides.sought(name)
        if not sought:
            return RepositoryError(f"failed to load '{name}': no version is there to be served")
        for version, fingerprint in sought.items():
            entry = entries.get(version)
            if not _works(entry, fingerprint):
                reason = entry.reason if entry is not None else "it is not there"
                return RepositoryError(f"failed to load '{name}' version {version}: {reason}")
        return None

    def _hurry(self, name: str) -> None:
        """A client waits for its image."""
        registry = self._catalogue.registry
        for entry in registry.versions(name) if registry.has(name) else ():
            self._catalogue.packing.hurry(registry.successor_slot(entry))

    def _say(self, load: _Load, problem: OvercommitError | None) -> None:
        if load.is_answered:
            return
        load.is_answered = True
        if problem is None:
            self._answer(load.front, load.request, 200, b"{}")
        else:
            body = msgspec.json.encode({"error": problem.message})
            self._answer(load.front, load.request, problem.http_status, body)


def _gone(name: str) -> Unavailable:
    return Unavailable(f"model '{name}' was unloaded, removed or loaded again meanwhile")


def _works(entry: Entry | None, fingerprint: str) -> bool:
    return (
        entry is not None
        and entry.fingerprint == fingerprint
        and entry.state is State.READY
        and not entry.on_trial
    )
