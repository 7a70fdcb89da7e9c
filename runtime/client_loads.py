"""Loads that a client waits for: they are answered when it is known whether the model works.

    asked --its folder, and those of its steps, were looked at--> begun plainly | with what the client gives
    begun with that --> TRIED --all versions settled--> confirmed: 200 | given up: 400, the old one serves
    begun plainly --> WAITING --all versions settled--> 200 | 400, if the newest does not work

Invariants
 1. Each Admin is answered once: when it is decided, or after LOAD_ANSWER_NS, while the load goes on.
 2. Every load that is tried is decided, whether anybody waits for it or not.
 3. What is loaded is what lies in the repository after the load was asked for: its folders are looked at,
    and no others.

Called by administration, from the supervisor's one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from overcommit.runtime.catalogue import Catalogue
from overcommit.runtime.children import Child
from overcommit.runtime.dependents import brought_along
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.errors import (
    BadRequest,
    NotFound,
    OvercommitError,
    RepositoryError,
    Unavailable,
)
from overcommit.runtime.front_end_messages import Admin

LOAD_ANSWER_NS: Final = 50_000_000_000  # sooner than a front end gives up

Answer = Callable[[Child, Admin, int, bytes], None]  # to whom, to what, status, body


@dataclass(slots=True)
class _Load:
    front: Child
    request: Admin
    name: str
    began_ns: int
    is_tried: bool = False
    was_unloaded: bool = False
    looked: set[str] = field(default_factory=set)  # folders, by name
    is_answered: bool = False


class ClientLoads:
    """Answers the operations `load`, `load_begin`, `load_end` and `load_override`."""

    operations: Final = ("load", "load_begin", "load_end", "load_override")

    def __init__(self, catalogue: Catalogue, answer: Answer) -> None:
        self._catalogue = catalogue
        self._answer = answer
        self._looking: dict[int, _Load] = {}  # by the ticket of the question
        self._loads: dict[str, _Load] = {}  # those that are tried
        self._waiting: list[_Load] = []  # those that are plain
        self.by_name: set[str] = set()  # models that clients have loaded by name

    def on_admin(self, front: Child, request: Admin, now_ns: int) -> None:
        """Carry one of the operations out; raises OvercommitError, or answers now or later."""
        overrides = self._catalogue.overrides
        owner = front.incarnation
        arguments = request.arguments
        if request.operation == "load_begin":
            try:
                folder = overrides.begin(owner)
            except OSError as error:
                raise OvercommitError(f"the cache folder cannot be written: {error}") from error
            self._answer(front, request, 200, msgspec.json.encode({"folder": folder}))
        elif request.operation == "load_end":
            overrides.abandon(owner, str(arguments.get("folder", "")) or "-")
            self._answer(front, request, 200, b"{}")
        else:
            name, config = arguments.get("name"), arguments.get("config", "")
            if not isinstance(name, str) or not isinstance(config, str):
                raise BadRequest(f"'{request.operation}' needs 'name' and 'config', which are text")
            load = _Load(front, request, name, now_ns)
            if arguments.get("folder"):  # the client brings all
                self._begin(load, now_ns)
            else:
                self._look(load, {name})

    def _look(self, load: _Load, names: set[str]) -> None:
        load.looked |= names
        self._looking[self._catalogue.watch.look_at(names)] = load

    def on_looked(self, tickets: Iterable[int], now_ns: int) -> None:
        """The folders of these loads were looked at."""
        for load in filter(None, [self._looking.pop(ticket, None) for ticket in tickets]):
            if load.is_answered:
                continue
            steps = set(brought_along(self._catalogue.registry, load.name))
            if steps <= load.looked:
                try:
                    self._begin(load, now_ns)
                except OvercommitError as error:
                    self._say(load, error)
            else:
                self._look(load, steps - load.looked)

    def _begin(self, load: _Load, now_ns: int) -> None:
        """Raises OvercommitError."""
        if load.request.operation == "load_override":
            self._try_out(load, now_ns)
            return
        if not self._leave(load.name, now_ns):
            self._take_in(load.name, now_ns)
        if self._catalogue.is_settled(load.name):
            self._say(load, self._problem(load))
        else:
            self._waiting.append(load)
            self._hurry(load.name)

    def _try_out(self, load: _Load, now_ns: int) -> None:
        """Put what a client gives on trial.  Raises OvercommitError."""
        name, arguments, overrides = load.name, load.request.arguments, self._catalogue.overrides
        folder, owner = str(arguments.get("folder", "")), load.front.incarnation
        if not folder and not self._catalogue.is_scanned(name):
            overrides.abandon(owner, folder or "-")
            raise RepositoryError(
                f"failed to load '{name}', failed to poll from model repository: there is no such "
                f"model, and no files came with it"
            )
        overrides.try_out(name, str(arguments.get("config", "")), folder, owner)
        load.is_tried = True
        load.was_unloaded = self._catalogue.registry.want(name)
        if name in self._loads:
            self._say(self._loads[name], _gone(name))
        self._loads[name] = load
        self._catalogue.apply(now_ns)
        self._hurry(name)
        self.step(now_ns)

    def _take_in(self, name: str, now_ns: int) -> None:
        """Take a model into service, and those of its steps.  Raises NotFound, RepositoryError."""
        registry = self._catalogue.registry
        if not registry.has(name):
            raise NotFound(
                f"failed to load '{name}', failed to poll from model repository: there is no such "
                f"model"
            )
        self.by_name.add(name)
        for each in brought_along(registry, name):
            if registry.has(each) and registry.find(each).state is State.UNLOADED:
                self._catalogue.take_in(each, now_ns)
        self._catalogue.take_in(name, now_ns)

    def _leave(self, name: str, now_ns: int) -> bool:
        """Load the repository's own again; False: no client's is loaded, or there is no other."""
        overrides = self._catalogue.overrides
        if not overrides.has(name) or not self._catalogue.is_scanned(name):
            return False
        overrides.drop(name)
        self._catalogue.registry.want(name)
        self._catalogue.apply(now_ns)
        return True

    def unload(self, name: str, now_ns: int) -> None:
        """The model was unloaded: what a client gave for it is gone."""
        self.by_name.discard(name)
        if self._catalogue.overrides.drop(name):
            self._catalogue.apply(now_ns)

    def on_front_end_gone(self, front: Child) -> None:
        """Nobody waits any more; what it was about to give comes to nothing."""
        self._catalogue.overrides.abandon(front.incarnation)
        for load in (*self._looking.values(), *self._loads.values(), *self._waiting):
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
        for load in (*self._looking.values(), *self._loads.values(), *self._waiting):
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
            reason = newest.reason or self._catalogue.ensembles.verdict(newest).problem
            return RepositoryError(f"failed to load '{name}': {reason}") if reason else None
        sought = self._catalogue.overrides.sought(name)
        if not sought:
            return RepositoryError(f"failed to load '{name}': no version is there to be served")
        for version, fingerprint in sought.items():
            entry, reason = entries.get(version), "it is not there"
            if entry is not None and _works(entry, fingerprint):
                reason = self._catalogue.ensembles.verdict(entry).problem
            elif entry is not None:
                reason = entry.reason or "it does not serve"
            if reason:
                return RepositoryError(f"failed to load '{name}' version {version}: {reason}")
        return None

    def _hurry(self, name: str) -> None:
        """A client waits for its image, or for those of its steps."""
        registry = self._catalogue.registry
        for each in filter(registry.has, (name, *brought_along(registry, name))):
            for entry in registry.versions(each):
                self._catalogue.packing.hurry(registry.successor_slot(entry))

    def _say(self, load: _Load, problem: OvercommitError | None) -> None:
        if load.is_answered:
            return
        load.is_answered = True
        if problem is None:
            self._catalogue.tell()
            self._answer(load.front, load.request, 200, b"{}")
        else:
            body = msgspec.json.encode({"error": problem.message})
            self._answer(load.front, load.request, problem.http_status, body)


def _gone(name: str) -> Unavailable:
    return Unavailable(f"model '{name}' was unloaded, removed or loaded again meanwhile")


def _works(entry: Entry, fingerprint: str) -> bool:
    return entry.fingerprint == fingerprint and entry.state is State.READY and not entry.on_trial
