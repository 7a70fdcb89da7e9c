"""What the supervisor answers, as a value or an error.

Called by whoever shows it in a protocol's own form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from overcommit.runtime.errors import OvercommitError

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

T = TypeVar("T")

# The first class of a status stands for it: that is what a client can tell.
_KINDS: Final[dict[int, type[OvercommitError]]] = {}
for _kind in OvercommitError.__subclasses__():
    _KINDS.setdefault(_kind.http_status, _kind)


async def ask_value(front: FrontEnd, operation: str, **arguments: str | int | bool) -> Any:
    """Have the supervisor answer with JSON.  Raises OvercommitError of the status it gives."""
    return msgspec.json.decode(await _ask(front, operation, arguments))


async def ask_typed(
    front: FrontEnd, kind: type[T], operation: str, **arguments: str | int | bool
) -> T:
    """Have the supervisor answer with JSON of this type.  Raises as `ask_value`."""
    return msgspec.json.decode(await _ask(front, operation, arguments), type=kind)


async def _ask(front: FrontEnd, operation: str, arguments: dict[str, str | int | bool]) -> bytes:
    answer = await front.ask(operation, **arguments)
    body = bytes(answer.body)
    if answer.status_code >= 400:
        kind = _KINDS.get(answer.status_code, OvercommitError)
        raise kind(str(msgspec.json.decode(body)["error"]))
    return body
