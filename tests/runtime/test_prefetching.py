"""Prefetching in the supervisor: real predictor, books and residency; everything else is played."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from residency_world import CHUNK, SECOND, World

from overcommit.runtime.activation import Running
from overcommit.runtime.config import ModelConfig, Settings
from overcommit.runtime.entries import Entry
from overcommit.runtime.entries import State as Ready
from overcommit.runtime.mover_messages import CANCELLED, Load
from overcommit.runtime.prefetching import INTERVAL_NS, Prefetching
from overcommit.runtime.residents import Action, StartLoad, State
from overcommit.runtime.views import Tier

DAY = 86_400
NINE = 9 * 3600
MONDAY = 4 * DAY + 52 * 7 * DAY


@dataclass
class Worker:
    told: set[int] = field(default_factory=set)


class Rig:
    """Versions 1, 2, ... of a chunk each; the mover is as fast as `finish` is called."""

    def __init__(
        self,
        folder: Path,
        device_chunks: int,
        host_chunks: int = 0,
        *,
        count: int = 4,
        **chosen: Any,
    ) -> None:
        self.world = World(device_chunks, host_chunks)
        self.worker = Worker()
        self.entries = {slot: self._entry(slot) for slot in range(1, count + 1)}
        self.running: dict[int, Running] = {}
        self.wall_s = float(MONDAY)
        self.watchers: tuple[Callable[..., None], ...] = ()
        # The three parts that are played here have one method each that is asked.
        self.quarantine = self
        chosen.setdefault("prefetch_share", 1.0)
        parts = {"residency": self.world.residency, "activations": self, "gate": self.world.port}
        site = cast(Any, SimpleNamespace(**parts))
        self.prefetching = Prefetching(
            Settings(cache_dir=str(folder), **chosen),
            *([site], lambda slot: site, cast(Any, self), cast(Any, self), lambda: self.wall_s),
        )
        for slot in self.entries:
            self.world.add(slot)

    def _entry(self, slot: int) -> Entry:
        name = f"model-{slot}"
        return Entry(slot, name, "1", "", "", ModelConfig(), Ready.READY, nbytes=CHUNK)

    # --- registry, fleet, activations -----------------------------------------------------------
    def by_slot(self, slot: int) -> Entry | None:
        return self.entries.get(slot)

    def of_kind(self, kind: str) -> list[Worker]:
        return [self.worker] if kind == "worker" else []

    def watch(self, *watchers: Callable[..., None]) -> None:
        self.watchers = watchers

    def blocked(self, slot: int, now_ns: int) -> float | None:
        return None

    def load(self, job: int) -> Running | None:
        return self.running.get(job)

    def apply(self, actions: Iterable[Action], now_ns: int) -> None:
        actions = self.world.take(list(actions))
        for action in actions:
            self.watchers[0](action, now_ns)
            if isinstance(action, StartLoad):
                message = Load(
                    job=action.job, slot=action.slot, source=action.source, path="", nbytes=1
                )
                self.running[action.job] = Running(message, now_ns)

    # --- events ---------------------------------------------------------------------------------
    def want(self, slot: int) -> None:
        self.worker.told.add(slot)
        self.apply(self.world.residency.want(slot, 0, self.world.now_ns), self.world.now_ns)

    def finish(self, *, ok: bool = True, message: str = "") -> None:
        job = next(iter(self.world.loads))
        takes_ns = 50_000_000 if self.world.loads.pop(job).source == "disk" else 5_000_000
        self.running.pop(job)
        self.world.now_ns += takes_ns
        now_ns = self.world.now_ns
        actions = self.world.residency.on_load_done(job, ok, message, now_ns, takes_ns)
        self.apply(actions, now_ns)
        self.world.now_ns += 1

    def ask(self, slot: int) -> None:
        """A request, from its wish to its end."""
        if self.world.state(slot) is not State.DEVICE:
            self.want(slot)
            while self.world.loads:
                self.finish()
        self.worker.told.add(slot)
        self.world.use(slot)

    def step(self, wall_s: float | None = None) -> None:
        self.wall_s = self.wall_s if wall_s is None else wall_s
        self.world.now_ns += INTERVAL_NS
        self.prefetching.step(self.world.now_ns)

    def learn(self, *slots: int, days: int = 8) -> None:
        """Each of these has its nine o'clock."""
        for day in range(days):
            for minute in (2, 15, 40):
                for slot in slots:
                    # Days pass on the wall; the supervisor's own clock need not.
                    self.wall_s = MONDAY + day * DAY + NINE + minute * 60
                    self.ask(slot)
                    self.step()
        self.wall_s = MONDAY + days * DAY + 3 * 3600
        self.world.now_ns += 7200 * SECOND

    @property
    def totals(self) -> Any:
        return self.prefetching.books.totals


def nine(days: int = 8) -> float:
    return float(MONDAY + days * DAY + NINE - 60)


def evicted(rig: Rig, *slots: int) -> None:
    """Others have taken the place of these, and are gone."""
    for slot in slots:
        room = rig.world.residency._on_device
        assert room.try_let_go(room.holders[slot])


def test_a_model_is_loaded_before_its_hour_and_a_request_finds_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 2)
    rig.learn(1)
    evicted(rig, 1)
    rig.step()
    assert rig.world.loads == {}, "at night nothing happens"
    rig.step(nine())
    (load,) = rig.world.loads.values()
    assert (load.slot, load.urgency) == (1, "prefetch")
    rig.finish()
    rig.world.use(1)
    rig.step()
    assert (rig.totals.started_device, rig.totals.used) == (1, 1)
    assert rig.totals.saved_s > 0
    assert rig.prefetching.books.outstanding == {}


def test_where_device_is_full_of_the_due_a_model_comes_to_host(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 1, host_chunks=2)
    rig.learn(1, 2)
    for slot in (1, 2):
        rig.world.residency._on_host.drop(rig.world.residency._versions[slot])  # type: ignore[union-attr]
    assert rig.world.state(1) is State.DISK
    rig.step(nine())
    (load,) = rig.world.loads.values()
    assert (load.slot, load.device, load.source) == (1, None, "disk")
    rig.finish()
    rig.want(1)
    assert rig.totals.used == 1, "the wish finds it in HOST"


def test_a_request_that_comes_meanwhile_promotes_and_only_the_rest_is_waited_for(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path, 2)
    rig.learn(1)
    evicted(rig, 1)
    rig.step(nine())
    rig.want(1)
    assert (rig.totals.promoted, rig.totals.used) == (1, 1)
    rig.finish()
    assert rig.world.published[-1].waiters == {0}


def test_a_request_that_needs_the_room_cancels(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 1)
    rig.learn(1)
    evicted(rig, 1)
    rig.step(nine())
    rig.world.port.waiting[2] = 1
    rig.want(2)
    assert rig.totals.cancelled == 1
    rig.finish(ok=False, message=CANCELLED)
    assert next(iter(rig.world.loads.values())).slot == 2
    rig.finish()
    assert (rig.totals.lost, rig.totals.failed, rig.totals.used) == (0, 0, 0)


def test_who_is_evicted_unused_is_waste_and_who_fails_is_neither(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 1)
    rig.learn(1)
    evicted(rig, 1)
    rig.step(nine())
    rig.finish(ok=False, message="bad sector")
    rig.step()
    assert rig.totals.failed == 1
    rig.world.now_ns += 100 * SECOND
    rig.step()
    rig.finish()
    rig.want(2)
    rig.finish()
    rig.step()
    assert (rig.totals.lost, rig.totals.lost_bytes) == (1, CHUNK)


def test_who_was_displaced_and_is_asked_for_is_regretted(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 1)
    rig.learn(1)
    rig.ask(2)
    rig.world.now_ns += 3600 * SECOND
    rig.step(nine())
    assert rig.world.port.evicted[-1] == 1, "a bet on paper"
    rig.prefetching.books.miss(1, 1.0)
    rig.step()
    assert rig.world.port.evicted[-1] == 2, "which was won"
    assert rig.totals.displaced == 1
    rig.finish()
    rig.want(2)
    rig.step()
    assert rig.totals.regretted == 1


@pytest.mark.parametrize("why", ["leased", "waited for", "used lately"])
def test_some_are_never_displaced(tmp_path: Path, why: str) -> None:
    rig = Rig(tmp_path, 1)
    rig.learn(1)
    rig.ask(2)
    rig.world.now_ns += 3600 * SECOND
    rig.world.port.leases[2] = why == "leased"
    rig.world.port.waiting[2] = why == "waited for"
    if why == "used lately":
        rig.world.use(2)
    rig.world.port.evicted.clear()
    rig.prefetching.books.bet_on_paper(99, 1.0, [], 0.0)
    rig.prefetching.books.miss(99, 1.0)
    assert rig.prefetching.books.may_displace
    rig.step(nine())
    assert rig.world.port.evicted == []
    assert rig.world.loads == {}


def test_a_budget_of_nothing_prefetches_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 2, prefetch_share=0.0)
    rig.learn(1)
    evicted(rig, 1)
    rig.step(nine())
    assert rig.world.loads == {}


def test_a_successor_and_a_restart_know_what_was_learnt(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 2)
    rig.learn(1)
    rig.prefetching.close()
    rig = Rig(tmp_path, 2)
    rig.watchers[1](1, "model-1")
    rig.step(nine())
    assert [load.slot for load in rig.world.loads.values()] == [1]


def test_who_is_not_ready_or_gone_is_left_alone(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 2)
    rig.learn(1, 2)
    evicted(rig, 1, 2)
    rig.entries[1].state = Ready.UNLOADED
    rig.watchers[2](2)
    rig.step(nine())
    assert rig.world.loads == {}


class PrefetchingMachine(RuleBasedStateMachine):
    """Whatever happens: the share holds, the protected stay, every bet ends once."""

    folder: Path

    @initialize(device=st.integers(1, 3), host=st.integers(0, 3), share=st.sampled_from([0.5, 1.0]))
    def build(self, device: int, host: int, share: float) -> None:
        self.temporary = TemporaryDirectory()
        self.rig = Rig(Path(self.temporary.name), device, host, prefetch_share=share)
        self.share = share
        self.rig.learn(1, 2, 3, days=3)
        self.rig.prefetching.books.bet_on_paper(99, 1e6, [], 0.0)
        self.rig.prefetching.books.miss(99, 1.0)
        self.former: list[float] = []

    def teardown(self) -> None:
        if hasattr(self, "temporary"):
            self.rig.prefetching.close()
            self.temporary.cleanup()

    @rule(slot=st.integers(1, 4))
    def ask(self, slot: int) -> None:
        if not self.rig.world.loads and not any(self.rig.world.port.waiting.values()):
            self.rig.world.port.leases.clear()
            self.rig.ask(slot)

    @rule(slot=st.integers(1, 4))
    def want(self, slot: int) -> None:
        self.rig.want(slot)

    @rule(ok=st.sampled_from([True, True, False]))
    def finish(self, ok: bool) -> None:
        world = self.rig.world
        if world.loads:
            job = next(iter(world.loads))
            cancelled = job in world.cancelled
            self.rig.finish(ok=ok, message=CANCELLED if cancelled else "bad sector")

    @rule(slot=st.integers(1, 4), waits=st.booleans())
    def wait_for(self, slot: int, waits: bool) -> None:
        self.rig.world.port.waiting[slot] = waits

    @rule(hours=st.sampled_from([0.01, 0.2, 1, 5, 24]))
    def step(self, hours: float) -> None:
        world = self.rig.world
        world.now_ns += int(hours * 3600) * SECOND
        world.port.evicted.clear()
        protected = {
            slot
            for slot in self.rig.entries
            if world.port.waiting[slot]
            or world.now_ns - world.port.last_used_ns[slot] < 58 * SECOND
        }
        before = len(world.loads)
        self.rig.step(self.rig.wall_s + hours * 3600)
        assert not protected & set(world.port.evicted)
        assert len(world.loads) <= max(before, 1)

    @invariant()
    def the_share_holds_and_totals_add_up(self) -> None:
        if not hasattr(self, "rig"):
            return
        rig, books = self.rig, self.rig.prefetching.books
        for tier, allocator in ((Tier.DEVICE, rig.world.device), (Tier.HOST, rig.world.host)):
            capacity = 0 if allocator is None else allocator.capacity_bytes
            assert books.waiting_bytes(tier) <= capacity * self.share
        totals = rig.totals
        ended = totals.used + totals.cancelled + totals.failed + totals.lost + totals.expired
        begun = totals.started_device + totals.started_host
        # A prefetch to HOST that goes on to DEVICE is the second one's from then on.
        assert ended + len(books.outstanding) <= begun
        now = [float(getattr(totals, name)) for name in totals.__slots__]
        assert all(new >= old for new, old in zip(now, self.former, strict=False))
        self.former = now


PrefetchingMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
test_prefetching_keeps_its_promises = PrefetchingMachine.TestCase
