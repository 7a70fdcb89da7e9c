"""The routing table of a front end: which version a request means, and whether it can be served now.

Invariants
 1. A name and version lead to the route that was announced last for them.
 2. Without a version, the highest number that is ready or being packed is meant, else the highest;
    of a model with a rollout, by chance one of those with a share, or the highest of the others.  A
    version on trial is meant only by who names it, while there is another.
 3. A model's own name goes before an alias.

Changed by Routes messages; read for every request.
"""

from __future__ import annotations

import random
import sys
from typing import Final

import msgspec

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import BadRequest, NotFound, OvercommitError, Unavailable
from overcommit.runtime.front_end_messages import ModelNames, Route, Routes
from overcommit.runtime.steps import Verdict, verdict_of

# Asked for by a header, in a version's place.
CANARY: Final = "@canary"
STABLE: Final = "@stable"
SHARED_MAX: Final = 4096  # different signatures that are remembered


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else -1


class RouteTable:
    """All routes, by slot and by name."""

    def __init__(self) -> None:
        self._slots: dict[int, Route] = {}
        self._names: dict[str, dict[str, Route]] = {}
        self._latest: dict[str, Route] = {}
        self._named: dict[str, ModelNames] = {}
        self._aliases: dict[str, tuple[str, str]] = {}  # -> a model, and a version or ""
        self._shares: dict[str, list[tuple[float, Route]]] = {}  # percent, of a rollout
        self._canary: dict[str, Route] = {}
        self._shared: dict[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = {}
        self._verdicts: dict[int, Verdict] = {}  # of ensembles, by slot; since the last change
        self.is_complete = False

    def __len__(self) -> int:
        return len(self._slots)

    def apply(self, message: Routes) -> None:
        """Take over an announcement."""
        self._verdicts.clear()
        touched = set()
        for route in map(self._lean, message.upsert):
            self._slots[route.slot] = route
            self._names.setdefault(route.name, {})[route.version] = route
            touched.add(route.name)
        for slot in message.removed:
            gone = self._slots.pop(slot, None)
            if gone is None:
                continue
            versions = self._names.get(gone.name, {})
            if versions.get(gone.version) is gone:
                del versions[gone.version]
            touched.add(gone.name)
        for named in message.names:
            self._rename(named)
            touched.add(named.name)
        for name in touched:
            self._choose_latest(name)
        self.is_complete = self.is_complete or message.complete

    def _rename(self, named: ModelNames) -> None:
        former = self._named.pop(named.name, None)
        for alias in () if former is None else former.aliases:
            if self._aliases.get(alias, ("", ""))[0] == named.name:
                del self._aliases[alias]
        for alias, version in named.aliases.items():
            self._aliases.setdefault(alias, (named.name, version))
        if named.aliases or named.weights or named.held:
            self._named[named.name] = named

    def _lean(self, route: Route) -> Route:
        """Share what versions of one architecture have alike: half of what 20,000 routes take."""
        if len(self._shared) >= SHARED_MAX:
            self._shared.clear()
        share = self._shared.setdefault
        return msgspec.structs.replace(
            route,
            version=sys.intern(route.version),
            state=sys.intern(route.state),
            platform=sys.intern(route.platform),
            inputs=share(route.inputs, route.inputs),
            outputs=share(route.outputs, route.outputs),
        )

    def _choose_latest(self, name: str) -> None:
        versions = self._names.get(name)
        if not versions:
            self._names.pop(name, None)
            self._latest.pop(name, None)
            self._shares.pop(name, None)
            self._canary.pop(name, None)
            return
        ordered = sorted(versions.values(), key=lambda route: _number(route.version), reverse=True)
        usable = [route for route in ordered if route.state in ("ready", "packing")]
        named = self._named.get(name)
        if named is not None:
            usable = self._roll_out(named, usable)
        self._latest[name] = next(iter(usable), ordered[0])

    def _roll_out(self, named: ModelNames, usable: list[Route]) -> list[Route]:
        """Note who has a share; return whom the rest is for, the best first."""
        proven = [route for route in usable if route.version not in named.held] or usable
        shares = [(named.weights.get(route.version, 0.0), route) for route in proven]
        # A sequence stays with its version, so its requests are not shared out.
        shares = [
            share
            for share in shares
            if share[0] > 0 and share[1].state == "ready" and not share[1].sequence
        ]
        self._shares.pop(named.name, None)
        self._canary.pop(named.name, None)
        if shares:
            self._shares[named.name] = shares
            self._canary[named.name] = shares[0][1]
        return [route for route in proven if route.version not in named.weights] or proven

    def is_split(self, name: str) -> bool:
        """Whether requests for this name that say no version go to several."""
        model, version = (
            self._aliases.get(name, (name, "")) if name not in self._names else (name, "")
        )
        return not version and model in self._shares

    def names(self) -> list[str]:
        """The models that are known, in order."""
        return sorted(self._names)

    def versions(self, name: str) -> list[str]:
        """Version numbers of a model, ascending."""
        return sorted(self._names.get(name, {}), key=_number)

    def find(self, name: str, version: str | None) -> Route:
        """Return the route that is meant.  Raises NotFound, BadRequest."""
        if name not in self._names and name in self._aliases:
            model, pinned = self._aliases[name]
            if model in self._names:
                named = version not in (None, CANARY, STABLE)
                return self.find(model, version if named or not pinned else pinned)
        if version is None and name in self._shares:
            rest = 100 * random.random()
            for percent, chosen in self._shares[name]:
                rest -= percent
                if rest < 0:
                    return chosen
        if version == CANARY:
            version = None
            if name in self._canary:
                return self._canary[name]
        if version is None or version == STABLE:
            route = self._latest.get(name)
            if route is None:
                raise NotFound(f"Request for unknown model: '{name}' is not found")
            return route
        versions = self._names.get(name)
        if versions is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        found = versions.get(version)
        if found is None:
            for route in versions.values() if not version.isdecimal() else ():
                if route.called == version:
                    return route
            if not version.isdecimal():
                raise BadRequest(f"model '{name}': '{version}' is no version number")
            known = ", ".join(self.versions(name)[:20])
            raise NotFound(
                f"Request for unknown model: '{name}' version {version} is not found; there is "
                f"{known}"
            )
        return found

    def find_usable(self, name: str, version: str | None) -> Route | None:
        """Return the route that is meant; None: its image is being made.

        Raises as `find` and `check_usable`, and of an ensemble whose steps cannot work.
        """
        route = self.find(name, version)
        if route.steps and route.state == "ready":
            self._check_steps(route)
        return route if check_usable(route) else None

    def is_ready(self, name: str, version: str | None) -> bool:
        """Whether requests would be served at once.  Raises as `find_usable`."""
        route = self.find_usable(name, version)
        if route is None:
            return False
        return not route.steps or self._check_steps(route).fate == "ready"

    def _check_steps(self, route: Route) -> Verdict:
        """Return what an ensemble is good for.  Raises NotFound, Unavailable."""
        verdict = self._verdicts.get(route.slot)
        if verdict is None:
            verdict = self._verdicts[route.slot] = verdict_of(route, self._step)
        title = f"model '{route.name}' version {route.version} is unavailable"
        if verdict.fate == "missing":
            raise NotFound(f"{title}: {verdict.reason}")
        if verdict.fate == "broken":
            raise Unavailable(f"{title}: {verdict.reason}", retry_after_s=5)
        return verdict

    def _step(self, name: str, version: str) -> Route | None:
        try:
            return self.find(name, version or STABLE)
        except OvercommitError:
            return None


def check_usable(route: Route) -> bool:
    """Whether the route serves now; False: its image is being made.  Raises NotFound, Unavailable."""
    if route.state == "ready":
        return True
    if route.state == "packing":
        return False
    if route.state == "unloaded":
        raise NotFound(
            f"Request for unknown model: '{route.name}' has no available versions; it is unloaded: "
            f"POST /v2/repository/models/{route.name}/load"
        )
    raise Unavailable(
        f"model '{route.name}' version {route.version} is unavailable: {route.reason}",
        retry_after_s=5,
    )
