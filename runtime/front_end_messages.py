"""Control messages between the supervisor and front ends: what names mean, what was counted.

Invariants
 1. What a front end is told of routes, names, regions and the log level holds until it is told
    otherwise; one that is new is told all of it.
 2. Counts of versions travel as increments (`ledger`), those of a front end as totals.
 3. Each Admin is answered by AdminReplies of its id, the last one with `more` False.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from overcommit.runtime.config import QUEUE_SIZE_MAX, Step, TensorSpec
from overcommit.runtime.messages import Message

BATCH_UNIT: Final = 1_000_000


class Pressure(Message, frozen=True):
    """Front end: what is wrong with the memory, in words for people; "": nothing."""

    thrashing: str = ""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """What a front end must know of one version."""

    slot: int
    name: str
    version: str
    state: Literal["ready", "packing", "unloaded", "unavailable"]
    reason: str = ""
    platform: str = ""
    labels: tuple[
        tuple[str, ...], ...
    ] = ()  # of each output, where the names of its classes may be
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int = 0
    max_queue_size: int = QUEUE_SIZE_MAX  # of all levels together
    timeout_ms: int | None = None
    steps: tuple[Step, ...] = ()  # an ensemble's
    sequence: bool = False  # its requests are of sequences
    priority_levels: int = 0  # that its requests may have
    adapts: bool = False  # its one input is taken under any name and as any kind of number
    called: str = ""  # what its files call the version, where that is no whole number


class ModelNames(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model's name means, besides its highest version; all empty: nothing else."""

    name: str
    aliases: dict[str, str] = {}  # further names -> a version, or ""
    weights: dict[str, float] = {}  # version -> percent of the requests that name none
    held: tuple[str, ...] = ()  # versions that are on trial: only who names them gets them


class Rehearse(Message, frozen=True):
    """Front end: send a request of zeros to this version, which no name may mean yet."""

    route: Route


class Rehearsed(Message, frozen=True):
    """How it went; `retry`: that says nothing of the version."""

    slot: int
    ok: bool
    message: str = ""
    retry: bool = False


class LinkBroken(Message, frozen=True):
    """Front end: this worker incarnation broke the rules of its ring; it gets no more requests."""

    seat: int
    epoch: int


class Routes(Message, frozen=True):
    """Changes of the routing table; long tables come as several messages, the last is `complete`."""

    upsert: tuple[Route, ...] = ()
    names: tuple[ModelNames, ...] = ()
    removed: tuple[int, ...] = ()
    complete: bool = True


class Homes(Message, frozen=True):
    """Front end: which sites serve these versions, by slot; sent where a server has several."""

    homes: dict[int, tuple[int, ...]]


class Occupied(msgspec.Struct, frozen=True, array_like=True):
    """This worker incarnation is in one batch for long, of the version in this slot (None: in none)."""

    seat: int
    epoch: int
    slot: int | None


class SeatNews(Message, frozen=True):
    """Front end: what is special about workers' seats from now on; all of it."""

    broken: tuple[int, ...] = ()  # nobody will sit there again
    occupied: tuple[Occupied, ...] = ()


class Admin(Message, frozen=True):
    """Front end: an operation that only the supervisor can do.

    operations: index, load, unload, models, model, metrics, ensure (pack this slot now), status,
    statistics, rollout, config, region_add, region_remove, trace, log, load_begin (a folder for a client's
    files), load_override, load_end (nothing comes of that folder)
    """

    id: int
    operation: str
    arguments: dict[str, str | int | float | bool | None] = msgspec.field(default_factory=dict)


class AdminReply(Message, frozen=True):
    """`status` is an HTTP status; `body` is JSON, or Prometheus text for `metrics`.

    A body too long for one datagram comes in parts, the last one with `more` False.
    """

    id: int
    status: int
    body: bytes
    more: bool = False


class Region(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of a client's shared memory, by the name that requests call it: `/dev/shm` + `key`.

    A leased one lasts as long as somebody holds a lock on the file.
    """

    name: str
    key: str
    offset: int
    byte_size: int
    leased: bool = False


class RegionsChanged(Message, frozen=True):
    """Front end: clients may use these regions from now on, and those not any more.

    A front end that is new hears of all that there are.
    """

    upsert: tuple[Region, ...] = ()
    removed: tuple[str, ...] = ()


class TellCounts(Message, frozen=True):
    """Front end: say now what you have counted, and that it was for this question."""

    id: int


class AskUsed(Message, frozen=True):
    """Front end: for which of these slots, to which no route leads any more, are there requests still?"""

    id: int
    slots: tuple[int, ...]


class Used(Message, frozen=True):
    """Front end: those of the slots that AskUsed of this id named for which it has requests."""

    id: int
    slots: tuple[int, ...] = ()


class ModelCounters(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a front end has counted for one version since it said so last; at most 100 bytes long.

    Times are sums over requests; those of a batch count for each request in it.
    """

    slot: int
    success: int = 0
    failure: int = 0
    queue_ns: int = 0
    compute_ns: int = 0  # from the batch's start to its end, with what follows:
    input_ns: int = 0  # gathering
    output_ns: int = 0  # splitting
    request_ns: int = 0
    failure_ns: int = 0  # of request_ns, those that failed
    inferences: int = 0  # rows computed
    executions: int = 0  # batches of this version, or its parts of batches across versions
    batches: int = 0  # BATCH_UNIT for each; the part of it, where versions share one


class BatchCounters(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Batches of one version and size, since a front end said so last; at most 45 bytes long."""

    slot: int
    rows: int
    executions: int
    input_ns: int
    infer_ns: int
    output_ns: int


class Counters(Message, frozen=True):
    """Totals so far of a front end, and increments of versions; sent every second, and before each
    operation that shows them.  Many versions come in several messages.
    """

    requests: int = 0
    errors: int = 0
    in_flight: int = 0
    blocks_used: int = 0
    late_completions: int = 0
    retries: int = 0
    models: tuple[ModelCounters, ...] = ()
    batches: tuple[BatchCounters, ...] = ()
    told: int = 0  # with this, all is said that TellCounts of this id asked for


FrontEndMessage = (
    Pressure
    | Rehearse
    | Rehearsed
    | LinkBroken
    | Routes
    | Homes
    | Admin
    | AdminReply
    | RegionsChanged
    | SeatNews
    | TellCounts
    | AskUsed
    | Used
    | Counters
)
