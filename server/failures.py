"""What a refusal means to a client: a worker's, the dispatch's, a check's.

Called by the dispatch and where requests are read.
"""

from __future__ import annotations

from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.errors import (
    BadRequest,
    DeadlineExceeded,
    ModelError,
    OvercommitError,
    Overloaded,
    PayloadTooLarge,
    Unavailable,
)
from overcommit.runtime.front_end_messages import Route
from overcommit.server.limits import BODIES_BYTES_MAX

ROOM_S_MIN: Final = 0.001  # until a place is free in a queue ...
UNKNOWN_S: Final = 1.0  # ... whose batches were not timed yet


def queue_full(name: str, limit: int, room_s: float, *, is_own: bool = True) -> Overloaded:
    """As many wait as may, of one model or (not `is_own`) of all that a front end holds."""
    room_s = max(ROOM_S_MIN, room_s)
    who, remedy = "requests for it wait, its max_queue_size", "raise that"
    if not is_own:
        who, remedy = "requests wait for a worker", "add front ends"
    return Overloaded(
        f"model '{name}': {limit} {who}; try again in {room_s:.3f} s, {remedy}, or add workers",
        retry_after_s=room_s,
    )


def too_late(name: str) -> DeadlineExceeded:
    """The request's time is over."""
    return DeadlineExceeded(f"model '{name}': no answer within the request's time")


def stopping(name: str) -> Unavailable:
    """The time in which a server that stops answers what is in flight is over."""
    return Unavailable(
        f"model '{name}': the server is stopping, and its --drain-timeout is over; ask another, or "
        f"this one when it is back",
        retry_after_s=UNKNOWN_S,
    )


def bodies_full(who: str = "") -> Overloaded:
    """What clients are sending takes too much memory, all of them together."""
    return Overloaded(
        f"{who}bodies being received take over {BODIES_BYTES_MAX} bytes, which is the limit; try again",
        retry_after_s=1,
    )


def internal() -> OvercommitError:
    """A defect of ours, which the log has."""
    return OvercommitError("internal error; see the server's log")


def memory_full(name: str, nbytes: int) -> Overloaded:
    """There is no room for an answer."""
    return Overloaded(
        f"model '{name}': payload memory has no room for an answer of {nbytes} bytes; try again, or raise "
        f"--payload-memory",
        retry_after_s=1,
    )


def error_of(route: Route, status: int, text: str, detail: int) -> OvercommitError:
    """Make the error of a completion; `text` and `detail` are what the worker said with it."""
    name = route.name
    if status == _shm.EXPIRED:
        return DeadlineExceeded(f"model '{name}': the request's time was over in the queue")
    if status == _shm.OVERLOADED:
        return queue_full(name, route.max_queue_size, detail / 1000 or UNKNOWN_S)
    if status == _shm.NOT_RESIDENT:
        code, _, message = text.partition("\n")
        kind = {c.code: c for c in OvercommitError.__subclasses__()}.get(code, Unavailable)
        return kind(message, retry_after_s=detail / 1000 if detail else None)
    if status == _shm.BAD_REQUEST:
        is_named = f"model '{name}'" in text
        return BadRequest(text if is_named else f"model '{name}': {text}")
    if status == _shm.TOO_LARGE:
        return PayloadTooLarge(f"model '{name}': the answer needs {detail} bytes")
    return ModelError(f"model '{name}': {text}")


def named(error: OvercommitError, route: Route) -> OvercommitError:
    """Say of which model an error is, if it does not."""
    prefix = f"model '{route.name}': "
    if error.message.startswith((prefix, "inference request ")):  # Triton's words name it
        return error
    return type(error)(prefix + error.message)
