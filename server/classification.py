"""The classification extension: an output as its highest values, each with the name of its class.

Where a request asks for `classification` of an output (over gRPC too), it gets BYTES elements
`value:index` or `value:index:label`, the highest first, for each row where the model batches.  Values are
written as Triton writes them, with six digits behind the point unless they are whole numbers.  Equal values
are in the order of their indices, and what is not a number comes last.

Labels are read from a file in the model's folder, one in each line, when somebody asks for the first time.

Pure but for `Labels`.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from overcommit.runtime.errors import BadRequest, RepositoryError
from overcommit.runtime.front_end_messages import Route
from overcommit.server.limits import LABEL_FILES_MAX, LABELS_BYTES_MAX

_NUMPY: Final[dict[str, Any]] = {
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    **{f"{s}INT{b}": f"{s.lower()}int{b}" for s in ("", "U") for b in (8, 16, 32, 64)},
}


@dataclass(slots=True, frozen=True)
class Classes:
    """So many of the highest values are wanted."""

    count: int


def shape_of(shape: tuple[int, ...], count: int, *, batches: bool) -> tuple[int, ...]:
    """Return the shape of the classes of a tensor of this shape."""
    if batches and shape:
        return shape[0], min(count, math.prod(shape[1:]))
    return (min(count, math.prod(shape)),)


def classify(
    view: memoryview,
    datatype: str,
    shape: tuple[int, ...],
    count: int,
    labels: tuple[str, ...] = (),
    *,
    batches: bool,
) -> list[bytes]:
    """Return the elements of the answer, row by row; `view` holds the tensor's bytes.

    Raises BadRequest for a datatype that has no highest value.
    """
    values = _array(view, datatype)
    rows = shape[0] if batches and shape else 1
    table = values.reshape(rows, -1) if values.size else values.reshape(rows, 0)
    elements: list[bytes] = []
    for row in table:
        for index in _highest(row, count):
            text = f"{_show(row[index])}:{index}"
            if index < len(labels) and labels[index]:
                text += f":{labels[index]}"
            elements.append(text.encode())
    return elements


def _array(view: memoryview, datatype: str) -> np.ndarray[Any, np.dtype[Any]]:
    if datatype == "BF16":
        bits = np.frombuffer(view, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    kind = _NUMPY.get(datatype)
    if kind is None:
        raise BadRequest(f"is {datatype}, which cannot be classified")
    return np.frombuffer(view, kind)


def _highest(row: np.ndarray[Any, np.dtype[Any]], count: int) -> list[int]:
    if row.dtype.kind == "u":
        keys = np.iinfo(row.dtype).max - row
    elif row.dtype.kind == "i":
        keys = ~row  # the negative would overflow for the lowest
    else:
        keys = -row  # NaN stays last in a sort
    order: list[int] = np.argsort(keys, kind="stable")[:count].tolist()
    return order


def _show(value: Any) -> str:
    return f"{value:.6f}" if isinstance(value, np.floating) else str(value)


class Labels:
    """Names of classes by file, read when they are asked for."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, ...], tuple[str, ...]] = {}  # by where they may be

    def of(self, route: Route, index: int) -> tuple[str, ...]:
        """Return the labels of an output; () where it has none.  Raises RepositoryError."""
        places = route.labels[index] if index < len(route.labels) else ()
        if not places:
            return ()
        labels = self._read.get(places)
        if labels is None:
            if len(self._read) >= LABEL_FILES_MAX:
                self._read.clear()
            labels = self._read[places] = _read(places)
        return labels

    def forget(self) -> None:
        """Models have changed: read anew."""
        self._read.clear()


def _read(places: tuple[str, ...]) -> tuple[str, ...]:
    """Read the first of these files that is there."""
    name = os.path.basename(places[0])
    for place in places:
        try:
            fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RepositoryError(f"labels: {name} cannot be read: {error.strerror}") from error
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RepositoryError(f"labels: {name} is no file")
            content = file.read(LABELS_BYTES_MAX + 1)
        if len(content) > LABELS_BYTES_MAX:
            raise RepositoryError(f"labels: {name} is longer than {LABELS_BYTES_MAX} bytes")
        return tuple(line.strip() for line in content.decode(errors="replace").splitlines())
    raise RepositoryError(f"labels: there is no file {name} in the model's folder")
