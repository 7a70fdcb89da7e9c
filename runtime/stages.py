"""What a worker says of a batch that ran, in the one word that a completion has for it.

One completion of each batch, and of each version in a batch across versions, speaks for all of them;
the others carry 0.  So a batch is counted once, by whoever sends that completion on, and counting costs
a batch and not a request.

    bits 0-12   rows, along the batch axis, of the requests that are spoken for; at least 1
    bits 13-21  how many requests these are
    bits 22-42  time in which the inputs were gathered, in units of UNIT_NS
    bits 43-63  time in which the outputs were split, likewise

Times are rounded to the unit and cut to what fits (half a second).

Pure.  Written by the runner, read by a front end's counts (`server/_counts.c`, which has the layout again).
"""

from __future__ import annotations

from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.config import BATCH_SIZE_LIMIT

UNIT_NS: Final = 256
_ROWS_MAX: Final = (1 << 13) - 1
_REQUESTS_MAX: Final = (1 << 9) - 1
_TIME_MAX: Final = (1 << 21) - 1

assert _ROWS_MAX >= BATCH_SIZE_LIMIT
assert _REQUESTS_MAX >= _shm.STATUS_BATCH_MAX


def pack(rows: int, requests: int, input_ns: int, output_ns: int) -> int:
    """Say it in one word."""
    gathered = min((input_ns + UNIT_NS // 2) // UNIT_NS, _TIME_MAX)
    split = min((output_ns + UNIT_NS // 2) // UNIT_NS, _TIME_MAX)
    return min(rows, _ROWS_MAX) | min(requests, _REQUESTS_MAX) << 13 | gathered << 22 | split << 43
