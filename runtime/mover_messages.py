"""Control messages between the supervisor and the mover: loads.

Invariants
 1. Each Load is answered by one LoadDone, whatever CancelLoad and PromoteLoad said meanwhile; what
    else is said of a job that is not known is ignored.
 2. Who must not be overwritten is the supervisor's business: extents belong to the load until its
    LoadDone.

Extents are `(offset, length)` in bytes inside HOST or DEVICE.
"""

from __future__ import annotations

from typing import Final, Literal

from overcommit.runtime.messages import Extents, Message

# Foreground: requests wait for it.  Prefetch: nobody does yet; it gives way to every foreground load.
Urgency = Literal["foreground", "prefetch"]
CANCELLED: Final = "cancelled"  # what LoadDone says of a load that CancelLoad ended


class Load(Message, frozen=True):
    """Mover: bring the payload of one file, an image's or a part's, to these places.

    source "disk": read into `host` if given and copy on to `device` if given, else read straight
    into `device`.  source "host": copy `host` to `device`; source "device": the other way.  With
    `packed_bytes` the file and `host` hold so many, the packed form of these `nbytes`, and what goes to
    `device` is decoded on the way.
    With `publishes` the mover itself writes RESIDENT and that generation when the last byte is there, before
    LoadDone, and rings the workers in the seats `waiters`; until LoadDone nobody else writes the word.
    """

    job: int
    slot: int
    source: Literal["disk", "host", "device"]
    path: str
    nbytes: int
    packed_bytes: int = 0
    host: Extents | None = None
    device: Extents | None = None
    verify: bool = True
    urgency: Urgency = "foreground"
    publishes: int = 0
    waiters: tuple[int, ...] = ()


class CancelLoad(Message, frozen=True):
    """Mover: take no further step of this load.

    Its LoadDone comes when the last running step has ended: not ok, CANCELLED; or as it would have,
    if it was over.  A job that is not known is ignored: its LoadDone is on its way.
    """

    job: int


class PromoteLoad(Message, frozen=True):
    """Mover: requests wait for this load now, it is a foreground load from here on."""

    job: int


class WorkerBell(Message, frozen=True):
    """Mover: this doorbell wakes the worker in this seat, from now on.  fds: bell"""

    seat: int
    fds: tuple[str, ...] = ("bell",)


class LoadDone(Message, frozen=True):
    """The job ended.  `read_ns` and `copy_ns` are wall time in each stage.

    The other times are instants of CLOCK_MONOTONIC, which all processes share: when each stage began,
    and when the mover had the message, began the first step, and ended the last one.
    """

    job: int
    ok: bool
    message: str = ""
    read_bytes: int = 0
    read_began_ns: int = 0
    read_ns: int = 0
    copy_began_ns: int = 0
    copy_ns: int = 0
    direct: bool = False  # O_DIRECT was used
    received_ns: int = 0
    began_ns: int = 0
    ended_ns: int = 0


class Populated(Message, frozen=True):
    """The mover has touched every page of the arenas."""

    seconds: float


MoverMessage = Load | CancelLoad | PromoteLoad | WorkerBell | LoadDone | Populated
