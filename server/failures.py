"""What a worker's refusal means to a client.

Called by the dispatch.
"""

from __future__ import annotations

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


def error_of(name: str, status: int, text: str, detail: int) -> OvercommitError:
    """Make the error of a completion; `text` and `detail` are what the worker said with it."""
    if status == _shm.EXPIRED:
        return DeadlineExceeded(f"model '{name}': the request's time was over in the queue")
    if status == _shm.OVERLOADED:
        return Overloaded(f"model '{name}': its queue is full; try again", retry_after_s=1)
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
