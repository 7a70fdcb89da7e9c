"""A trace of requests from a file, for the scenario `replay`.

CSV with a header, or one JSON object a line (`.jsonl`), of which these are read:

    time_s   seconds, or an ISO timestamp; also called `timestamp` (whatever the case)
    model    any text; where it is missing, as in the Azure LLM inference traces, which are of one
             service, models are drawn by the laws of `catalogue_trace`
    bytes    the model's size; may be missing, in all rows

Rows need not be in order.  Models are numbered by the number of their requests, the most asked first,
as laws of sizes expect.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from overcommit.bench.catalogue_trace import Request, draw_models
from overcommit.bench.errors import BenchError
from overcommit.bench.traces import ROWS_MAX, to_seconds

_TIMES: Final = ("time_s", "timestamp")
MODELS_MAX: Final = 100_000

Row = Mapping[str, object]


@dataclass(slots=True, frozen=True)
class Loaded:
    """What a file holds; a model's number is its place in `names`."""

    trace: list[Request]
    names: list[str]
    sizes: list[int] | None  # None: the file does not say


def read(path: Path, seed: int = 1) -> Loaded:
    """Read a trace.

    Raises BenchError, with the line, when it cannot be read or a row is not as it must be.
    """
    times: list[float] = []
    models: list[str] = []
    sizes: dict[str, int] = {}
    try:
        with path.open(newline="") as file:
            rows: Iterable[Row] = (
                _objects(file) if path.suffix == ".jsonl" else csv.DictReader(file)
            )
            for number, row in enumerate(rows, start=2 if path.suffix != ".jsonl" else 1):
                if number > ROWS_MAX:
                    break
                _take(row, times, models, sizes)
    except OSError as error:
        raise BenchError(f"the trace {path} cannot be read: {error}") from error
    except (ValueError, msgspec.DecodeError) as error:
        raise BenchError(f"the trace {path}, line {len(times) + 2} or so: {error}") from error
    if not times:
        raise BenchError(f"the trace {path} is empty")
    if models and len(models) != len(times):
        raise BenchError(f"the trace {path} names a model in some rows and none in others")
    return _numbered(path, times, models, sizes, seed)


def read_sizes(path: Path) -> dict[str, int]:
    """Read a CSV file with the columns `model` and `bytes`.

    Raises BenchError.
    """
    try:
        with path.open(newline="") as file:
            return {row["model"]: int(row["bytes"]) for row in csv.DictReader(file)}
    except OSError as error:
        raise BenchError(f"the sizes {path} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"the sizes {path} need columns 'model' and 'bytes': {error}") from error


def _objects(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        if line.strip():
            yield msgspec.json.decode(line, type=dict[str, object])


def _take(row: Row, times: list[float], models: list[str], sizes: dict[str, int]) -> None:
    cells = {str(name).lower(): value for name, value in row.items()}
    time = next((cells[name] for name in _TIMES if cells.get(name) not in (None, "")), None)
    if time is None:
        raise ValueError(f"no {' or '.join(_TIMES)}")
    times.append(to_seconds(str(time)))
    model = cells.get("model")
    if model not in (None, ""):
        models.append(str(model))
        if cells.get("bytes") not in (None, ""):
            sizes[str(model)] = int(str(cells["bytes"]))


def _numbered(
    path: Path, times: list[float], models: list[str], sizes: dict[str, int], seed: int
) -> Loaded:
    first = min(times)
    if not models:
        drawn = draw_models(seed, len(times))
        trace = [Request(at - first, model) for at, model in zip(sorted(times), drawn, strict=True)]
        return Loaded(trace, [f"model-{number}" for number in range(max(drawn) + 1)], None)
    names = [name for name, _ in Counter(models).most_common()]
    if len(names) > MODELS_MAX:
        raise BenchError(f"the trace {path} has {len(names)} models, more than {MODELS_MAX}")
    numbers = {name: number for number, name in enumerate(names)}
    trace = [Request(at - first, numbers[m]) for at, m in zip(times, models, strict=True)]
    trace.sort(key=lambda request: request.time_s)
    if sizes and len(sizes) < len(names):
        missing = next(name for name in names if name not in sizes)
        raise BenchError(f"the trace {path} has no bytes for model '{missing}', but for others")
    return Loaded(trace, names, [sizes[name] for name in names] if sizes else None)
