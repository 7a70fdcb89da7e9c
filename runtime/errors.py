"""The one exception tree.

Every class carries what a caller on the wire needs: an HTTP status, a gRPC code and a stable
`code` word.  Messages name the model, the limit and the remedy.  Foreign exceptions are mapped to
these at the edge where they appear, with ``raise ... from``.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

from overcommit.runtime.config import ERROR_CHARS_MAX, FOREIGN_ERROR_CHARS_MAX

_GAP: Final = " ... "
# Where a native library begins to list its frames, with their addresses: nothing for clients.
_NATIVE: Final = re.compile(r"\n\s*(?:Stack trace:|Exception raised from )")


def shortened(text: str) -> str:
    """Leave out the middle of a text that is too long: what is wrong comes first, the remedy last."""
    if len(text) <= ERROR_CHARS_MAX:
        return text
    half = (ERROR_CHARS_MAX - len(_GAP)) // 2
    return text[: ERROR_CHARS_MAX - len(_GAP) - half] + _GAP + text[-half:]


def said_by(error: BaseException) -> str:
    """Write an exception that is not ours in a line: its name, and what it says."""
    text = _NATIVE.split(str(error), maxsplit=1)[0]
    return f"{type(error).__name__}: {text}"[:FOREIGN_ERROR_CHARS_MAX]


class OvercommitError(Exception):
    """Base of everything this package raises on purpose."""

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        self.message = shortened(message)  # names and values in it may be a client's
        super().__init__(self.message)
        self.retry_after_s = retry_after_s


class BadRequest(OvercommitError):
    """The client's bytes are wrong: malformed JSON, unknown tensor, shape that does not fit."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    code = "bad_request"


class NotFound(OvercommitError):
    """No such model or version."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    code = "not_found"


class RequestTimeout(OvercommitError):
    """The client took too long to send its request."""

    http_status = 408
    grpc_code = "DEADLINE_EXCEEDED"
    code = "request_timeout"


class PayloadTooLarge(OvercommitError):
    """A body, tensor or header over its limit."""

    http_status = 413
    grpc_code = "RESOURCE_EXHAUSTED"
    code = "payload_too_large"


class HeadersTooLarge(OvercommitError):
    """Too many header bytes or header lines."""

    http_status = 431
    grpc_code = "RESOURCE_EXHAUSTED"
    code = "headers_too_large"


class Overloaded(OvercommitError):
    """A queue, ring or payload arena is full; try again soon."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    code = "overloaded"


class Unavailable(OvercommitError):
    """The model or the server cannot serve now: broken, packing, quarantined, draining."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    code = "unavailable"


class DeadlineExceeded(OvercommitError):
    """The request's time was over before its answer was there."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    code = "deadline_exceeded"


class WorkerLost(OvercommitError):
    """The worker that ran the request died and the one retry was used up."""

    http_status = 502
    grpc_code = "UNAVAILABLE"
    code = "worker_lost"


class ModelError(OvercommitError):
    """The model's own code raised while it ran."""

    http_status = 500
    grpc_code = "INTERNAL"
    code = "model_error"

    @classmethod
    def of(cls, error: BaseException) -> ModelError:
        """Say what a model's own code, or its library, raised."""
        return cls(said_by(error))


class Forbidden(OvercommitError):
    """Asked for something that the operator has not allowed, such as running a model's code."""

    http_status = 403
    grpc_code = "PERMISSION_DENIED"
    code = "forbidden"


class NotOffered(OvercommitError):
    """An extension of the protocol that this server does not have."""

    http_status = 501
    grpc_code = "UNIMPLEMENTED"
    code = "not_offered"


class RepositoryError(OvercommitError):
    """A model folder that cannot be served: bad name, bad model.toml, unknown format."""

    http_status = 400
    grpc_code = "FAILED_PRECONDITION"
    code = "repository"


class ImageError(OvercommitError):
    """An image file that is torn, of another format version, or fails its digest."""

    code = "image"


class OutOfMemory(OvercommitError):
    """A version that can never fit the tier's budget."""

    http_status = 507
    grpc_code = "RESOURCE_EXHAUSTED"
    code = "out_of_memory"


class ProtocolError(OvercommitError):
    """A peer process broke the rules of a ring or a control message; its link is dropped."""

    code = "protocol"


class ConfigurationError(OvercommitError):
    """A setting that cannot be served, found before anything starts."""

    http_status = 400
    grpc_code = "FAILED_PRECONDITION"
    code = "configuration"


class DeviceLost(BaseException):
    """The GPU answers this process no more; only another process can go on.

    No `Exception`: it has to pass the batch boundary, which would only fail every batch to come.
    """
