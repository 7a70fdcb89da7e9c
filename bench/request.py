"""One request of the load, and what a workload is.

A request that is sent again and again, byte for byte the same, can learn its answer: the first one
is read and judged in full, and from then on an answer with the same bytes is known to be right.

Called by the workloads and by the connections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# (bytes of the body, bytes of the JSON before the binary part or -1): what a head says.
Frame = tuple[int, int]


@dataclass(slots=True, eq=False)
class Request:
    """A request that was drawn; one that is repeated is the same object each time."""

    payload: bytes
    target: str
    id: bytes = b""
    variant: int = 0
    input: int = 0
    is_repeated: bool = False  # False: it is sent once and learns nothing
    # Learned from an answer that the workload's judge found right.
    body: bytes | None = None
    frame: Frame | None = None
    answer: bytes | None = None  # the last right one, head and all
    right: int = 0  # known answers since they were last added to the tally


class Workload(Protocol):
    """Draws requests and judges answers."""

    uses_ids: bool  # whether `draw` needs an id that no other request has
    answer_bytes_max: int  # about; decides how a connection reads

    def draw(self, request_id: bytes) -> Request:
        """Return the next request, with this id in it."""
        ...

    def judge(self, request: Request, headers: dict[bytes, bytes], body: bytes) -> str | None:
        """Return None for the right answer, else what is wrong with it."""
        ...
