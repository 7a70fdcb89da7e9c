"""Which sites a version is served from, where a server has several devices.

A site is a device with its memory, its mover and its workers; any of them can serve any version by
itself.  So what is decided here is where front ends send requests, never whether an answer is right.

    (none) -[add]-> ONE SITE --[look: a queue, for long]----------> SEVERAL SITES
                      |   ^----[look: cold, or short of room]-----------'  |
                      |--[look: its site is full, another has room]--> ONE SITE, the other
                      '--[lose]--> what is left, or ONE SITE, another <----'

Invariants
 1. A version that was added has one site at least, each once, and none that is lost, unless all are.
 2. A new version goes where the versions weigh least for the memory there; to a site that has versions
    with the same part already, as long as that one is not SPREAD_SLACK fuller: what they share counts
    there once, and they share batches.
 3. Another site only after REPLICA_LOOKS looks in a row with a queue of QUEUE_BATCHES batches for each
    worker that serves it, and only one with room and half the work at most.  It is given up after
    COLD_LOOKS looks in a row without half a batch waiting, or when its site gets short of room.
 4. A version that was moved or changed its number of sites is left alone for REST_LOOKS looks.
 5. A version that keeps state between requests stays where it is, unless that is lost.
 6. Bytes that were promised to a site count as used there until they can be seen (SETTLE_LOOKS).

Pure.  Called by `spreading`, once a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from overcommit.runtime.device_limits import (
    COLD_LOOKS,
    FULL_SHARE,
    MOVES_MAX,
    QUEUE_BATCHES,
    REPLICA_LOOKS,
    REST_LOOKS,
    ROOM_SHARE,
    SETTLE_LOOKS,
    SPREAD_SLACK,
)


@dataclass(slots=True, frozen=True)
class SiteLook:
    """What was seen of a site: bytes, and requests that wait in its workers' lanes."""

    capacity_bytes: int
    working_set_bytes: int = 0  # of the versions used lately
    is_short: bool = False  # versions push each other out
    waiting: int = 0
    workers: int = 1
    loaded: tuple[int, ...] = ()  # slots that came to DEVICE since the look before


@dataclass(slots=True)
class _Placed:
    """Where a version is served, and what the looks said of it."""

    sites: tuple[int, ...]
    nbytes: int
    share: str  # the digest of what it may share; "": nothing
    is_fixed: bool = False
    hot: int = 0  # looks in a row with a queue
    cold: int = 0  # looks in a row with none, while it has several sites
    rest: int = 0  # looks for which it is left alone


class Spread:
    """All versions and sites of one server."""

    def __init__(self, capacities: Sequence[int]) -> None:
        self._capacities = tuple(capacities)
        self._placed: dict[int, _Placed] = {}
        self._weights = [0] * len(capacities)  # bytes of the versions served there
        self._shares: dict[tuple[int, str], int] = {}  # versions by site and shared part
        self._several: set[int] = set()  # slots with more than one site
        self._hot: set[int] = set()  # slots with looks in a row
        self._promised: list[list[tuple[int, int]]] = [[] for _ in capacities]  # looks left, bytes
        self.lost: set[int] = set()

    def __len__(self) -> int:
        return len(self._placed)

    def sites_of(self, slot: int) -> tuple[int, ...]:
        """Return where it is served, its home first; () for one that was not added."""
        placed = self._placed.get(slot)
        return () if placed is None else placed.sites

    def all(self) -> dict[int, tuple[int, ...]]:
        """Return where every version is served."""
        return {slot: placed.sites for slot, placed in self._placed.items()}

    @property
    def replicas(self) -> int:
        """How many sites versions have beyond their first."""
        return sum(len(self._placed[slot].sites) - 1 for slot in self._several)

    def versions(self, site: int) -> int:
        """How many versions are served there."""
        return sum(site in placed.sites for placed in self._placed.values())

    # --- events ---------------------------------------------------------------------------------
    def add(self, slot: int, nbytes: int, share: str = "", is_fixed: bool = False) -> bool:
        """A version can be served; True if it is new here.  `share` names its largest part."""
        placed = self._placed.get(slot)
        if placed is not None:
            if (placed.nbytes, placed.share) != (nbytes, share):
                self._count(placed, -1)
                placed.nbytes, placed.share = nbytes, share
                self._count(placed, +1)
            return False
        placed = _Placed((self._choose(share),), nbytes, share, is_fixed)
        self._placed[slot] = placed
        self._count(placed, +1)
        return True

    def remove(self, slot: int) -> None:
        """It is served no more."""
        placed = self._placed.pop(slot, None)
        if placed is not None:
            self._count(placed, -1)
        self._several.discard(slot)
        self._hot.discard(slot)

    def lose(self, site: int) -> dict[int, tuple[int, ...]]:
        """A device is gone; return the versions that are served elsewhere from now on."""
        if site in self.lost:
            return {}
        self.lost.add(site)
        if len(self.lost) == len(self._capacities):
            return {}  # there is no better place; they wait where they are
        changed = {}
        for slot, placed in self._placed.items():
            if any(each in self.lost for each in placed.sites):
                left = tuple(each for each in placed.sites if each not in self.lost)
                self._settle(slot, placed, left or (self._choose(placed.share),))
                changed[slot] = placed.sites
        return changed

    def regain(self, site: int) -> dict[int, tuple[int, ...]]:
        """A device is back; it gets what is new, and what others have no room for.

        Return the versions that are served elsewhere from now on: those that waited at a lost one.
        """
        self.lost.discard(site)
        changed = {}
        for slot, placed in self._placed.items():
            if any(each in self.lost for each in placed.sites):
                self._settle(slot, placed, (self._choose(placed.share),))
                changed[slot] = placed.sites
        return changed

    def look(
        self,
        looks: Sequence[SiteLook],
        queues: Mapping[int, int],
        batch_of: Callable[[int], int],
    ) -> dict[int, tuple[int, ...]]:
        """Take one look; return the versions whose sites change.

        `queues` are the requests that wait, by slot, of those that may have any; `batch_of(slot)` is
        how many a worker takes at once.
        """
        for site, promised in enumerate(self._promised):
            self._promised[site] = [(left - 1, nbytes) for left, nbytes in promised if left > 1]
        changed: dict[int, tuple[int, ...]] = {}
        for slot in self._several | self._hot | queues.keys():
            placed = self._placed.get(slot)
            if placed is None or placed.is_fixed:
                continue
            sites = self._weigh(slot, placed, looks, queues.get(slot, 0), max(1, batch_of(slot)))
            if sites is not None:
                self._settle(slot, placed, sites)
                changed[slot] = sites
        for site in range(len(self._capacities)):
            if site not in self.lost:
                changed |= self._relieve(site, looks)
        return changed

    # --- rules ----------------------------------------------------------------------------------
    def _weigh(
        self, slot: int, placed: _Placed, looks: Sequence[SiteLook], waiting: int, batch: int
    ) -> tuple[int, ...] | None:
        """Judge one version by its queue; return its sites if they change."""
        sites = placed.sites
        workers = sum(looks[site].workers for site in sites)
        placed.hot = placed.hot + 1 if waiting >= QUEUE_BATCHES * batch * max(1, workers) else 0
        (self._hot.add if placed.hot else self._hot.discard)(slot)
        placed.cold = placed.cold + 1 if len(sites) > 1 and 2 * waiting < batch else 0
        if len(sites) > 1:
            short = [site for site in sites[1:] if looks[site].is_short]
            if short or placed.cold >= COLD_LOOKS:
                return tuple(site for site in sites if site not in (short or sites[-1:]))
        if placed.rest:
            placed.rest -= 1
            return None
        if placed.hot < REPLICA_LOOKS:
            return None
        busiest = max(_load(looks[site]) for site in sites)
        free = [
            site
            for site in self._alive()
            if site not in sites
            and not looks[site].is_short
            and 2 * _load(looks[site]) <= busiest
            and self._room(site, looks[site], 1.0) >= placed.nbytes
        ]
        if not free:
            return None
        best = min(free, key=lambda site: (_load(looks[site]), site))
        return (*sites, best)

    def _relieve(self, site: int, looks: Sequence[SiteLook]) -> dict[int, tuple[int, ...]]:
        """Of a site that is full, what was loaded anyway may as well be loaded elsewhere next time."""
        look = looks[site]
        room = self._room(site, look, FULL_SHARE)
        changed: dict[int, tuple[int, ...]] = {}
        if room >= 0:
            return changed
        for slot in dict.fromkeys(look.loaded):
            placed = self._placed.get(slot)
            if placed is None or placed.sites != (site,) or placed.rest or placed.is_fixed:
                continue
            others = [
                (self._room(other, looks[other], ROOM_SHARE), other)
                for other in self._alive()
                if other != site and not looks[other].is_short
            ]
            if not others or max(others)[0] < placed.nbytes:
                continue
            self._settle(slot, placed, (max(others)[1],))
            changed[slot] = placed.sites
            room += placed.nbytes
            if room >= 0 or len(changed) == MOVES_MAX:
                break
        return changed

    # --- bookkeeping ----------------------------------------------------------------------------
    def _alive(self) -> Iterable[int]:
        return (site for site in range(len(self._capacities)) if site not in self.lost)

    def _room(self, site: int, look: SiteLook, share: float) -> int:
        """Bytes that a site has beyond what is used there and what was promised."""
        promised = sum(nbytes for _, nbytes in self._promised[site])
        return int(look.capacity_bytes * share) - look.working_set_bytes - promised

    def _fullness(self, site: int) -> float:
        return self._weights[site] / max(1, self._capacities[site])

    def _choose(self, share: str) -> int:
        alive = list(self._alive()) or list(range(len(self._capacities)))
        best = min(alive, key=self._fullness)
        if share:
            kin = [site for site in alive if (site, share) in self._shares]
            if kin:
                nearest = min(kin, key=self._fullness)
                if self._fullness(nearest) <= self._fullness(best) + SPREAD_SLACK:
                    return nearest
        return best

    def _settle(self, slot: int, placed: _Placed, sites: tuple[int, ...]) -> None:
        for site in sites:
            if site not in placed.sites:
                self._promised[site].append((SETTLE_LOOKS, placed.nbytes))
        self._count(placed, -1)
        placed.sites = sites
        self._count(placed, +1)
        placed.hot = placed.cold = 0
        placed.rest = REST_LOOKS
        self._hot.discard(slot)
        (self._several.add if len(sites) > 1 else self._several.discard)(slot)

    def _count(self, placed: _Placed, by: int) -> None:
        for site in placed.sites:
            self._weights[site] += by * placed.nbytes
            if placed.share:
                key = (site, placed.share)
                left = self._shares.get(key, 0) + by
                if left:
                    self._shares[key] = left
                else:
                    del self._shares[key]


def _load(look: SiteLook) -> float:
    """Requests that wait for each worker."""
    return look.waiting / max(1, look.workers)
