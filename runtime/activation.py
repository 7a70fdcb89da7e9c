"""From a worker's wish to weights in memory: residency's decisions, carried out.

Joins the pure residency core with the mover and the workers: turns its actions into messages and
their answers back into its events.  Keeps a record of each activation for status and metrics.

Invariants
 1. Every StartLoad goes to the mover once per mover incarnation; after a mover's death the loads in
    flight are sent again, to the same extents (nobody reads them before they are published).
 2. A worker gets VersionInfo before the first Placed or Coming of a version.  Coming, to those who
    wait when a load starts, only says where Placed will be: losing it costs time alone.  Both go to it in
    the order in which they were true: what they say of sharing holds for all that it was told before.
 3. A load that its mover had published when it died has ended, and is not sent again.
 4. An action that fails takes no other of its event along.  A load that cannot be asked for has failed.
 5. A version whose requests kill workers is refused while it is in quarantine, and disturbs nobody else.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from overcommit.runtime import _shm, refusals
from overcommit.runtime.boundary import Boundary
from overcommit.runtime.children import Child
from overcommit.runtime.config import NEVER_NS, QUIET_NS, Settings
from overcommit.runtime.entries import Entry, State, to_info
from overcommit.runtime.errors import Overloaded, Unavailable
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.messages import Message
from overcommit.runtime.mover_messages import (
    CANCELLED,
    CancelLoad,
    Load,
    LoadDone,
    PromoteLoad,
)
from overcommit.runtime.parts import path_of
from overcommit.runtime.quarantine import Quarantine
from overcommit.runtime.registry import Registry
from overcommit.runtime.residency import Residency
from overcommit.runtime.residents import (
    Action,
    CancelStarted,
    PromoteStarted,
    Publish,
    Refuse,
    StartLoad,
    Withdraw,
)
from overcommit.runtime.stays import Stays
from overcommit.runtime.timings import Timings
from overcommit.runtime.worker_messages import (
    Activate,
    ActivationFailed,
    Attaches,
    Coming,
    Expected,
    Forget,
    Placed,
    Withdrawn,
)

log = logging.getLogger("overcommit.activation")


@dataclass(slots=True)
class Running:
    """A load that the mover has, or will get as soon as there is one."""

    message: Load
    asked_ns: int
    is_cancelled: bool = False


class Activations:
    """Wishes in, messages out."""

    def __init__(
        self,
        settings: Settings,
        residency: Residency,
        registry: Registry,
        fleet: Fleet,
        quarantine: Quarantine,
        site: int = 0,
        pins: Callable[[int], bool] = lambda slot: True,
        table: _shm.ResidencyTable | None = None,
        boundary: Boundary | None = None,
    ) -> None:
        """`pins(slot)`: whether a version that its folder pins is pinned at this site.

        `table` is what the mover publishes in; without one, only residency does.
        """
        self._run = (boundary or Boundary()).run
        self._table = table
        self._site = site
        self.stays = Stays(settings, pins)
        self._settings = settings
        self._residency = residency
        self._registry = registry
        self._fleet = fleet
        self._running: dict[int, Running] = {}
        self._verified: set[str] = set()
        self.quarantine = quarantine
        self._on_action: Callable[[Action, int], None] = lambda action, now_ns: None
        self._on_ready: Callable[[int, str], None] = lambda slot, name: None
        self._on_removed: Callable[[int], None] = lambda slot: None
        self.timings = Timings()
        self._unheard: dict[int, str] = {}  # slot -> why a pinned version was refused last
        self._asked_ns = 0  # when a load was asked for last

    def watch(
        self,
        on_action: Callable[[Action, int], None],
        on_ready: Callable[[int, str], None],
        on_removed: Callable[[int], None],
    ) -> None:
        """Have somebody told of what residency decides, and of versions that come and go."""
        self._on_action, self._on_ready, self._on_removed = on_action, on_ready, on_removed

    # --- from workers ---------------------------------------------------------------------------
    def on_activate(self, worker: Child, message: Activate, now_ns: int) -> None:
        """A worker has requests for this version and cannot run them."""
        slot = message.slot
        entry = self._registry.by_slot(slot)
        if entry is None or not entry.image_path:
            worker.post(
                ActivationFailed(slot=slot, code="not_found", message="the version is gone")
            )
            return
        if entry.ended:
            text = refusals.gone(entry.name)
            worker.post(ActivationFailed(slot=slot, code=Unavailable.code, message=text))
            return
        blocked_s = self.quarantine.blocked(slot, now_ns)
        if blocked_s is not None:
            text = refusals.in_quarantine(entry.name, entry.version, blocked_s)
            failed = ActivationFailed(slot=slot, code="unavailable", message=text)
            worker.post(replace(failed, retry_after_s=blocked_s))
            return
        if self._table is not None and self._table.get(slot)[0] == _shm.ABSENT:
            if now_ns - self._asked_ns >= QUIET_NS:
                self._fleet.mover_bells.ring(self._site)  # it gets ready while this is decided
            self._asked_ns = now_ns
        self._tell(worker, entry)
        latest_ns = message.latest_ns if self._settings.admission else NEVER_NS
        self.apply(self._residency.want(slot, worker.seat.index, now_ns, latest_ns), now_ns)
        if self._settings.admission:
            expected = self._residency.expect(slot, message.earliest_ns, now_ns)
            if expected is not None:
                ready_ns, likely_ns = expected
                worker.post(Expected(slot=slot, ready_ns=ready_ns, likely_ns=likely_ns))

    def on_worker_gone(self, worker: Child, now_ns: int) -> None:
        """Read from a dead worker's status what it was doing; let go of what it waited for."""
        self._residency.forget_waiter(worker.seat.index)
        if worker.status is None or worker.process.kill_asked:
            return
        _, started_ns, _, slot, request_ids = worker.status.read()
        entry = self._registry.by_slot(slot) if started_ns else None
        if entry is None:
            return
        log.warning(
            "worker %d died while it ran %s version %s",
            *(worker.seat.index, entry.name, entry.version),
        )
        # A popular version runs in any worker that is killed from outside.  What speaks against
        # a version is that a request which had killed one worker, retried alone, kills the next.
        suspects = self.quarantine.suspects
        if any(request_id in suspects for request_id in request_ids):
            self.quarantine.on_worker_died(slot, now_ns)
        suspects.extend(request_ids)

    def on_attaches(self, worker: Child, message: Attaches) -> None:
        """A worker says when it mapped what."""
        entries = [(self._registry.by_slot(attach.slot), attach) for attach in message.attaches]
        self.timings.on_attaches(
            worker.seat.index,
            [(entry.nbytes, attach) for entry, attach in entries if entry is not None],
        )

    def _tell(self, worker: Child, entry: Entry) -> None:
        if entry.slot not in worker.told:
            worker.told.add(entry.slot)
            worker.post(to_info(entry))

    # --- from the mover -------------------------------------------------------------------------
    def on_load_done(self, done: LoadDone, now_ns: int) -> None:
        """A load ended; publish or refuse."""
        running = self._running.pop(done.job, None)
        if running is None:
            return
        load, total_ns = running.message, now_ns - running.asked_ns
        if done.ok:
            if load.source == "disk":
                self._verified.add(load.path)
            self.timings.on_load(load, done)
        elif done.message != CANCELLED:
            log.error("load of %s failed: %s", load.path, done.message)
        actions = self._residency.on_load_done(done.job, done.ok, done.message, now_ns, total_ns)
        self.apply(actions, now_ns)

    def on_mover_ready(self, now_ns: int) -> None:
        """A fresh mover: it gets every load that is in flight, but what was cancelled has ended."""
        for load in self._residency.loads_in_flight():
            running = self._running[load.job]
            if running.is_cancelled:
                done = LoadDone(job=load.job, ok=False, message=CANCELLED)
                self.on_load_done(done, now_ns)
            elif self._is_published(running.message):
                self.on_load_done(LoadDone(job=load.job, ok=True), now_ns)
            else:
                self._send(running.message)

    def _is_published(self, load: Load) -> bool:
        """Whether the mover died between the state word and its LoadDone."""
        if self._table is None or not load.publishes:
            return False
        return self._table.get(load.slot) == (_shm.RESIDENT, load.publishes)

    def load(self, job: int) -> Running | None:
        """Return a load that has not ended."""
        return self._running.get(job)

    # --- from the registry ----------------------------------------------------------------------
    def add(self, entry: Entry, now_ns: int) -> None:
        """A version can be served from now on; a pinned one is loaded at once.

        Residency hears of any other when it is asked for (`introduce`).
        """
        if entry.config.steps:
            return  # an ensemble has nothing to load
        self._on_ready(entry.slot, entry.name)
        device = self._residency.device
        if (size := device.footprint(entry.nbytes)) > device.capacity_bytes:
            reason = refusals.never_fits(entry.name, size, device.capacity_bytes, 0)
            log.warning("%s: until then requests for it are refused", reason)
        is_pinned = self.stays.of(entry).pinned
        if is_pinned or self._residency.view(entry.slot) is not None:
            self._add(entry, now_ns)
        if is_pinned:
            self.apply(self._residency.want(entry.slot, -1, now_ns), now_ns)

    def introduce(self, slot: int, now_ns: int) -> None:
        """Residency is asked for a version that it does not know."""
        entry = self._registry.by_slot(slot)
        if entry is not None and entry.state is State.READY:
            self._add(entry, now_ns)

    def _add(self, entry: Entry, now_ns: int) -> None:
        self._residency.add(
            *(entry.slot, entry.name, entry.nbytes, now_ns, self.stays.of(entry)),
            *(entry.parts, entry.packed_bytes),
        )

    def retire(self, slot: int, now_ns: int) -> None:
        """A version answers what it was asked, and no more: nothing else keeps it in memory."""
        entry = self._registry.by_slot(slot)
        if entry is not None and self._residency.view(slot) is not None:
            self._add(entry, now_ns)

    def remove(self, slot: int, now_ns: int) -> None:
        """A version is served no more; workers drop its program and mapping."""
        self.timings.forget(slot)
        self._unheard.pop(slot, None)
        self._on_removed(slot)
        self.apply(self._residency.remove(slot, now_ns), now_ns)
        for worker in self._fleet.of_kind("worker", site=self._site):
            if slot in worker.told:
                worker.told.discard(slot)
                worker.post(Forget(slot=slot))

    # --- carrying out ---------------------------------------------------------------------------
    def tick(self, now_ns: int) -> None:
        """Retry wishes that waited for room."""
        self.apply(self._residency.tick(now_ns), now_ns)

    def apply(self, actions: Iterable[Action], now_ns: int) -> None:
        """Turn residency's actions into messages."""
        run = self._run
        started: dict[int, None] = {}
        to_do = deque(actions)
        while to_do:
            action = to_do.popleft()
            if isinstance(action, StartLoad):
                message = run("the start of a load", self._start, action, now_ns)
                if message is None:  # nobody has heard of it, so nobody would ever end it
                    text = "the load could not be started: see the server's log"
                    to_do += self._residency.on_load_done(action.job, False, text, now_ns, 0)
                    continue
                # The mover is at it; the books after.
                run("the books of a load", self.timings.on_start, message, now_ns)
                if action.urgency == "foreground":
                    started[action.slot] = None
                run("learning from an action", self._on_action, action, now_ns)
            else:
                run("learning from an action", self._on_action, action, now_ns)
                run(f"a {type(action).__name__}", self._carry_out, action, now_ns)
        for slot in started:
            run("a Coming", self._foretell, slot)

    def _start(self, action: StartLoad, now_ns: int) -> Load:
        """Ask the mover for a load; it is running from then on."""
        message = self._to_load(action)
        self._send(message)
        self._running[action.job] = Running(message, now_ns)
        return message

    def _carry_out(self, action: Action, now_ns: int) -> None:
        if isinstance(action, CancelStarted):
            if (running := self._running.get(action.job)) is not None:
                running.is_cancelled = True
                self._send(CancelLoad(job=action.job))
        elif isinstance(action, PromoteStarted):
            if (running := self._running.get(action.job)) is not None:
                running.message = replace(running.message, urgency="foreground")
                self._send(PromoteLoad(job=action.job))
        elif isinstance(action, Publish):
            self._unheard.pop(action.slot, None)
            placed = Placed(
                slot=action.slot,
                generation=action.generation,
                extents=action.extents,
                shared=action.shared,
            )
            self._post(action.waiters, placed)
            # Who waits comes first, the books after.
            self.timings.on_publish(action.slot, action.generation, now_ns)
        elif isinstance(action, Refuse):
            self.timings.forget(action.slot)
            if not action.waiters and self._unheard.get(action.slot) != action.code:
                # A pinned version: no client reads this, and it is tried again and again.
                self._unheard[action.slot] = action.code
                log.warning("a pinned model is not in DEVICE: %s", action.message)
            failed = ActivationFailed(
                slot=action.slot,
                code=action.code or Overloaded.code,
                message=action.message,
                retry_after_s=action.retry_after_s,
            )
            self._post(action.waiters, failed)
        elif isinstance(action, Withdraw):
            self._post(action.waiters, Withdrawn(slot=action.slot))

    def _foretell(self, slot: int) -> None:
        """Tell who waits where the version will be: what is mapped while bytes move costs no time."""
        foretold = self._residency.foretell(slot)
        if foretold is not None and foretold.waiters:
            coming = Coming(
                slot=slot,
                generation=foretold.generation,
                extents=foretold.extents,
                shared=foretold.shared,
            )
            self._post(foretold.waiters, coming)

    def _post(self, seats: Iterable[int], message: Message) -> None:
        for seat in seats:
            worker = self._fleet.worker(seat)
            if worker is not None:
                worker.post(message)

    def _to_load(self, load: StartLoad) -> Load:
        entry = self._registry.by_slot(load.slot)
        assert entry is not None, "a load starts only for a version that is registered"
        path = entry.image_path
        mode = self._settings.verify
        verify = mode == "always"
        if load.source == "disk":  # from HOST no file is read
            if load.digest:
                path = str(path_of(path, load.digest, is_packed=bool(load.packed_bytes)))
            verify = verify or (mode == "first" and path not in self._verified)
        return Load(
            job=load.job,
            slot=load.slot,
            source=load.source,
            path=path,
            nbytes=load.nbytes,
            packed_bytes=load.packed_bytes,
            host=load.host,
            device=load.device,
            verify=verify,
            urgency=load.urgency,
            publishes=0 if self._table is None else load.publishes,
            waiters=tuple(load.waiters),
        )

    def _send(self, message: Message) -> None:
        # No mover now: the load stays in flight, and the next mover gets it when it is ready.
        for mover in self._fleet.of_kind("mover", site=self._site):
            mover.post(message)
