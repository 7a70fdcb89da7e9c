"""Statistics of models in the form that Triton's clients read, over HTTP and gRPC.

What a count means here
 * A request's time is from when it was read to when its answer was written; `queue` is its time in a
   worker, until its batch began: a load of its weights is part of it.
 * `compute_input` is gathering a batch, `compute_infer` the model, `compute_output` splitting: for each
   request the time of its whole batch, as with Triton.  `batch_stats` has the same once for each batch.
 * There is no response cache: its counts are 0.

Pure but for `statistics`, which asks the supervisor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overcommit.runtime.accounts import Account
from overcommit.server.questions import ask_typed

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

Object = dict[str, Any]


async def statistics(front: FrontEnd, name: str = "", version: str = "") -> Object:
    """Return `{"model_stats": [...]}` of a version, of a model's versions, or of all that serve.

    It is the JSON form of Triton's ModelStatisticsResponse.  Raises BadRequest for what does not serve.
    """
    accounts = await ask_typed(front, list[Account], "statistics", name=name, version=version)
    return {"model_stats": [describe(account) for account in accounts]}


def describe(account: Account) -> Object:
    """Show one version's account."""
    count = account.count
    success, failure = count("success"), count("failure")
    input_ns, output_ns = count("input_ns"), count("output_ns")
    infer_ns = max(0, count("compute_ns") - input_ns - output_ns)
    nothing = _duration(0, 0)
    return {
        "name": account.name,
        "version": account.version,
        "last_inference": account.last_used_ms,
        "inference_count": count("inferences"),
        "execution_count": count("executions"),
        "inference_stats": {
            "success": _duration(success, count("request_ns") - count("failure_ns")),
            "fail": _duration(failure, count("failure_ns")),
            "queue": _duration(success, count("queue_ns")),
            "compute_input": _duration(success, input_ns),
            "compute_infer": _duration(success, infer_ns),
            "compute_output": _duration(success, output_ns),
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(batches, gathered_ns),
                "compute_infer": _duration(batches, computed_ns),
                "compute_output": _duration(batches, split_ns),
            }
            for rows, (batches, gathered_ns, computed_ns, split_ns) in account.batches.items()
        ],
        "memory_usage": _memory(account),
    }


def _duration(count: int, ns: int) -> Object:
    return {"count": count, "ns": ns}


def _memory(account: Account) -> list[Object]:
    """Bytes of weights: DEVICE is host memory where there is no GPU, so both are the CPU's."""
    nbytes = account.device_bytes + account.host_bytes
    return [{"type": "CPU", "id": 0, "byte_size": nbytes}] if nbytes else []
