"""Residency under random events, against a model of who waits and what may happen."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from residency_world import CHUNK, MS, SECOND, World

from overcommit.runtime._shm import RESIDENT
from overcommit.runtime.mover_messages import CANCELLED
from overcommit.runtime.parts import PartInfo, private_bytes
from overcommit.runtime.pump import WISH_WAIT_S
from overcommit.runtime.residents import NOBODY, Action, Foretold, Publish, Refuse, State, Withdraw
from overcommit.runtime.views import Tier

SLOTS = st.integers(0, 6)
WAITERS = st.integers(0, 2)
CHUNKS = st.sampled_from([1 / 512, 1 / 8, 1 / 2, 1, 2, 3, 5])
# Trunks that versions share, in chunks of 2 MiB, less what their last chunk does not use.
TRUNKS = {"a": 2 * CHUNK, "b": CHUNK + 4096, "c": 3 * CHUNK - 8192}
PARTS = st.sampled_from(["", "", "", "a", "b", "a", "ab", "ac", "bb"])
STEPS_NS = st.sampled_from([MS, 5 * MS, 400 * MS, 1_001 * MS, 20 * SECOND])
STAYS_NS = st.sampled_from([0, 0, 400 * MS, 30 * SECOND, 3600 * SECOND])
TTLS_NS = st.sampled_from([0, 0, 5 * MS, 10 * SECOND])
DEVICE_CHUNKS = 6


class ResidencyMachine(RuleBasedStateMachine):
    """The model: who waits for what, since when, and which loads are in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.outstanding: set[tuple[int, int]] = set()
        self.asked_ns: dict[int, int] = {}
        self.known: dict[int, bool] = {}  # slot -> pinned
        self.infos: dict[int, list[PartInfo]] = {}
        self.generations: Counter[int] = Counter()
        self.has_failed = False  # a load, in the last step
        self.ahead_evicted: list[int] = []
        self.foretold: dict[int, Foretold] = {}  # of those that are LOADING
        self.leaving: set[int] = set()  # slots whose former version is not gone yet

    @initialize(host_chunks=st.sampled_from([0, 3, 12]), ratio=st.sampled_from([0.0, 0.7, 0.4]))
    def build(self, host_chunks: int, ratio: float) -> None:
        self.ratio = ratio  # of packed bytes to raw ones; 0: nothing is packed
        self.world = World(DEVICE_CHUNKS, host_chunks)

    # --- events ---------------------------------------------------------------------------------
    @rule(
        slot=SLOTS,
        chunks=st.one_of(CHUNKS, st.just(0)),
        parts=PARTS,
        pinned=st.sampled_from([False, False, False, True]),
        stay_ns=STAYS_NS,
        ttl_ns=TTLS_NS,
    )
    def add(
        self, slot: int, chunks: float, parts: str, pinned: bool, stay_ns: int, ttl_ns: int
    ) -> None:
        if slot not in self.known and (chunks or parts):
            self.known[slot] = pinned
            infos = self.infos[slot] = [
                PartInfo(digest, TRUNKS[digest], self._packed(TRUNKS[digest])) for digest in parts
            ]
            self.world.add(
                *(slot, chunks),
                pinned=pinned,
                min_resident_ns=stay_ns,
                ttl_ns=ttl_ns,
                parts=infos,
                packed_bytes=self._packed(int(chunks * CHUNK)),
            )

    def _packed(self, nbytes: int) -> int:
        return int(nbytes * self.ratio) // 4096 * 4096

    @rule(slot=SLOTS, pinned=st.booleans(), priority=st.integers(-1, 1), ttl_ns=TTLS_NS)
    def add_again(self, slot: int, pinned: bool, priority: int, ttl_ns: int) -> None:
        if slot in self.known:
            infos = self.infos[slot]
            nbytes = private_bytes(self.world.residency._versions[slot].nbytes, infos)
            self.known[slot] = pinned
            self.world.add(
                *(slot, nbytes / CHUNK),
                pinned=pinned,
                priority=priority,
                ttl_ns=ttl_ns,
                parts=infos,
            )

    @rule(stay_ns=STAYS_NS)
    def damp(self, stay_ns: int) -> None:
        self.world.residency.set_stay(stay_ns)

    @rule(slot=SLOTS)
    def remove(self, slot: int) -> None:
        self.known.pop(slot, None)
        self._settle(self.world.remove(slot))
        self.asked_ns.pop(slot, None)
        assert not any(wanted == slot for wanted, _ in self.outstanding)

    @rule(slot=SLOTS, waiter=WAITERS)
    def want(self, slot: int, waiter: int) -> None:
        self.outstanding.add((slot, waiter))
        self.asked_ns.setdefault(slot, self.world.now_ns)
        is_attach = slot in self.known and self.world.state(slot) is State.DEVICE
        self._settle(self.world.want(slot, waiter), is_attach=is_attach)

    @rule(
        slot=SLOTS,
        tier=st.sampled_from([Tier.HOST, Tier.DEVICE]),
        spared=st.sets(SLOTS, max_size=3),
    )
    def prefetch(self, slot: int, tier: Tier, spared: set[int]) -> None:
        port = self.world.port
        port.evicted.clear()
        before = set(self.world.residency._pump.leaving)
        self._settle_ahead(self.world.prefetch(slot, tier, lambda v: v.slot not in spared))
        for victim in self.ahead_evicted:
            assert victim in before or (victim not in spared and not port.waiting[victim])

    @rule(slot=SLOTS)
    def want_for_nobody(self, slot: int) -> None:
        self.asked_ns.setdefault(slot, self.world.now_ns)
        self._settle(self.world.want(slot, NOBODY))

    @precondition(lambda self: self.world.loads)
    @rule(pick=st.integers(0, 3), ok=st.sampled_from([True, True, True, False]))
    def load_done(self, pick: int, ok: bool) -> None:
        jobs = list(self.world.loads)
        job = jobs[pick % len(jobs)]
        # The mover may have been faster than the word that cancels.
        message = CANCELLED if job in self.world.cancelled else "bad sector"
        # What the mover has published was copied to its end.
        ok = ok or self.world.loads[job].slot in self.world.port.early
        self.has_failed = not ok
        self._settle(self.world.finish(job, ok=ok, message=message))

    @rule(pick=st.integers(0, 3))
    def mover_publishes(self, pick: int) -> None:
        """From now on it may be leased; residency hears of it later."""
        early = self.world.port.early
        loads = [load for load in self.world.loads.values() if load.slot not in early]
        loads = [load for load in loads if load.publishes]
        if loads:
            self.world.publish_early(loads[pick % len(loads)].job)

    @rule(slot=SLOTS)
    def take_lease(self, slot: int) -> None:
        state, _ = self.world.port.words.get(slot, (0, 0))
        if state == RESIDENT:
            self.world.port.leases[slot] += 1
            self.world.use(slot)

    @rule(slot=SLOTS)
    def drop_leases(self, slot: int) -> None:
        self.world.port.leases[slot] = 0

    @rule(slot=SLOTS, waiting=st.integers(0, 2))
    def queue(self, slot: int, waiting: int) -> None:
        self.world.port.waiting[slot] = waiting

    @rule(slot=SLOTS)
    def stop_asking(self, slot: int) -> None:
        """The requests that wait for it expire."""
        self.world.port.asking.discard(slot)

    @rule(slot=SLOTS, patience_ns=st.sampled_from([0, MS, SECOND]))
    def expect(self, slot: int, patience_ns: int) -> None:
        """Requests are told when to come back: from then on its wish stays."""
        now_ns = self.world.now_ns
        expected = self.world.residency.expect(slot, now_ns + patience_ns, now_ns)
        assert expected is None or now_ns + patience_ns < expected[0] <= expected[1]

    @rule(count=st.integers(1, 2))
    def leases_are_taken_behind_our_back(self, count: int) -> None:
        self.world.port.lies = count

    @rule(waiter=WAITERS)
    def worker_gone(self, waiter: int) -> None:
        self.world.residency.forget_waiter(waiter)
        self.outstanding = {pair for pair in self.outstanding if pair[1] != waiter}

    @rule(slot=SLOTS)
    def serve_elsewhere(self, slot: int) -> None:
        port, residency = self.world.port, self.world.residency
        was_leased = bool(port.leases[slot])
        is_held = slot in self.known and self.world.state(slot) is State.DEVICE
        gave_back = residency.release(slot, self.world.now_ns)
        if is_held and not self.known[slot]:
            assert gave_back is (self.world.state(slot) is not State.DEVICE)
            assert not (gave_back and was_leased)

    @precondition(lambda self: not self.world.port.early)
    @rule()
    def lose_device(self) -> None:
        """The memory is gone with the mover, and with it every worker that had it open."""
        self.world.port.leases.clear()
        self.world.port.lies = 0
        actions = self.world.take(self.world.residency.lose_device(self.world.now_ns))
        self.world.port.evicted.clear()  # nobody was spared: neither the pinned nor the wanted
        self._settle(actions)
        assert all(self.world.state(slot) is not State.DEVICE for slot in self.known)

    @rule(step_ns=STEPS_NS)
    def tick(self, step_ns: int) -> None:
        self._settle(self.world.tick(step_ns))

    @rule()
    def drain(self) -> None:
        """Everybody lets go and the mover works: then everybody gets an answer."""
        self.world.port.leases.clear()
        self.world.port.waiting.clear()
        self.world.port.lies = 0
        deadline_ns = self.world.now_ns + int((WISH_WAIT_S + 1) * SECOND)
        while self.outstanding or (self.world.residency._wishes and not any(self.known.values())):
            assert self.world.now_ns < deadline_ns, "somebody never got an answer"
            while self.world.loads:
                self._settle(self.world.finish())
            self._settle(self.world.tick(100 * MS))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            had_pins = any(self.known.values())
            refused = len(self.world.refused)
            self.drain()
            overdue = [r for r in self.world.refused[refused:] if r.code == "overloaded"]
            # Without pins nothing is in the way once all let go; slabs are not either.
            assert had_pins or not overdue
            for slot in list(self.known):
                self.remove(slot)
            while self.world.loads:
                self._settle(self.world.finish())
            self.world.tick()
            assert self.world.device.used_bytes == 0
            assert self.world.host is None or self.world.host.used_bytes == 0
            assert not self.world.residency._parts
            assert not self.world.port.is_hungry
            assert self.world.residency.next_tick_ns() is None

    def _settle_ahead(self, actions: Sequence[Action]) -> None:
        self.ahead_evicted = list(self.world.port.evicted)
        self._settle(actions)

    # --- what must hold -------------------------------------------------------------------------
    def _settle(self, actions: Sequence[Action], *, is_attach: bool = False) -> None:
        """Take answers off the model; each must be one that somebody waits for."""
        self._check_evictions()
        for action in actions:
            if isinstance(action, Publish):
                known = self.generations[action.slot]
                # A try that failed took its number along.
                assert action.generation == known if is_attach else action.generation > known
                self.generations[action.slot] = action.generation
                if (foretold := self.foretold.pop(action.slot, None)) is not None:
                    assert foretold.generation == action.generation
                    assert foretold.extents == action.extents, "mapped ahead in the wrong place"
            if isinstance(action, Withdraw):
                assert not self.world.port.waiting[action.slot], "somebody still waits"
            if isinstance(action, Publish | Refuse | Withdraw):
                for waiter in action.waiters:
                    assert (action.slot, waiter) in self.outstanding, "an answer nobody waits for"
                    self.outstanding.remove((action.slot, waiter))
                assert not any(slot == action.slot for slot, _ in self.outstanding)
                self.asked_ns.pop(action.slot, None)

    def _check_evictions(self) -> None:
        port = self.world.port
        starving = [at for at in self.asked_ns.values() if self.world.now_ns - at > SECOND]
        for slot in port.evicted:
            assert not port.leases[slot]
            if slot in self.known and slot not in self.leaving:
                assert not self.known[slot], "a pinned version was evicted"
                # A pinned version may have starved on its own behalf.
                assert not port.waiting[slot] or starving or any(self.known.values())
        port.evicted.clear()
        self.leaving = set(self.world.residency._pump.leaving)

    @invariant()
    def everybody_who_waits_is_known_to_residency(self) -> None:
        if hasattr(self, "world"):
            residency = self.world.residency
            waiting = {
                (version.slot, waiter)
                for version in residency._versions.values()
                for waiter in version.waiters - {NOBODY}
            }
            assert waiting == self.outstanding

    @invariant()
    def where_a_version_will_be_is_known_as_soon_as_it_loads_and_stays_so(self) -> None:
        if hasattr(self, "world"):
            residency = self.world.residency
            former, self.foretold = self.foretold, {}
            for slot in residency._versions:
                foretold = residency.foretell(slot)
                assert (foretold is not None) == (self.world.state(slot) is State.LOADING)
                if foretold is None:
                    continue
                assert foretold.waiters == {w for s, w in self.outstanding if s == slot}
                # A load that failed, and one that began in the same step, go to other places.
                known = former.get(slot)
                if known is not None and not self.has_failed:
                    assert (known.generation, known.extents) == (
                        foretold.generation,
                        foretold.extents,
                    )
                self.foretold[slot] = foretold
            self.has_failed = False

    @invariant()
    def time_will_come_for_whoever_waits(self) -> None:
        if hasattr(self, "world") and self.outstanding and not self.world.loads:
            assert self.world.residency.next_tick_ns() is not None

    @invariant()
    def a_leased_version_keeps_its_bytes(self) -> None:
        if hasattr(self, "world"):
            residency = self.world.residency
            for slot, leases in self.world.port.leases.items():
                if leases:
                    version = residency._pump.leaving.get(slot) or residency._versions[slot]
                    assert version.state is State.DEVICE or slot in self.world.port.early


ResidencyMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("OVERCOMMIT_EXAMPLES", "150")),
    stateful_step_count=60,
    deadline=None,
)
test_residency_keeps_its_promises = ResidencyMachine.TestCase
