"""Which jobs may share a batch with those of other versions.

Pure.  Called by the batcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from overcommit.runtime.lanes import Job, Lane
from overcommit.runtime.signature import Form, shares_form

LANE_JOBS_MAX: Final = 4  # of one version in a mixed batch: who has more runs better alone


def common_form(jobs: Sequence[Job]) -> Form | None:
    """The form of all these jobs, if they may share a batch with other versions'."""
    form = jobs[0].form
    if form is None or len(jobs) > LANE_JOBS_MAX:
        return None
    if any(job.alone or not shares_form(job.form, form) for job in jobs):
        return None
    return form


def may_join(lane: Lane, first: Lane, form: Form, left: int) -> bool:
    """Whether all that waits in a lane may join a batch of this form."""
    job = lane.only
    if job is not None:
        if job.alone or not (job.form is form or shares_form(job.form, form)):
            return False
        return lane.limits.priority == first.limits.priority
    if lane.count > min(left, LANE_JOBS_MAX) or lane.limits.priority != first.limits.priority:
        return False
    return all(not job.alone and shares_form(job.form, form) for job in lane.jobs())
