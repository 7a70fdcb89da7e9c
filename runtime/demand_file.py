"""What was learnt of each model's demand, kept across starts of the server.

A file of records in the cache folder, written as a whole, to another name and renamed.  Record: length
(u32), CRC-32 (u32), name (u16 length, UTF-8), the fields of `Demand`.  The first bytes name the format.

Invariants
 1. A torn or foreign file loses facts, never invents one: reading stops at the first bad record.
 2. Facts are keyed by the model's name, so that a new version begins with what the former one was
    known for; there are at most PREFETCH_MODELS_MAX.

Pure but for `read` and `write`.  Called by `memories`.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from overcommit.runtime.config import NAME_CHARS_MAX
from overcommit.runtime.demand import EXPERTS, Demand
from overcommit.runtime.gaps import BINS, Pool
from overcommit.runtime.prefetch_limits import PREFETCH_MODELS_MAX
from overcommit.runtime.weekly import HOURS, Weekly

FILE_NAME: Final = "demand.bin"
MAGIC: Final = b"overcommit-demand\x01\n"
_HEAD: Final = struct.Struct("<II")
_FIELDS: Final = struct.Struct(f"<ddI{len(EXPERTS)}dqq?{BINS}s{HOURS}s")
_NAME: Final = struct.Struct("<H")
RECORD_BYTES_MAX: Final = _NAME.size + 4 * NAME_CHARS_MAX + _FIELDS.size


def encode(demand: Demand) -> bytes:
    """Return a model's fields."""
    week = demand.week
    return _FIELDS.pack(
        *(demand.last_s, demand.mean_s, demand.visits, *demand.scores),
        *(week.born, week.hour, week.is_used, bytes(demand.bins), bytes(week.cells)),
    )


def decode(fields: bytes, pool: Pool) -> Demand | None:
    """Return the model as it was; None for what no encoder made."""
    if len(fields) != _FIELDS.size:
        return None
    last_s, mean_s, visits, *rest = _FIELDS.unpack(fields)
    scores, (born, hour, is_used, bins, cells) = rest[: len(EXPERTS)], rest[len(EXPERTS) :]
    if not all(map(math.isfinite, (last_s, mean_s, *scores))) or mean_s < 0 or born > hour:
        return None
    demand = Demand(last_s, pool)
    demand.mean_s, demand.visits, demand.scores = mean_s, visits, array("d", scores)
    demand.bins = bytearray(bins)
    week = Weekly(born)
    week.hour, week.is_used, week.cells = hour, is_used, bytearray(cells)
    demand.week = week
    return demand


def record_of(name: str, fields: bytes) -> bytes:
    """Return a model's record."""
    encoded = name.encode()
    body = _NAME.pack(len(encoded)) + encoded + fields
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


def write(folder: Path, records: Iterable[bytes]) -> None:
    """Replace the file.  Raises OSError; then the former one is still there."""
    temporary = folder / f"{FILE_NAME}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC)
            file.writelines(records)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / FILE_NAME)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read(folder: Path) -> dict[str, bytes]:
    """Return the fields of each model by name; what cannot be read is left out."""
    try:
        with (folder / FILE_NAME).open("rb") as file:
            data = file.read(len(MAGIC) + PREFETCH_MODELS_MAX * (_HEAD.size + RECORD_BYTES_MAX))
    except OSError:
        return {}
    return dict(_records(data))


def _records(data: bytes) -> Iterator[tuple[str, bytes]]:
    if not data.startswith(MAGIC):
        return
    at = len(MAGIC)
    for _ in range(PREFETCH_MODELS_MAX):
        if at + _HEAD.size > len(data):
            return
        length, crc = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) < length or length < _NAME.size or zlib.crc32(body) != crc:
            return
        at += _HEAD.size + length
        end = _NAME.size + _NAME.unpack_from(body)[0]
        try:
            name = body[_NAME.size : end].decode()
        except UnicodeDecodeError:
            return
        yield name, body[end:]
