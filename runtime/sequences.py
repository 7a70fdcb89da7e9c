"""The sequences that are open for one version in one worker.

A sequence begins with a request that says START, ends with one that says END, and runs its requests one
after the other.  While it is open it has a slot: of the model's batch (strategy `direct`), or one of the
candidates (`oldest`).  Sequences that find no slot free wait, in the order in which they came.

A sequence here (`Run`):

    (none) --push of a START--> WAITING   no slot is free
                                OPEN      it has the lowest slot that was free
    WAITING --a slot gets free--> OPEN    [_fill_slots]
    WAITING --its first request is out of time--> (none)     all of its requests are refused
    OPEN --[settle of an END, or of a START that failed; expire_idle]--> (none)

    begun: its START has run, and its END has not.  A START in the middle begins it anew.
    lost: it was begun, and what the model kept of it is gone.

Invariants
 1. A slot is one run's; a run that waits has none, and waits only while no slot is free.
 2. Requests of one run are taken in the order of their coming, one at a time: the next one after
    `settle` of the one before.
 3. A request that needs what the ones before it left is run only if these have run here: `refusal`
    says why not.
 4. A run without requests is open, and begun or lost, for `idle_ns` and until somebody looks.
 5. `count` is the number of requests that wait in all runs; one that is out is not counted.

Pure.  Called by the lane, and by the runner of sequences.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from overcommit.runtime import refusals
from overcommit.runtime.config import NEVER_NS, SEQUENCE_UNSENT_MAX
from overcommit.runtime.errors import BadRequest, WorkerLost
from overcommit.runtime.lanes import Job
from overcommit.runtime.sequence_terms import Ask, Key
from overcommit.runtime.signature import Form

NO_SLOT = -1


@dataclass(slots=True, frozen=True)
class AskForm(Form):
    """A request of a sequence, checked."""

    ask: Ask


@dataclass(slots=True, eq=False)
class Run:
    """One sequence."""

    key: Key
    used_ns: int  # when its last request came, or ran
    slot: int = NO_SLOT
    jobs: deque[Job] = field(default_factory=deque)
    out: Job | None = None  # that is being run
    begun: bool = False
    goes_on: bool = True  # behind what waits: the last of it is no END
    state: tuple[Any, ...] = ()  # what its last request left, for the next; (): the first one's
    group: Hashable = ()  # runs of one group may share a batch
    loss: str = ""  # why it cannot go on
    is_lost: bool = False  # it is not its client's fault


def ask_of(job: Job) -> Ask:
    """What a job says of its sequence."""
    assert isinstance(job.form, AskForm), "only what was checked is queued"
    return job.form.ask


class Sequences:
    """The runs of one version."""

    def __init__(self, name: str, slots: int, idle_ns: int, lost_until_ns: int = 0) -> None:
        """`lost_until_ns`: so long, who is not known here may be known to the worker before this one."""
        self.name = name
        self.lost_until_ns = lost_until_ns
        self.slots = slots
        self.idle_ns = idle_ns
        self.count = 0
        self.refused: dict[int, str] = {}  # requests that got no slot in time -> what is said
        self.state_bytes = 0  # of all runs, as their runner counts them
        self.unsent: dict[int, tuple[int, Any]] = {}  # -> until when, an answer without its block
        self._runs: dict[Key, Run] = {}
        self._free = list(range(slots))
        self._open: dict[int, Run] = {}  # by slot
        self._ready: dict[Key, Run] = {}  # of these, by when each got a job that may run now
        self._waiting: deque[Run] = deque()
        self._idle: dict[Key, Run] = {}  # runs without requests, by when they got so
        self._again: deque[Job] = deque()  # have run; their answers are wanted
        self._out: dict[int, Run | None] = {}  # jobs that were taken
        self._incarnation: Hashable = None

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def open_count(self) -> int:
        """Sequences that have a slot."""
        return len(self._open)

    # --- in -------------------------------------------------------------------------------------
    def check(self, ask: Ask, now_ns: int) -> None:
        """Raise BadRequest for a request that belongs to no sequence, WorkerLost if it may have."""
        run = self._idle.get(ask.key)
        if run is not None and ask.sent_ns - run.used_ns >= self.idle_ns:
            self._close(run)
            self._fill_slots()
        if ask.is_start or ask.is_again:
            return
        run = self._runs.get(ask.key)
        if run is None and now_ns < self.lost_until_ns:
            raise WorkerLost(
                f"model '{self.name}': sequence {ask.key} is lost: the worker that kept its state died; "
                f"begin it again with sequence_start"
            )
        if run is None or not run.goes_on:
            raise BadRequest(refusals.must_start(self.name, ask.key))

    def push(self, job: Job) -> None:
        """Queue a job, or take one back that was not run."""
        self.count += 1
        if job.request_id in self._out:
            run = self._out.pop(job.request_id)
            if run is None:
                self._again.appendleft(job)
            else:
                run.out = None
                run.jobs.appendleft(job)
                self._note(run)
            return
        ask = ask_of(job)
        if ask.is_again:
            self._again.append(job)
            return
        run = self._runs.get(ask.key)
        if run is None:
            run = self._runs[ask.key] = Run(ask.key, job.taken_ns)
            self._waiting.append(run)
        run.jobs.append(job)
        run.goes_on = not ask.is_end
        run.used_ns = job.taken_ns
        self._idle.pop(run.key, None)
        self._note(run)
        self._fill_slots()

    # --- out ------------------------------------------------------------------------------------
    def next_again(self) -> Job | None:
        """Take a job that only wants its answer."""
        if not self._again:
            return None
        job = self._again.popleft()
        self.count -= 1
        self._out[job.request_id] = None
        return job

    def ready(self) -> list[Run]:
        """Runs with a slot and a request that may run now; who has waited longest first."""
        return list(self._ready.values())

    @property
    def ready_count(self) -> int:
        """Jobs that could be taken now."""
        return len(self._again) + len(self._ready)

    @property
    def has_waiting(self) -> bool:
        """Whether a sequence waits for a slot."""
        return bool(self._waiting)

    def take(self, run: Run) -> Job:
        """Take a run's next job; `settle` or `push` must follow."""
        assert run.out is None, "one request of a sequence runs at a time"
        job = run.jobs.popleft()
        self.count -= 1
        run.out = job
        self._note(run)
        self._out[job.request_id] = run
        return job

    def run_of(self, job: Job) -> Run | None:
        """The run of a job that was taken; None: it only wants its answer."""
        return self._out[job.request_id]

    def settle(self, job: Job, now_ns: int, *, is_ok: bool) -> None:
        """A job that was taken is over."""
        run = self._out.pop(job.request_id)
        if run is None:
            return
        ask = ask_of(job)
        run.out = None
        run.used_ns = now_ns
        if ask.is_start:
            run.begun, run.is_lost = is_ok, False
            run.loss = "" if is_ok else "the request that began it failed"
            if not is_ok:
                self._forget_state(run)
        if ask.is_end:
            self._end(run)
        self._note(run)
        self._rest(run)

    def refusal(self, job: Job) -> BadRequest | WorkerLost | None:
        """Why a job that was taken must not run."""
        run = self._out[job.request_id]
        if run is None or run.begun or ask_of(job).is_start:
            return None
        if run.is_lost:
            return WorkerLost(
                f"model '{self.name}': sequence {run.key} cannot go on: {run.loss}; begin it again "
                f"with sequence_start"
            )
        reason = f": {run.loss}" if run.loss else ""
        return BadRequest(refusals.must_start(self.name, run.key) + reason)

    # --- without being run ----------------------------------------------------------------------
    def remove(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Take out every job for which `gone` is true."""
        removed = [job for job in self._again if gone(job)]
        for job in removed:
            self._again.remove(job)
        for run in list(self._runs.values()):
            mine = [job for job in run.jobs if gone(job)]
            if not mine:
                continue
            removed += mine
            self._drop(run, {job.request_id for job in mine})
        self.count -= len(removed)
        self._fill_slots()
        return removed

    def expire(self, now_ns: int) -> list[Job]:
        """Take out every job whose time is over; with the first of a run that waits, all of it."""
        lost: set[int] = set()
        for run in self._waiting:
            if any(job.deadline_ns <= now_ns for job in run.jobs):
                text = refusals.no_slot(self.name, self.slots)
                for job in run.jobs:
                    self.refused[job.request_id] = text
                    lost.add(job.request_id)
        return self.remove(lambda job: job.deadline_ns <= now_ns or job.request_id in lost)

    def expire_idle(self, now_ns: int) -> None:
        """End what has had no request for too long; to be called when all rings were looked at."""
        for run in list(self._idle.values()):
            if now_ns - run.used_ns < self.idle_ns:
                break
            self._close(run)
        self._fill_slots()
        for request_id, (until_ns, _) in list(self.unsent.items()):
            if until_ns <= now_ns:
                del self.unsent[request_id]

    def idle_at_ns(self) -> int:
        """When the next sequence has been idle for too long; NEVER_NS: none is idle."""
        for run in self._idle.values():
            return run.used_ns + self.idle_ns
        return NEVER_NS

    def meet(self, incarnation: Hashable, *, keeps_own_state: bool) -> None:
        """Say which incarnation of the model runs now: what an earlier one kept itself is lost."""
        if incarnation == self._incarnation:
            return
        had, self._incarnation = self._incarnation, incarnation
        if had is None or not keeps_own_state:
            return
        for run in list(self._runs.values()):
            if run.begun:
                run.begun, run.is_lost = False, True
                run.loss = "the model was started anew, and what it kept of the sequence is gone"

    def keep_unsent(self, job: Job, answer: object) -> None:
        """Keep an answer that did not fit its block; its front end asks again with a larger one."""
        if len(self.unsent) >= SEQUENCE_UNSENT_MAX:
            del self.unsent[next(iter(self.unsent))]
        self.unsent[job.request_id] = job.deadline_ns, answer

    # --- looking --------------------------------------------------------------------------------
    def jobs(self) -> Iterator[Job]:
        """All jobs that wait, in no order."""
        yield from self._again
        for run in self._runs.values():
            yield from run.jobs

    def run_at(self, key: Key) -> Run | None:
        """The run of this id."""
        return self._runs.get(key)

    def runs(self) -> list[Run]:
        """All runs."""
        return list(self._runs.values())

    # --- inside ---------------------------------------------------------------------------------
    def _end(self, run: Run) -> None:
        run.begun = run.is_lost = False
        run.loss = ""
        self._forget_state(run)

    def _forget_state(self, run: Run) -> None:
        self.state_bytes -= sum(each.nbytes for each in run.state)
        run.state, run.group = (), ()

    def _rest(self, run: Run) -> None:
        """A run may have nothing left to do."""
        if run.jobs or run.out is not None:
            return
        if run.begun or run.is_lost:
            # One that was lost stays for a while, to say so.
            self._idle.pop(run.key, None)
            self._idle[run.key] = run
        else:
            self._close(run)
        self._fill_slots()

    def _drop(self, run: Run, gone: set[int]) -> None:
        """Some of a run's jobs leave without having run."""
        is_begun = run.begun or (run.out is not None and ask_of(run.out).is_start)
        kept: deque[Job] = deque()
        for job in run.jobs:
            if job.request_id not in gone:
                kept.append(job)
            elif ask_of(job).is_start and not is_begun:
                run.loss = "the request that began it was not run"
        run.jobs = kept
        self._note(run)
        last = kept[-1] if kept else run.out
        run.goes_on = is_begun if last is None else not ask_of(last).is_end
        if run.slot == NO_SLOT and not kept:
            self._close(run)
        else:
            self._rest(run)

    def _close(self, run: Run) -> None:
        self._forget_state(run)
        del self._runs[run.key]
        self._idle.pop(run.key, None)
        self._ready.pop(run.key, None)
        if run.slot == NO_SLOT:
            self._waiting.remove(run)
        else:
            del self._open[run.slot]
            heapq.heappush(self._free, run.slot)
            run.slot = NO_SLOT

    def _note(self, run: Run) -> None:
        """Keep `_ready` right."""
        if run.jobs and run.out is None and run.slot != NO_SLOT:
            self._ready.setdefault(run.key, run)
        else:
            self._ready.pop(run.key, None)

    def _fill_slots(self) -> None:
        """Give slots to who waits; who is only kept to be told of its loss makes room."""
        while self._waiting:
            if not self._free:
                lost = next((run for run in self._idle.values() if run.is_lost), None)
                if lost is None:
                    return
                self._close(lost)
            run = self._waiting.popleft()
            run.slot = heapq.heappop(self._free)
            self._open[run.slot] = run
            self._note(run)

    def check_invariants(self) -> None:
        """Assert what the module says; for tests."""
        assert sorted([*self._free, *self._open]) == list(range(self.slots))
        assert all(run.slot == slot for slot, run in self._open.items())
        assert all(run.slot == NO_SLOT for run in self._waiting)
        assert not (self._waiting and self._free)
        assert len(self._open) + len(self._waiting) == len(self._runs)
        waiting = len(self._again) + sum(len(run.jobs) for run in self._runs.values())
        assert self.count == waiting
        for run in self._runs.values():
            is_resting = not run.jobs and run.out is None
            assert is_resting == (run.key in self._idle)
            assert not is_resting or run.begun or run.is_lost
            is_ready = bool(run.jobs) and run.out is None and run.slot != NO_SLOT
            assert is_ready == (run.key in self._ready)
