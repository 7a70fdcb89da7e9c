"""What the load generator asks: the plans there are, and the workload that each names.

Everything that a plan says is data, so that a plan can go to the processes of a load, into a report,
and to another server than ours.
"""

from __future__ import annotations

from overcommit.bench.echo import EchoPlan, EchoWorkload
from overcommit.bench.embedding import EmbeddingPlan, EmbeddingWorkload
from overcommit.bench.headed import HeadedPlan, HeadedWorkload
from overcommit.bench.payloads import PayloadPlan, PayloadWorkload
from overcommit.bench.request import Request, Workload
from overcommit.bench.small_models import SmallModelsPlan, SmallModelsWorkload
from overcommit.bench.tables import TablePlan, TableWorkload

__all__ = [
    "EchoPlan",
    "EmbeddingPlan",
    "HeadedPlan",
    "PayloadPlan",
    "Request",
    "SmallModelsPlan",
    "TablePlan",
    "Workload",
    "WorkloadPlan",
    "make_workload",
]

WorkloadPlan = EmbeddingPlan | EchoPlan | TablePlan | PayloadPlan | SmallModelsPlan | HeadedPlan


def make_workload(plan: WorkloadPlan, seed: int, part: int = 0, parts: int = 1) -> Workload:
    """Build the workload that a plan names, for one of the processes of a load."""
    if isinstance(plan, EmbeddingPlan):
        return EmbeddingWorkload(plan, seed, part, parts)
    if isinstance(plan, EchoPlan):
        return EchoWorkload(plan, seed, part, parts)
    if isinstance(plan, TablePlan):
        return TableWorkload(plan, seed, part, parts)
    if isinstance(plan, HeadedPlan):
        return HeadedWorkload(plan, seed, part, parts)
    if isinstance(plan, SmallModelsPlan):
        return SmallModelsWorkload(plan, seed, part, parts)
    return PayloadWorkload(plan, seed, part, parts)
