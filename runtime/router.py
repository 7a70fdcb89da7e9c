"""Which worker gets a request: the same one for the same version, while its queue there is short.

Batches form, and weights are mapped and programs bound in one worker only, when the requests for a
version meet in one place.  When they are more than one worker digests, the rest spills.

A version's home is the worker with the highest hash of (slot, worker): a worker that comes or goes
moves only the versions that it had or gets (rendezvous hashing).  A request goes home unless
`short` requests for its version are outstanding there; then it goes to the worker with the fewest
outstanding requests of all versions, the home among them.

Where a server has several devices, versions have sites, and all of this is among the workers of a
version's sites, the home at the first of them: another would load the version for a device of its own.

A worker that is in one batch for long (`occupied`) is as good as gone for all versions but that batch's.
Of that one it is the only worker: if the version hangs, it would hang the next worker too.  Where nobody
else is left, it is there as before.

Invariants
 1. `outstanding(worker)` is the number of `on_submit` less the number of `on_done`, never negative.
 2. With the same workers and nothing outstanding, a slot always has the same home.
 3. `only` is what `choose` gives for every slot, unless it is to be avoided.

Pure; one per front end, called by its dispatch.  A worker is any number that names an incarnation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from overcommit.runtime.config import VERSIONS_MAX

SHORT_BATCHES: Final = 2  # one batch that runs and one that gathers
_MASK: Final = (1 << 64) - 1


def short_queue(max_batch_size: int) -> int:
    """How many requests for one version may be outstanding at its home before others spill."""
    return SHORT_BATCHES * max(1, max_batch_size)


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every input bit changes every output bit with probability 1/2."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class _Load:
    """What is outstanding at one worker."""

    __slots__ = ("requests", "site", "slots")

    def __init__(self, site: int) -> None:
        self.site = site
        self.requests = 0
        # Requests by version, as far as any was seen.  A list, because hundreds of versions in turn
        # would come into a dict and leave it with every request.
        self.slots: list[int] = []

    def of(self, slot: int) -> int:
        """How many requests for one version are outstanding."""
        return self.slots[slot] if slot < len(self.slots) else 0


class Router:
    """The workers that a front end is linked with, and what is outstanding at each."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}
        self._homes: dict[int, int] = {}
        self._sites: dict[int, tuple[int, ...]] = {}  # by slot; empty where there is one site
        self._occupied: dict[int, int | None] = {}  # by worker: in whose batch it is for long
        self.only: int | None = None  # the worker for everything: no other, and no other site

    @property
    def workers(self) -> tuple[int, ...]:
        """The workers there are, in the order in which they came."""
        return tuple(self._loads)

    def add(self, worker: int, site: int = 0) -> None:
        """A worker was linked; nothing is outstanding there."""
        assert worker not in self._loads, "a worker is linked once"
        self._loads[worker] = _Load(site)
        self._on_change()

    def home_site(self, slot: int) -> int:
        """Return the site that serves a version first."""
        return self._sites.get(slot, (0,))[0]

    def spread(self, sites: Mapping[int, tuple[int, ...]]) -> None:
        """These versions, by slot, are served by these sites from now on."""
        self._sites.update(sites)
        self._on_change()

    def occupy(self, workers: Mapping[int, int | None]) -> None:
        """These workers are occupied from now on, by this version's batch or by none; the others are not."""
        self._occupied = dict(workers)
        self._on_change()

    def remove(self, worker: int) -> None:
        """A worker is gone, and with it what was outstanding there."""
        self._loads.pop(worker, None)
        self._on_change()

    def _on_change(self) -> None:
        self._homes.clear()
        self.only = None
        if len(self._loads) == 1 and not self._sites:
            (self.only,) = self._loads

    def choose(self, slot: int, short: int, avoid: Collection[int] = ()) -> int | None:
        """Pick a worker; None when there is none.

        `avoid` are workers that must not get it: their ring is full, or it died there before.
        """
        home = self._homes.get(slot)
        if home is None:
            home = self._find_home(slot)
            if home is None:
                return None
        if home not in avoid and self._loads[home].of(slot) < short:
            return home
        others = [worker for worker in self.among(slot) if worker not in avoid]
        if not others:
            return None
        # The home wins a tie: its weights are mapped and its program is bound.
        return min(others, key=lambda worker: (self._loads[worker].requests, worker != home))

    def on_submit(self, worker: int, slot: int) -> None:
        """A request for `slot` was pushed to this worker."""
        load = self._loads[worker]
        load.requests += 1
        slots = load.slots
        if slot >= len(slots):
            slots += [0] * (slot + 1 - len(slots))
        slots[slot] += 1

    def on_done(self, worker: int, slot: int) -> None:
        """It has been completed; nothing happens when the worker has been removed meanwhile."""
        load = self._loads.get(worker)
        if load is None:
            return
        assert load.of(slot), "a request is completed once"
        load.requests -= 1
        load.slots[slot] -= 1

    def outstanding(self, worker: int, slot: int | None = None) -> int:
        """How many requests are outstanding at a worker, of one version or of all."""
        load = self._loads.get(worker)
        if load is None:
            return 0
        return load.requests if slot is None else load.of(slot)

    def among(self, slot: int) -> Collection[int]:
        """Return the workers that may get requests for a version."""
        sites = self._sites.get(slot)
        among: Collection[int] = self._loads
        if sites is not None:
            among = [worker for worker, load in self._loads.items() if load.site in sites]
        occupied = self._occupied
        if not occupied:
            return among
        by_it = [worker for worker in among if occupied.get(worker) == slot]
        return by_it or [worker for worker in among if worker not in occupied] or among

    def _find_home(self, slot: int) -> int | None:
        among = self.among(slot)
        if (sites := self._sites.get(slot)) is not None:
            # At the first site, or at the next one that has a worker at the moment.
            first = min((sites.index(self._loads[worker].site) for worker in among), default=0)
            among = [worker for worker in among if self._loads[worker].site == sites[first]]
        if not among:
            return None
        home = max(among, key=lambda worker: _mix(worker * VERSIONS_MAX + slot))
        self._homes[slot] = home
        return home
