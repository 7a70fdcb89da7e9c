"""Running one batch: lease, gather, compute, split, answer.

This is the batch boundary: whatever a model raises ends here and fails requests, never the worker.
A batch of several that fails is run again request by request, so that one bad request does not fail
its neighbours; what fails alone is answered with its error.

Invariants
 1. Weights are touched only between `take` and `drop` of their lease, for the generation that was
    mapped; the lease is dropped on every path, and the supervisor is rung if it waits for room.
 2. The status page names the requests that run before any of them is touched, until all of them are
    computed: if the process dies in between, they are the suspects.
 3. Every job of a batch that ran gets exactly one completion.
 4. A batch across versions holds the lease of each; it names the first of them on the page, and who is
    retried after a death runs alone, so in the end the page names the right one.

Called by the worker's loop.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from overcommit.runtime import _shm, stages
from overcommit.runtime.assembly import gather, split
from overcommit.runtime.bound import Version
from overcommit.runtime.errors import BadRequest, ModelError
from overcommit.runtime.lanes import BATCH_REQUESTS_MAX, Job
from overcommit.runtime.launch import Blocks
from overcommit.runtime.links import Links
from overcommit.runtime.mixing import Arrays, Family, Sized
from overcommit.runtime.sequence_batch import warm_inputs
from overcommit.runtime.sequence_runner import SequenceRunner
from overcommit.runtime.signature import Form
from overcommit.runtime.warmups import requests_of, zeros

log = logging.getLogger("overcommit.worker")

assert BATCH_REQUESTS_MAX <= _shm.STATUS_BATCH_MAX, "the status page names every request that runs"

LOG_PERIOD_NS = 1_000_000_000  # a client can make a model fail as often as it likes


Part = tuple[Version, list[Job]]  # of a batch


class Runner:
    """Runs batches of bound versions under lease."""

    def __init__(
        self,
        links: Links,
        table: _shm.ResidencyTable,
        leases: _shm.LeasePage,
        status: _shm.StatusPage,
        supervisor_bell: int,
    ) -> None:
        self._links = links
        self._table = table
        self._leases = leases
        self._status = status
        self._supervisor_bell = supervisor_bell
        self._logged_ns = 0
        self._sequences = SequenceRunner(links, status, self._fail)

    def try_lease(self, version: Version, work: Callable[[], None]) -> bool:
        """Do `work` under the version's lease; False, and nothing done, when it is not resident."""
        slot, generation = version.info.slot, version.generation
        if generation is None or not self._leases.take(self._table, slot, generation):
            return False
        try:
            work()
        finally:
            self._leases.drop(slot)
            if self._table.hungry():
                os.eventfd_write(self._supervisor_bell, 1)
        return True

    def try_run(self, version: Version, jobs: list[Job]) -> bool:
        """Run a batch and answer it; False, and nothing done, when the weights are not resident."""
        run = self._run if version.sequences is None else self._sequences.run
        if not self.try_lease(version, lambda: run(version, jobs)):
            return False
        version.has_run = True
        self._leases.add_uses(version.info.slot, len(jobs), time.monotonic_ns())
        return True

    def try_prepare(self, version: Version, work: Callable[[], None]) -> bool:
        """Do what answers no request, a bind or a warm-up, as `try_lease` and with the page naming it.

        What the page names already, batches on a device, it names again afterwards.
        """
        status = self._status

        def named() -> None:
            _, started_ns, phase, slot, ids = status.read()
            status.begin(version.info.slot, _shm.PHASE_COMPUTE, time.monotonic_ns(), ids)
            try:
                work()
            finally:
                if started_ns:
                    status.begin(slot, phase, started_ns, ids)
                else:
                    status.end()

        return self.try_lease(version, named)

    # --- a batch that a device works on ---------------------------------------------------------
    def try_hold(self, version: Version) -> bool:
        """Take the version's lease for longer than a call; False when it is not resident."""
        generation = version.generation
        return generation is not None and self._leases.take(
            self._table, version.info.slot, generation
        )

    def let_go(self, version: Version, used: int) -> None:
        """Drop a lease that was held; so many requests have used it."""
        slot = version.info.slot
        self._leases.drop(slot)
        if self._table.hungry():
            os.eventfd_write(self._supervisor_bell, 1)
        version.has_run = True
        self._leases.add_uses(slot, used, time.monotonic_ns())

    def blocks_of(self, version: Version, jobs: Sequence[Job]) -> Blocks:
        """Return the blocks of a batch, with their addresses where all are registered."""
        forms, ingress, egress = self._blocks(jobs)
        ins_at: list[int] = []
        outs_at: list[int] = []
        for job in jobs:
            pin = self._links.of(job).pin
            if pin is None or not pin.is_pinned:
                return Blocks(version.signature, forms, ingress, egress)
            ins_at.append(pin.ingress_at + job.in_offset)
            outs_at.append(pin.egress_at + job.out_offset)
        return Blocks(version.signature, forms, ingress, egress, ins_at, outs_at)

    def answer_flight(
        self, jobs: Sequence[Job], needs: Sequence[int], times_ns: tuple[int, int]
    ) -> None:
        """Answer a batch that was started and had all of its work then; it has just ended."""
        started_ns, begun_ns = times_ns
        now_ns = time.monotonic_ns()
        self._answer(jobs, needs, (started_ns, begun_ns, now_ns, now_ns), len(jobs))

    def fail_batch(self, version: Version, jobs: list[Job], error: Exception) -> None:
        """Answer one that failed: alone with its error, several after each has run alone."""
        if len(jobs) == 1:
            self._fail(version, jobs[0], error)
        else:
            self._run_alone(version, jobs, error)

    def run_mixed(self, parts: Sequence[Part], slots: list[int]) -> list[Version]:
        """Run jobs of several versions of one family and answer them; `slots` are the parts'.

        Return the versions that are not resident; nothing was done with their jobs.
        """
        # No version was ever resident as generation 0: who has none is refused.
        refused = self._leases.take_all(
            self._table, slots, [version.generation or 0 for version, _ in parts]
        )
        lost: list[Version] = []
        if refused:
            lost = [parts[index][0] for index in refused]
            parts = [part for index, part in enumerate(parts) if index not in refused]
            slots = [version.info.slot for version, _ in parts]
        try:
            if parts:
                self._run_held(parts)
        finally:
            self._leases.drop_all(slots)
            if self._table.hungry():
                os.eventfd_write(self._supervisor_bell, 1)
        for version, _ in parts:
            version.has_run = True
        self._leases.add_all_uses(slots, [len(jobs) for _, jobs in parts], time.monotonic_ns())
        return lost

    def try_warm_up(self, version: Version) -> None:
        """Run one row of zeros, and the model's own warm-up requests: all is in place for the first."""

        def warm_up() -> None:
            assert version.model is not None, "only a bound version is warmed up"
            try:
                config = version.info.config
                inputs = {spec.name: zeros(spec) for spec in config.inputs}
                version.model.run(warm_inputs(config, inputs))
                for _, inputs in requests_of(config):
                    version.model.run(warm_inputs(config, inputs))
            except Exception as error:  # the batch boundary; requests may well succeed
                log.info("%s: warm-up failed: %s", version.title, _text(error))

        self.try_prepare(version, warm_up)
        version.has_run = True

    # --- a batch across versions ----------------------------------------------------------------
    def _run_held(self, held: Sequence[Part]) -> None:
        jobs = [job for _, jobs in held for job in jobs]
        family, form = held[0][0].family, jobs[0].form
        assert form is not None, "only a job that was checked runs"
        sized = None if family is None else family.pick(form, len(jobs))
        if family is not None and sized is not None:
            if not sized.is_on:
                self._try_out(family, sized, form, held, jobs)
            elif self._is_mixed(family, sized, form, held, jobs):
                return
        for version, mine in held:
            self._run(version, mine)

    def _is_mixed(
        self, family: Family, sized: Sized, form: Form, held: Sequence[Part], jobs: Sequence[Job]
    ) -> bool:
        """Run all of them in one call; False, and nothing done, when that went wrong."""
        started_ns = time.monotonic_ns()
        self._status.begin(
            *(held[0][0].info.slot, _shm.PHASE_COPY_IN, started_ns),
            [job.request_id for job in jobs],
        )
        try:
            forms, ingress, egress = self._blocks(jobs)
            inputs = gather(family.signature, forms, ingress)
            self._status.phase(_shm.PHASE_COMPUTE)
            gathered_ns = time.monotonic_ns()
            outputs = sized.recording.run(_addresses(held), inputs)
            self._status.phase(_shm.PHASE_COPY_OUT)
            computed_ns = time.monotonic_ns()
            needs = split(family.signature, outputs, forms, egress)
        except Exception as error:  # the batch boundary
            family.turn_off(form, sized, _text(error))
            return False
        finally:
            self._status.end()
        times_ns = (started_ns, gathered_ns, computed_ns, time.monotonic_ns())
        self._answer_mixed(held, needs, times_ns)
        return True

    def _try_out(
        self, family: Family, sized: Sized, form: Form, held: Sequence[Part], jobs: Sequence[Job]
    ) -> None:
        """Run both ways, answer nobody: whether it is used from now on is the family's decision."""
        signature = family.signature

        def run_mixed() -> Arrays:
            forms, ingress, _ = self._blocks(jobs)
            return sized.recording.run(_addresses(held), gather(signature, forms, ingress))

        def run_alone() -> list[Arrays]:
            results: list[Arrays] = []
            for version, mine in held:
                assert version.model is not None, "only a bound version runs"
                forms, ingress, _ = self._blocks(mine)
                results.append(version.model.run(gather(signature, forms, ingress)))
            return results

        self._status.begin(
            *(held[0][0].info.slot, _shm.PHASE_COMPUTE, time.monotonic_ns()),
            [job.request_id for job in jobs],
        )
        try:
            family.try_out(form, sized, len(jobs), run_mixed, run_alone)
        except Exception as error:  # a model's own: its requests get it when they are run
            log.debug("a trial across versions failed: %s", _text(error))
        finally:
            self._status.end()

    # --- inside ---------------------------------------------------------------------------------
    def _run(self, version: Version, jobs: list[Job]) -> None:
        started_ns = time.monotonic_ns()
        self._status.begin(
            *(version.info.slot, _shm.PHASE_COPY_IN, started_ns),
            [job.request_id for job in jobs],
        )
        try:
            needs, gathered_ns, computed_ns = self._compute(version, jobs)
        except Exception as error:  # the batch boundary
            self._status.end()
            self.fail_batch(version, jobs, error)
            return
        self._status.end()
        times_ns = (started_ns, gathered_ns, computed_ns, time.monotonic_ns())
        self._answer(jobs, needs, times_ns, len(jobs))

    def _answer_mixed(
        self, held: Sequence[Part], needs: Sequence[int], times_ns: tuple[int, int, int, int]
    ) -> None:
        """Complete the jobs of a batch across versions.

        Nearly always each has one job of as many rows as the others': then one word speaks for all.
        """
        started_ns, gathered_ns, computed_ns, ended_ns = times_ns
        ran_ns, size = (started_ns, ended_ns), len(needs)
        complete = self._links.complete
        at = rows = word = 0
        for _, mine in held:
            job, need = mine[0], needs[at]
            if len(mine) > 1 or need > job.out_capacity:
                self._answer(mine, needs[at : at + len(mine)], times_ns, size)
            else:
                if job.rows != rows:
                    rows = job.rows
                    word = stages.pack(rows, 1, gathered_ns - started_ns, ended_ns - computed_ns)
                complete(job, _shm.OK, ran_ns, need, size, word)
            at += len(mine)

    def _answer(
        self,
        jobs: Sequence[Job],
        needs: Sequence[int],
        times_ns: tuple[int, int, int, int],
        batch_size: int,
    ) -> None:
        """Complete the jobs of one version; the first that succeeds speaks for all of them."""
        started_ns, gathered_ns, computed_ns, ended_ns = times_ns
        rows = sum([job.rows for job in jobs])
        word = stages.pack(rows, len(jobs), gathered_ns - started_ns, ended_ns - computed_ns)
        ran_ns = (started_ns, ended_ns)
        complete = self._links.complete
        for job, need in zip(jobs, needs, strict=True):
            if need <= job.out_capacity:
                complete(job, _shm.OK, ran_ns, need, batch_size, word)
                word = 0
            else:
                complete(job, _shm.TOO_LARGE, ran_ns, batch_size=batch_size, detail=need)

    def _compute(self, version: Version, jobs: list[Job]) -> tuple[list[int], int, int]:
        """Gather, run and split.

        Return the egress bytes that each job needs, and when the inputs and the outputs were there.
        """
        assert version.model is not None, "only a bound version runs"
        signature = version.signature
        forms, ingress, egress = self._blocks(jobs)
        inputs = gather(signature, forms, ingress)
        self._status.phase(_shm.PHASE_COMPUTE)
        gathered_ns = time.monotonic_ns()
        outputs = version.model.run(inputs)
        self._status.phase(_shm.PHASE_COPY_OUT)
        computed_ns = time.monotonic_ns()
        return split(signature, outputs, forms, egress), gathered_ns, computed_ns

    def _blocks(self, jobs: Sequence[Job]) -> tuple[list[Form], list[memoryview], list[memoryview]]:
        forms: list[Form] = []
        ingress: list[memoryview] = []
        egress: list[memoryview] = []
        for job in jobs:
            assert job.form is not None, "only a job that was checked runs"
            link = self._links.of(job)
            forms.append(job.form)
            ingress.append(link.ingress[job.in_offset : job.in_offset + job.in_length])
            egress.append(link.egress[job.out_offset : job.out_offset + job.out_capacity])
        return forms, ingress, egress

    def _run_alone(self, version: Version, jobs: list[Job], error: Exception) -> None:
        self._log(version, f"a batch of {len(jobs)} failed, each is run alone: {_text(error)}")
        for job in jobs:
            now_ns = time.monotonic_ns()
            if job.deadline_ns <= now_ns:
                self._links.complete(job, _shm.EXPIRED, (now_ns, now_ns))
            else:
                self._run(version, [job])

    def _fail(self, version: Version, job: Job, error: Exception) -> None:
        if isinstance(error, BadRequest):
            self._links.fail(job, _shm.BAD_REQUEST, error.message)
            return
        self._log(version, f"request {job.request_id:#x} failed: {_text(error)}")
        self._links.fail(job, _shm.MODEL_ERROR, _text(error))

    def _log(self, version: Version, text: str) -> None:
        now_ns = time.monotonic_ns()
        if now_ns - self._logged_ns >= LOG_PERIOD_NS:
            self._logged_ns = now_ns
            log.warning("%s: %s", version.title, text)


def _addresses(held: Sequence[Part]) -> list[int]:
    """Where the weights of each job lie."""
    return [version.address for version, jobs in held for _ in jobs]


def _text(error: Exception) -> str:
    # The engine has put the type of what the model raised into its message.
    if isinstance(error, ModelError):
        return error.message
    return f"{type(error).__name__}: {error}"
