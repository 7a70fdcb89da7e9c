"""Metrics under the names that Triton's have, for dashboards and load generators that read these.

`GET /metrics?names=triton` (our own names tell more: `exposition.py`).  Names, labels and units are those of
Triton 2.51; what is counted is what `server/statistics.py` says of each count.  The versions are those
that have series of their own, and `_other` for the rest.

Left out, because nobody knows it here: pending requests of each model, reasons of failures (all are OTHER),
the use of the CPU.

Pure but for the memory that is read from /proc; called by administration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from overcommit.runtime.ledger import FIELDS

if TYPE_CHECKING:
    from overcommit.runtime.site import Site

Counts = dict[str, int]  # by the names of FIELDS
Row = tuple[tuple[str, str], tuple[int, ...]]  # name and version, counts in the order of FIELDS

_NS_PER_US: Final = 1000
_MEMINFO: Final = "/proc/meminfo"
# Name, text, extra labels, and how it follows from a version's counts.
_COUNTERS: Final[tuple[tuple[str, str, str, Callable[[Counts], int]], ...]] = (
    (
        "request_success",
        "Number of successful inference requests, all batch sizes",
        "",
        lambda n: n["success"],
    ),
    (
        "request_failure",
        "Number of failed inference requests, all batch sizes",
        'reason="OTHER",',
        lambda n: n["failure"],
    ),
    ("count", "Number of inferences performed", "", lambda n: n["inferences"]),
    ("exec_count", "Number of model executions performed", "", lambda n: n["executions"]),
    (
        "request_duration_us",
        "Cumulative inference request duration in microseconds",
        "",
        lambda n: (n["request_ns"] - n["failure_ns"]) // _NS_PER_US,
    ),
    (
        "queue_duration_us",
        "Cumulative inference queuing duration in microseconds",
        "",
        lambda n: n["queue_ns"] // _NS_PER_US,
    ),
    (
        "compute_input_duration_us",
        "Cumulative compute input duration in microseconds",
        "",
        lambda n: n["input_ns"] // _NS_PER_US,
    ),
    (
        "compute_infer_duration_us",
        "Cumulative compute inference duration in microseconds",
        "",
        lambda n: max(0, n["compute_ns"] - n["input_ns"] - n["output_ns"]) // _NS_PER_US,
    ),
    (
        "compute_output_duration_us",
        "Cumulative inference compute output duration in microseconds",
        "",
        lambda n: n["output_ns"] // _NS_PER_US,
    ),
)


def exposition(rows: Sequence[Row], sites: Sequence[Site] = ()) -> bytes:
    """Return the Prometheus text of these versions, and of the GPUs and the memory of the machine."""
    lines = [*_models(rows), *_gpus(sites), *_memory()]
    return "".join(f"{line}\n" for line in lines).encode()


def _models(rows: Sequence[Row]) -> Iterator[str]:
    named = [(labels, dict(zip(FIELDS, counts, strict=True))) for labels, counts in rows]
    for name, text, more, count in _COUNTERS:
        yield from _head(f"nv_inference_{name}", text, "counter")
        for (model, version), counts in named:
            labels = f'model="{_escape(model)}",{more}version="{_escape(version)}"'
            yield f"nv_inference_{name}{{{labels}}} {count(counts)}"


def _gpus(sites: Sequence[Site]) -> Iterator[str]:
    watched = [(site.gpu_watch.uuid, site.gpu_watch.reading) for site in sites if site.gpu_watch]
    read = [(uuid, reading) for uuid, reading in watched if reading is not None]
    for name, text, values in (
        (
            "utilization",
            "GPU utilization rate [0.0 - 1.0)",
            [None if r.busy_percent is None else r.busy_percent / 100 for _, r in read],
        ),
        ("memory_total_bytes", "GPU total memory, in bytes", [r.total_bytes for _, r in read]),
        ("memory_used_bytes", "GPU used memory, in bytes", [r.used_bytes for _, r in read]),
        ("power_usage", "GPU power usage in watts", [r.power_watts for _, r in read]),
    ):
        known = [(uuid, v) for (uuid, _), v in zip(read, values, strict=True) if v is not None]
        if known:
            yield from _head(f"nv_gpu_{name}", text, "gauge")
        for uuid, value in known:
            yield f'nv_gpu_{name}{{gpu_uuid="{_escape(uuid)}"}} {value}'


def _memory() -> Iterator[str]:
    try:
        with open(_MEMINFO) as file:
            told = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        total, available = told["MemTotal"], told["MemAvailable"]
    except (OSError, LookupError, ValueError):
        return
    yield from _head("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", "gauge")
    yield f"nv_cpu_memory_total_bytes {total}"
    yield from _head("nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", "gauge")
    yield f"nv_cpu_memory_used_bytes {total - available}"


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
