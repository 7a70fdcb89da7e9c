"""The nouns of residency: a version and where its weights are, what is asked and what is answered.

Owns the fields, not their rules: `residency` and `placement` alone write a `Version`, and say when.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, Protocol

from overcommit.runtime.allocator import Extent
from overcommit.runtime.config import NEVER_NS, ModelConfig, Settings
from overcommit.runtime.mover_messages import Urgency
from overcommit.runtime.parts import Part

Extents = tuple[Extent, ...]
Parts = tuple[Part, ...]
Source = Literal["disk", "host"]
Origin = Source | Literal["device"]  # "device": a copy to HOST, see `demotion`

NOBODY: Final = -1  # a waiter that needs no answer: the supervisor, for a pinned version


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

    @classmethod
    def of(cls, config: ModelConfig, settings: Settings) -> Terms:
        """Return what a model's file says, and the settings where it says nothing."""
        stay_s, ttl_s = config.min_resident_s, config.ttl_s
        stay_s = settings.min_resident_s if stay_s is None else stay_s
        ttl_s = settings.ttl_s if ttl_s is None else ttl_s
        return cls(config.pin, config.priority, int(stay_s * 1e9), int(ttl_s * 1e9))


@dataclass(slots=True, eq=False)
class Version:
    """What residency knows of one version."""

    slot: int
    name: str
    nbytes: int
    terms: Terms
    generation: int  # of the latest publish in this slot
    parts: Parts  # what its image consists of, in order; one of them may come twice
    state: State = State.DISK
    device: Parts = ()  # all of its parts while LOADING or DEVICE, else none
    host: Parts = ()  # some while HOST, and maybe while LOADING or DEVICE
    source: Source | None = None  # where the bytes of its latest load came from; None: none did
    load_ns: int = 0  # the longest of the loads that it waits for
    is_leaving: bool = False  # removed, but still leased or loading
    # Immutable, as nearly all are empty: 20,000 empty sets are 4 MB.
    waiters: frozenset[int] = frozenset()
    published_ns: int = 0
    promised_ns: int = 0  # requests were told to come back, and may until then
    uses: int = 0  # as last told to DEVICE's policy ...
    uses_host: int = 0  # ... and to HOST's
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

    @property
    def distinct_parts(self) -> Parts:
        """Its parts, each once."""
        return self.parts if len(self.parts) < 2 else tuple(dict.fromkeys(self.parts))

    def take_waiters(self) -> frozenset[int]:
        """Return who is to be answered; from now on nobody waits."""
        waiters = self.waiters - {NOBODY}
        self.waiters = frozenset()
        return waiters


@dataclass(slots=True, eq=False)
class Wish:
    """A place in the queue; who waits is in `Version.waiters`."""

    version: Version
    asked_ns: int
    held_until_ns: int = 0  # when it may push out what is worth more, as reckoned last
    not_before_ns: int = 0  # it is not tried: what it would push out is worth more
    due_ns: int = NEVER_NS  # requests were told to come back: when to begin, so that it is true

    @property
    def is_promised(self) -> bool:
        """Whether requests were told to come back when it is loaded."""
        return self.due_ns < NEVER_NS


@dataclass(slots=True)
class Totals:
    """Running totals since the start; they never shrink."""

    loads_from_disk: int = 0
    loads_from_host: int = 0
    evictions_device: int = 0
    evictions_host: int = 0
    expiries: int = 0  # versions that left DEVICE because they were idle for their ttl
    refusals: int = 0
    withdrawals: int = 0  # wishes that nobody waited for any more when their turn came
    bytes_loaded: int = 0
    attaches: int = 0  # wishes answered without a load of their own

    def count_load(self, version: Version) -> None:
        """The version is on DEVICE now."""
        if version.source == "disk":
            version.loads_from_disk += 1
            self.loads_from_disk += 1
        elif version.source == "host":
            version.loads_from_host += 1
            self.loads_from_host += 1
        else:
            self.attaches += 1


@dataclass(slots=True, frozen=True)
class StartLoad:
    """Bring a part to these places; `host` is read from if the source is "host".

    Without `device` it is read into HOST and stays there; from "device" it is copied to `host`.
    """

    job: int
    slot: int  # of the version for which it was started; others may wait for it too
    digest: str  # "": what is private to the version
    nbytes: int
    source: Origin
    host: Extents | None
    device: Extents | None
    urgency: Urgency = "foreground"
    packed_bytes: int = 0  # of its packed form, if that is what the file and `host` hold
    # As this generation its good end makes the version RESIDENT: nothing else is missing.  0: it does not.
    publishes: int = 0
    waiters: frozenset[int] = frozenset()  # at its start


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
    """The version is RESIDENT; tell these (nobody, if all of them were forgotten).

    `shared` are the indices of the extents that other versions may have mapped at this moment.
    """

    slot: int
    generation: int
    extents: Extents
    waiters: frozenset[int]
    shared: tuple[int, ...] = ()


@dataclass(slots=True, frozen=True)
class Foretold:
    """What `Publish` will say if the loads of a version end well, and who waits for it so far."""

    generation: int
    extents: Extents
    waiters: frozenset[int]
    shared: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class Refuse:
    """The wish ends without weights; `code` is one of errors.py."""

    slot: int
    code: str
    message: str
    retry_after_s: float | None
    waiters: frozenset[int]


@dataclass(slots=True, frozen=True)
class Withdraw:
    """The wish ends because nobody waits any more; whoever does must ask again."""

    slot: int
    waiters: frozenset[int]


Action = StartLoad | CancelStarted | PromoteStarted | Publish | Refuse | Withdraw


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
