"""Scenario `churn`: what is left of an arena after a hundred thousand loads and evictions.

The server's own room, policy and allocator, without bytes behind them: models of 50 KB to 30 GB come
and go by a popularity law, and whoever does not fit evicts whom the policy offers.  Nothing is ever
moved: an allocation has the extents that it got until it is freed, which is checked.

Usable are, at an allocation that fails, all bytes of the arena but those that are free and that this
model could not have had even a part of: free pages between the models of slabs where it needs whole
chunks, runs of pages that are too short where it needs one run, whole chunks that must not be split.
So they are the bytes in use, and those that a next model of the same kind, as large as fits, would get.
Bytes that an allocation holds beyond its model's size (pages and chunks are whole) are in use; how
many they are is said beside it.
"""

from __future__ import annotations

import bisect
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from overcommit.bench import screen
from overcommit.bench.prepare import Options
from overcommit.bench.report import Figure, Report
from overcommit.runtime.allocator import ChunkAllocator, Extent
from overcommit.runtime.config import GIB, MIB
from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.parts import Part
from overcommit.runtime.policy import make_policy
from overcommit.runtime.residents import State, Terms, Totals, Usage, Version

LOADS: Final = 100_000
QUICK_LOADS: Final = 5_000
MODELS: Final = 4_000
USABLE_MIN: Final = 0.98
POPULARITY_FALL: Final = 0.7
BYTES_MIN, BYTES_MAX = 50_000, 30 * 10**9
POLICIES: Final = ("cost_aware", "lru")


@dataclass(slots=True, frozen=True)
class Population:
    """Models by size, log-uniform, and an arena for them."""

    name: str
    arena_bytes: int
    small_share: float  # of the models: at most 1 MiB, so in slabs
    bytes_max: int = BYTES_MAX
    splits: tuple[bool, ...] = (True, False)  # may chunks of 64 MiB be split


POPULATIONS: Final = (
    Population("50 KB to 30 GB in 80 GiB", 80 * GIB, 0.23),
    Population("nine in ten are small, in 80 GiB", 80 * GIB, 0.9),
    Population("up to 500 MB, in 4 GiB", 4 * GIB, 0.5, 500 * 10**6),
    # Sixteen chunks of 64 MiB that cannot be split are too few for slabs and large models both.
    Population("99 in 100 are small, in 1 GiB", GIB, 0.99, 500 * 10**6, (True,)),
)


class Watched(ChunkAllocator):
    """The allocator, and what was found whenever it failed."""

    def __init__(self, capacity_bytes: int, *, can_split: bool) -> None:
        super().__init__(capacity_bytes, can_split=can_split)
        self.usable: list[float] = []
        self.rounding: list[float] = []  # held beyond the models' sizes, of the arena
        self.seconds: list[float] = []
        self.moved = 0  # frees of what was not given so
        self._given: dict[tuple[Extent, ...], int] = {}
        self._asked = 0

    def try_allocate(self, nbytes: int, *, exact: bool = False) -> tuple[Extent, ...] | None:
        """Allocate, and take the time; or say what was usable."""
        started = time.perf_counter()
        extents = super().try_allocate(nbytes, exact=exact)
        self.seconds.append(time.perf_counter() - started)
        if extents is None:
            lost = self.free_bytes - self.obtainable_bytes(nbytes)
            self.usable.append(1 - lost / self.capacity_bytes)
            self.rounding.append((self.used_bytes - self._asked) / self.capacity_bytes)
        else:
            self._given[extents] = nbytes
            self._asked += nbytes
        return extents

    def free(self, extents: Iterable[Extent | tuple[int, int]]) -> None:
        """Free, and see whether it is as it was given."""
        given = tuple(Extent(*extent) for extent in extents)
        nbytes = self._given.pop(given, None)
        self.moved += nbytes is None
        self._asked -= nbytes or 0
        super().free(given)


class Workers:
    """Counters of workers that run one request after the other, and hold no lease."""

    def __init__(self, models: int) -> None:
        self.uses = [0] * models
        self.last_ns = [0] * models

    def try_evict(self, slot: int, generation: int) -> bool:
        """Nobody runs it."""
        return True

    def usage(self, slot: int) -> Usage:
        """Return its counters."""
        return Usage(0, self.uses[slot], self.last_ns[slot], 0)

    def set_state(self, slot: int, state: int, generation: int) -> None:
        """Nobody looks at it."""

    def set_hungry(self, hungry: bool) -> None:
        """Nobody rings."""


@dataclass(slots=True, frozen=True)
class Life:
    """What happened to an arena."""

    arena: Watched
    loads: int
    evictions: int
    refused: int  # loads that found no room though everybody could have left


def sizes_of(population: Population, dice: np.random.Generator, models: int) -> list[int]:
    """Draw sizes, log-uniform below and above the limit of slabs."""
    small = dice.random(models) < population.small_share
    below = np.exp(dice.uniform(np.log(BYTES_MIN), np.log(MIB), size=models))
    above = np.exp(dice.uniform(np.log(MIB + 1), np.log(population.bytes_max), size=models))
    return [int(nbytes) for nbytes in np.where(small, below, above)]


def live(
    population: Population, policy_name: str, loads: int, seed: int, *, can_split: bool
) -> Life:
    """Load that many models into an arena, evicting as the server would."""
    dice = np.random.default_rng(seed)
    sizes = sizes_of(population, dice, MODELS)
    weights = np.arange(1, MODELS + 1) ** -POPULARITY_FALL
    cumulated = np.cumsum(weights / weights.sum()).tolist()
    order = dice.permutation(MODELS).tolist()  # who is popular has nothing to do with size
    arena = Watched(population.arena_bytes, can_split=can_split)
    workers = Workers(MODELS)
    totals = Totals()
    room = DeviceRoom(arena, make_policy(policy_name), totals, workers)
    versions = [
        Version(slot, f"model-{slot}", nbytes, Terms(), 1, (Part("", nbytes, 1),))
        for slot, nbytes in enumerate(sizes)
    ]
    for version in versions:
        room.on_terms(version)
    draw = random.Random(seed)
    now_ns = loaded = refused = 0
    while loaded < loads:
        now_ns += int(draw.expovariate(1.0) * 1e9) + 1
        slot = order[min(MODELS - 1, bisect.bisect(cumulated, draw.random()))]
        version = versions[slot]
        if version.state is not State.DEVICE:
            loaded += 1
            refused += not _try_load(room, version, now_ns)
        workers.uses[slot] += 1
        workers.last_ns[slot] = now_ns
    arena.check()
    return Life(arena, loaded, totals.evictions_device, refused)


def _try_load(room: DeviceRoom, version: Version, now_ns: int) -> bool:
    if not room.try_place(version, version.parts, now_ns):
        return False
    version.state = State.DEVICE
    version.generation += 1
    version.published_ns = now_ns
    version.source, version.load_ns = "disk", version.nbytes // 5
    room.on_published(version, now_ns)
    return True


# --- the scenario -------------------------------------------------------------------------------
def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    loads = QUICK_LOADS if options.quick else LOADS
    report.settings = {"loads in each row": loads, "models": MODELS, "seed": options.seed}
    cells = [(p, s, n) for p in POPULATIONS for s in p.splits for n in POLICIES]
    worst, refused, moved = 1.0, 0, 0
    with screen.bar(report.console, "loading and evicting") as advance:
        for done, (population, can_split, policy) in enumerate(cells):
            advance(done, len(cells))
            life = live(population, policy, loads, options.seed, can_split=can_split)
            arena = life.arena
            worst = min([worst, *arena.usable])
            refused, moved = refused + life.refused, moved + arena.moved
            chunks = "chunks split" if can_split else "chunks as made"
            seconds = sorted(arena.seconds)
            report.add(
                f"{population.name}; {chunks}; {policy}",
                Figure("usable at failures, least", min(arena.usable, default=1.0), "share"),
                Figure("usable at failures, mean", _mean(arena.usable, 1.0), "share"),
                Figure("rounding up, mean", _mean(arena.rounding, 0.0), "share"),
                Figure("failures", len(arena.usable)),
                Figure("evictions a load", life.evictions / life.loads, "x"),
                Figure("an allocation, mean", _mean(seconds, 0.0) * 1e6, "us"),
                Figure("an allocation, p99", seconds[len(seconds) * 99 // 100] * 1e6, "us"),
            )
    report.headlines.append(("usable at the worst of all failures", f"{worst:.1%}", ""))
    report.expect(
        f"at least {USABLE_MIN:.0%} usable at every failure", worst >= USABLE_MIN, f"{worst:.4f}"
    )
    report.expect("nothing was moved", moved == 0, f"{moved}")
    report.expect("every model found room", refused == 0, f"{refused}")


def _mean(values: Sequence[float], empty: float) -> float:
    return statistics.fmean(values) if values else empty
