"""Running one batch of requests of sequences: the batch boundary of versions with state.

As `runner`, with these differences: a request whose sequence is not known here is answered and not run;
states are kept only of what was computed and written; and who cannot be run twice is not.

Invariants
 1. Every job of a batch is answered once and settled once.
 2. A sequence's states change only by a request that was computed, and once for each: an answer that does
    not fit its block is kept, and written when the front end asks again.
 3. A batch that failed is run again request by request only where the model keeps no state itself.

Called by the runner, under the version's lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from overcommit.runtime import _shm, stages
from overcommit.runtime.assembly import split
from overcommit.runtime.bound import Version
from overcommit.runtime.config import SEQUENCE_STATE_BYTES_MAX
from overcommit.runtime.errors import ModelError, OvercommitError, Overloaded
from overcommit.runtime.lanes import Job
from overcommit.runtime.links import Links
from overcommit.runtime.sequence_batch import Array, Seat, SequenceBatch, States
from overcommit.runtime.sequences import Run, Sequences, ask_of
from overcommit.runtime.signature import Form

Fail = Callable[[Version, Job, Exception], None]
Answer = tuple[dict[str, Array], Form]


class SequenceRunner:
    """Runs the batches of versions with state."""

    def __init__(self, links: Links, status: _shm.StatusPage, fail: Fail) -> None:
        self._links = links
        self._status = status
        self._fail = fail

    def run(self, version: Version, jobs: list[Job]) -> None:
        """Run a batch and answer it."""
        sequences, batch = _parts(version)
        sequences.meet(version.incarnation, keeps_own_state=not batch.has_states)
        runs: list[tuple[Job, Run]] = []
        for job in jobs:
            run = sequences.run_of(job)
            if run is None:
                self._send_again(version, job)
                continue
            refusal = sequences.refusal(job) or _too_much(sequences, job)
            if refusal is not None:
                self._refuse(job, refusal)
                sequences.settle(job, time.monotonic_ns(), is_ok=False)
                continue
            runs.append((job, run))
        if runs:
            self._run(version, runs)

    def _run(self, version: Version, runs: Sequence[tuple[Job, Run]]) -> None:
        sequences, batch = _parts(version)
        jobs = [job for job, _ in runs]
        started_ns = time.monotonic_ns()
        self._status.begin(
            *(version.info.slot, _shm.PHASE_COPY_IN, started_ns),
            [job.request_id for job in jobs],
        )
        try:
            times_ns, needs, outputs, states = self._compute(version, runs, started_ns)
        except Exception as error:  # the batch boundary
            self._status.end()
            if len(runs) > 1 and batch.has_states:
                for each in runs:
                    self._run(version, [each])
                return
            for job in jobs:
                self._fail(version, job, error)
                sequences.settle(job, time.monotonic_ns(), is_ok=False)
            return
        self._status.end()
        for at, ((job, run), left) in enumerate(zip(runs, states, strict=True)):
            sequences.state_bytes += _nbytes(left) - _nbytes(run.state)
            run.state, run.group = left, batch.group(left)
            if needs[at] > job.out_capacity:
                row = slice(at, at + 1) if batch.batches else ...
                mine = {name: array[row].copy() for name, array in outputs.items()}
                assert job.form is not None
                sequences.keep_unsent(job, (mine, job.form))
            sequences.settle(job, times_ns[3], is_ok=True)
        self._answer(jobs, needs, times_ns)

    def _compute(
        self, version: Version, runs: Sequence[tuple[Job, Run]], started_ns: int
    ) -> tuple[tuple[int, int, int, int], list[int], dict[str, Array], list[States]]:
        assert version.model is not None, "only a bound version runs"
        _, batch = _parts(version)
        signature = version.signature
        seats: list[Seat] = []
        forms: list[Form] = []
        ingress: list[memoryview] = []
        egress: list[memoryview] = []
        for at, (job, run) in enumerate(runs):
            assert job.form is not None, "only a job that was checked runs"
            ask = ask_of(job)
            row = run.slot if batch.is_direct and batch.batches else at
            seats.append(Seat(row, ask, () if ask.is_start else run.state))
            link = self._links.of(job)
            forms.append(job.form)
            ingress.append(link.ingress[job.in_offset : job.in_offset + job.in_length])
            egress.append(link.egress[job.out_offset : job.out_offset + job.out_capacity])
        inputs = batch.inputs(signature, forms, ingress, seats)
        self._status.phase(_shm.PHASE_COMPUTE)
        gathered_ns = time.monotonic_ns()
        outputs = version.model.run(inputs)
        self._status.phase(_shm.PHASE_COPY_OUT)
        computed_ns = time.monotonic_ns()
        mine, states = batch.outputs(signature, outputs, seats)
        needs = split(signature, mine, forms, egress)
        return (started_ns, gathered_ns, computed_ns, time.monotonic_ns()), needs, mine, states

    # --- answers --------------------------------------------------------------------------------
    def _answer(
        self, jobs: Sequence[Job], needs: Sequence[int], times_ns: tuple[int, int, int, int]
    ) -> None:
        started_ns, gathered_ns, computed_ns, ended_ns = times_ns
        size = len(jobs)
        word = stages.pack(size, size, gathered_ns - started_ns, ended_ns - computed_ns)
        ran_ns = (started_ns, ended_ns)
        for job, need in zip(jobs, needs, strict=True):
            if need <= job.out_capacity:
                self._links.complete(
                    *(job, _shm.OK, ran_ns), out_length=need, batch_size=size, detail=word
                )
                word = 0
            else:
                self._links.complete(job, _shm.TOO_LARGE, ran_ns, batch_size=size, detail=need)

    def _send_again(self, version: Version, job: Job) -> None:
        """Write an answer that did not fit its former block."""
        sequences, _ = _parts(version)
        kept = sequences.unsent.pop(job.request_id, None)
        sequences.settle(job, time.monotonic_ns(), is_ok=True)
        if kept is None:
            text = (
                "its answer was too large for its block, and was not kept; begin the sequence again"
            )
            self._fail(version, job, ModelError(text))
            return
        answer: Answer = kept[1]
        outputs, form = answer
        link = self._links.of(job)
        block = link.egress[job.out_offset : job.out_offset + job.out_capacity]
        (need,) = split(version.signature, outputs, [form], [block])
        now_ns = time.monotonic_ns()
        if need <= job.out_capacity:
            self._links.complete(job, _shm.OK, (now_ns, now_ns), out_length=need, batch_size=1)
        else:
            sequences.keep_unsent(job, answer)
            self._links.complete(job, _shm.TOO_LARGE, (now_ns, now_ns), detail=need)

    def _refuse(self, job: Job, error: OvercommitError) -> None:
        wait_ms = int(1000 * (error.retry_after_s or 0))
        self._links.fail(job, _shm.NOT_RESIDENT, f"{error.code}\n{error.message}", detail=wait_ms)


def _parts(version: Version) -> tuple[Sequences, SequenceBatch]:
    assert version.sequences is not None, "a version with sequences"
    assert version.sequence_batch is not None, "made when it was bound"
    return version.sequences, version.sequence_batch


def _too_much(sequences: Sequences, job: Job) -> Overloaded | None:
    if not ask_of(job).is_start or sequences.state_bytes <= SEQUENCE_STATE_BYTES_MAX:
        return None
    return Overloaded(
        f"model '{sequences.name}': the states of its {sequences.open_count} sequences take "
        f"{sequences.state_bytes} bytes, the limit is {SEQUENCE_STATE_BYTES_MAX}; end sequences",
        retry_after_s=1,
    )


def _nbytes(states: States) -> int:
    return sum(array.nbytes for array in states)
