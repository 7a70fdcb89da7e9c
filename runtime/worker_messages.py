"""Control messages between the supervisor and workers: versions, and where their weights are.

Invariants
 1. A worker gets VersionInfo before the first Placed or Coming of a version.
 2. Each Activate is answered once, by Placed, ActivationFailed or Withdrawn; Coming and Expected
    may come before.

Extents are `(offset, length)` in bytes inside DEVICE.
"""

from __future__ import annotations

import msgspec

from overcommit.runtime.config import NEVER_NS, ModelConfig
from overcommit.runtime.messages import Extents, Message


class VersionInfo(Message, frozen=True):
    """What a worker must know to serve the version in `slot`."""

    slot: int
    name: str
    version: str
    image_path: str
    nbytes: int  # of the arena image, a multiple of PAGE_BYTES
    config: ModelConfig  # inputs and outputs filled in


class Activate(Message, frozen=True):
    """Worker: requests wait here for this version; tell me when it is resident, and where.

    The deadlines are those of the requests: the first, and the last.
    """

    slot: int
    earliest_ns: int = NEVER_NS
    latest_ns: int = NEVER_NS


class Placed(Message, frozen=True):
    """The version is RESIDENT in the DEVICE arena at these extents, for this generation.

    `shared` are the indices of extents that may be mapped for other versions at the same time.
    """

    slot: int
    generation: int
    extents: Extents
    shared: tuple[int, ...] = ()


class Coming(Message, frozen=True):
    """The version's bytes are on their way to these extents; a Placed like this follows if they come.

    To be mapped meanwhile, not to be read until the state word is RESIDENT with this generation: that is
    as good as the Placed, which comes later.
    """

    slot: int
    generation: int
    extents: Extents
    shared: tuple[int, ...] = ()


class Attach(msgspec.Struct, frozen=True, kw_only=True):
    """When a worker asked for a version, heard of it, had it mapped, and could run it.

    Instants of CLOCK_MONOTONIC; `timings` says what each is.
    """

    slot: int
    generation: int
    asked_ns: int
    placed_ns: int
    mapped_ns: int
    ready_ns: int


class Attaches(Message, frozen=True):
    """Worker: what was mapped since the last one; sent with a heartbeat, when there is any."""

    attaches: tuple[Attach, ...]


class Expected(Message, frozen=True):
    """It will not be resident before `ready_ns`: a request whose deadline is earlier need not wait.

    It should come back at `likely_ns`, which is later or the same.
    """

    slot: int
    ready_ns: int
    likely_ns: int


class ActivationFailed(Message, frozen=True):
    """It cannot be made resident now; answer what waits with this error."""

    slot: int
    code: str
    message: str
    retry_after_s: float | None = None


class Withdrawn(Message, frozen=True):
    """Nobody seemed to wait for the version any more; ask again if somebody does."""

    slot: int


class BindFailed(Message, frozen=True):
    """Worker: the program of this version cannot be loaded or bound; it is broken."""

    slot: int
    message: str


class Forget(Message, frozen=True):
    """The version was removed or unloaded: drop its program and mapping."""

    slot: int


WorkerMessage = (
    VersionInfo
    | Activate
    | Placed
    | Coming
    | Attaches
    | Expected
    | ActivationFailed
    | Withdrawn
    | BindFailed
    | Forget
)
