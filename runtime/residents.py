"""The nouns of residency: a version and where its weights are, what is asked and what is answered.

Owns the fields, not their rules: `residency` and `placement` alone write a `Version`, and say when.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, Protocol

from overcommit.runtime.allocator import Extent
from overcommit.runtime.messages import Urgency

Extents = tuple[Extent, ...]
Source = Literal["disk", "host"]

NOBODY: Final = -1  # a waiter that needs no answer: the supervisor, for a pinned version


class Tier(Enum):
    """The best tier that has a version's weights."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class State(Enum):
    """See the diagram in `residency`."""

    DISK = "disk"
    LOADING = "loading"
    DEVICE = "device"
    HOST = "host"


@dataclass(slots=True, frozen=True)
class Terms:
    """What the operator says about a version's stay on DEVICE."""

    pinned: bool = False  # never evicted
    priority: int = 0  # who has more is evicted later, whatever else speaks for others
    min_resident_ns: int = 0  # after its publish, in which only a desperate wish takes its bytes
    ttl_ns: int = 0  # without a use, after which DEVICE is given back; 0: never


@dataclass(slots=True, eq=False)
class Version:
    """What residency knows of one version."""

    slot: int
    name: str
    nbytes: int
    terms: Terms
    generation: int  # of the latest publish in this slot
    state: State = State.DISK
    device: Extents | None = None  # set while LOADING or DEVICE
    host: Extents | None = None  # set while HOST, and maybe while LOADING or DEVICE
    is_host_complete: bool = False  # the host copy may be loaded from
    is_leaving: bool = False  # removed, but still leased or loading
    waiters: set[int] = field(default_factory=set)
    published_ns: int = 0
    uses: int = 0  # as last told to the policy
    failures: int = 0  # loads that failed in a row
    retry_ns: int = 0  # refused until then
    last_error: str = ""
    loads_from_disk: int = 0
    loads_from_host: int = 0
    evictions: int = 0  # from DEVICE

    @property
    def pinned(self) -> bool:
        """It is never evicted."""
        return self.terms.pinned

    def take_waiters(self) -> frozenset[int]:
        """Return who is to be answered; from now on nobody waits."""
        waiters = frozenset(self.waiters - {NOBODY})
        self.waiters.clear()
        return waiters


@dataclass(slots=True, frozen=True)
class Wish:
    """A place in the queue; who waits is in `Version.waiters`."""

    version: Version
    asked_ns: int


@dataclass(slots=True, frozen=True)
class View:
    """One version, for status."""

    tier: Tier
    device_bytes: int
    host_bytes: int
    generation: int
    state: State
    loads_from_disk: int
    loads_from_host: int
    evictions: int
    last_error: str


def view_of(version: Version) -> View:
    """Return a version's state of this instant."""
    tier = Tier.DISK
    if version.state is State.DEVICE:
        tier = Tier.DEVICE
    elif version.host is not None and version.is_host_complete:
        tier = Tier.HOST
    return View(
        tier=tier,
        device_bytes=_length(version.device),
        host_bytes=_length(version.host),
        generation=version.generation,
        state=version.state,
        loads_from_disk=version.loads_from_disk,
        loads_from_host=version.loads_from_host,
        evictions=version.evictions,
        last_error=version.last_error,
    )


def _length(extents: Extents | None) -> int:
    return 0 if extents is None else sum(extent.length for extent in extents)


@dataclass(slots=True)
class Totals:
    """Running totals since the start; they never shrink."""

    loads_from_disk: int = 0
    loads_from_host: int = 0
    evictions_device: int = 0
    evictions_host: int = 0
    expiries: int = 0  # versions that left DEVICE because they were idle for their ttl
    refusals: int = 0
    bytes_loaded: int = 0
    attaches: int = 0  # wishes answered at once, without a load

    def count_load(self, version: Version, source: Source) -> None:
        """A load has brought the version to DEVICE."""
        if source == "disk":
            version.loads_from_disk += 1
            self.loads_from_disk += 1
        else:
            version.loads_from_host += 1
            self.loads_from_host += 1
        self.bytes_loaded += version.nbytes


@dataclass(slots=True, frozen=True)
class StartLoad:
    """Bring the image to these places; `host` is read from if the source is "host".

    Without `device` it is read into HOST and stays there.
    """

    job: int
    slot: int
    source: Source
    host: Extents | None
    device: Extents | None
    urgency: Urgency = "foreground"


@dataclass(slots=True, frozen=True)
class CancelStarted:
    """Stop a load that was started; its end is an `on_load_done` like any other, with CANCELLED.

    It may have been over: then it says so.
    """

    job: int


@dataclass(slots=True, frozen=True)
class PromoteStarted:
    """Requests wait now for a load that was started as a prefetch."""

    job: int


@dataclass(slots=True, frozen=True)
class Publish:
    """The version is RESIDENT; tell these (nobody, if all of them were forgotten)."""

    slot: int
    generation: int
    extents: Extents
    waiters: frozenset[int]


@dataclass(slots=True, frozen=True)
class Refuse:
    """The wish ends without weights; `code` is one of errors.py."""

    slot: int
    code: str
    message: str
    retry_after_s: float | None
    waiters: frozenset[int]


Action = StartLoad | CancelStarted | PromoteStarted | Publish | Refuse


@dataclass(slots=True, frozen=True)
class Usage:
    """What the workers' pages say of a version, summed."""

    waiting: int  # requests queued for it
    uses: int  # requests run, ever
    last_used_ns: int
    leases: int


class Port(Protocol):
    """Shared memory, as residency sees it; `gate.SharedGate` is the real one."""

    def try_evict(self, slot: int, generation: int) -> bool:
        """Take the version out of use; False, and nothing has changed, if a lease is held."""
        ...

    def usage(self, slot: int) -> Usage:
        """Read the workers' counters for the version."""
        ...

    def set_state(self, slot: int, state: int, generation: int) -> None:
        """Write the version's state word."""

    def set_hungry(self, hungry: bool) -> None:
        """Ask workers to ring when they drop a lease."""
