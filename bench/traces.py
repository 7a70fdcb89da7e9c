"""Columns of CSV files: when requests came, and for which model, in somebody's real service.

Called by `arrivals` and `popularity`.
"""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from overcommit.bench.errors import BenchError

ROWS_MAX: Final = 10_000_000
_FRACTION_DIGITS: Final = 6  # Python's; some traces have seven


def read_column(path: Path, column: str = "") -> list[str]:
    """Return a column's cells; without a name the first one, whose header line may be missing.

    Raises BenchError when the file or the column is not there.
    """
    try:
        with path.open(newline="") as file:
            rows = csv.reader(file)
            first = next(rows, [])
            place = first.index(column) if column else 0
            cells = [row[place] for row, _ in zip(rows, range(ROWS_MAX), strict=False) if row]
    except OSError as error:
        raise BenchError(f"the trace {path} cannot be read: {error}") from error
    except (ValueError, IndexError) as error:
        raise BenchError(f"the trace {path} has no column '{column}' in every row") from error
    if not column and first and _is_value(first[0]):
        cells.insert(0, first[0])
    if not cells:
        raise BenchError(f"the trace {path} is empty")
    return cells


def read_seconds(path: Path, column: str = "") -> NDArray[np.float64]:
    """Return times, in order, as seconds since the first; cells are seconds or ISO timestamps."""
    try:
        cells = [to_seconds(cell) for cell in read_column(path, column)]
    except ValueError as error:
        raise BenchError(f"the trace {path}: {error}") from error
    seconds: NDArray[np.float64] = np.sort(np.array(cells, np.float64))
    seconds -= seconds[0]
    return seconds


def _is_value(cell: str) -> bool:
    try:
        to_seconds(cell)
    except ValueError:
        return False
    return True


def to_seconds(cell: str) -> float:
    """Return seconds, or the time of an ISO timestamp, which is taken as UTC.

    Raises ValueError.
    """
    try:
        return float(cell)
    except ValueError:
        whole, _, fraction = cell.partition(".")
        moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
        return moment.timestamp() + float(f"0.{fraction[:_FRACTION_DIGITS] or 0}")
