"""All control messages, and nothing else.

They travel as MessagePack over AF_UNIX SEQPACKET (see `control.py`), one message a datagram.  A
message that carries file descriptors names them in `fds`, in the order in which they are attached;
whoever receives it owns them.  Extents are `(offset, length)` in bytes inside an arena.

Who sends what:

    supervisor -> all        Start, Drain, Stop
    supervisor -> worker     LinkUp, LinkDown, VersionInfo, Placed, Expected, ActivationFailed,
                             Withdrawn, Forget, Chunks
    supervisor -> front end  LinkUp, LinkDown, Routes, AdminReply, Pressure, RegionsChanged, LogLevel,
                             TellCounts, Rehearse
    supervisor -> mover      Load, CancelLoad, PromoteLoad, Chunks
    supervisor -> packer     Pack
    all -> supervisor        Ready
    worker -> supervisor     Activate, BindFailed, Attaches, ChunksTaken
    front end -> supervisor  Admin, Counters, Rehearsed
    mover -> supervisor      LoadDone, LoadProgress, Populated, Chunks, ChunksTaken
    packer -> supervisor     PackProgress, PackDone
    supervisor -> fork server   Fork, Preload, Stop
    fork server -> supervisor   Ready, Unfit, Forked, Exited
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from overcommit.runtime.config import NEVER_NS, ModelConfig, Settings, Step, TensorSpec
from overcommit.runtime.parts import PartInfo

Kind = Literal["front_end", "worker", "mover", "packer"]
# Foreground: requests wait for it.  Prefetch: nobody does yet; it gives way to every foreground load.
Urgency = Literal["foreground", "prefetch"]
BATCH_UNIT: Final = 1_000_000
CANCELLED: Final = "cancelled"  # what LoadDone says of a load that CancelLoad ended
Extents = tuple[tuple[int, int], ...]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base: the class name is the tag on the wire."""


class Start(Message, frozen=True):
    """First message to every child.

    fds, worker: doorbell, supervisor_bell, residency, page (its own lease page + status), device
    fds, front end: doorbell, listen, ingress, egress; grpc where gRPC is served
    fds, mover: device, host (absent when there is no host tier)
    Where DEVICE is the memory of a GPU, `device` is no descriptor; its chunks come as `Chunks`.
    fds, packer: none
    """

    kind: Kind
    seat: int
    epoch: int
    settings: Settings
    device_bytes: int = 0
    cuda_device: int | None = None  # the GPU whose memory DEVICE is; None: host memory
    chunks_held: int = 0  # mover: so many of its chunks exist, and come first
    chunks_count: int = (
        0  # so many there will be; less than fit into `device_bytes` after a shortage
    )
    host_bytes: int = 0
    port: int = 0
    fds: tuple[str, ...] = ()


class Ready(Message, frozen=True):
    """The child has everything it needs and serves."""

    pid: int


class Drain(Message, frozen=True):
    """Front end: stop accepting, finish what is in flight, then exit 0."""

    timeout_s: float


class Stop(Message, frozen=True):
    """Exit 0 now."""


class LinkUp(Message, frozen=True):
    """A fresh link between one front-end and one worker incarnation.

    The link memfd holds the submission ring at offset 0 and the completion ring at
    `completion_offset`.  fds to the worker: link, peer_doorbell, ingress, egress.
    fds to the front end: link, peer_doorbell, page (the worker's status, to read post mortem).
    """

    seat: int  # of the peer
    epoch: int  # of the peer
    slot_count: int
    completion_offset: int
    payload_bytes: int = 0
    fds: tuple[str, ...] = ()


class LinkDown(Message, frozen=True):
    """The peer is dead and reaped: nothing can write to its memory any more."""

    seat: int
    epoch: int


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

    To be mapped meanwhile, not to be read: until Placed the state word is not RESIDENT.
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


class Pressure(Message, frozen=True):
    """Front end: what is wrong with the memory, in words for people; "": nothing."""

    thrashing: str = ""


class BindFailed(Message, frozen=True):
    """Worker: the program of this version cannot be loaded or bound; it is broken."""

    slot: int
    message: str


class Forget(Message, frozen=True):
    """The version was removed or unloaded: drop its program and mapping."""

    slot: int


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
    timeout_ms: int | None = None
    steps: tuple[Step, ...] = ()  # an ensemble's


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


class Routes(Message, frozen=True):
    """Changes of the routing table; long tables come as several messages, the last is `complete`."""

    upsert: tuple[Route, ...] = ()
    names: tuple[ModelNames, ...] = ()
    removed: tuple[int, ...] = ()
    complete: bool = True


class Admin(Message, frozen=True):
    """Front end: an operation that only the supervisor can do.

    operations: index, load, unload, models, model, metrics, ensure (pack this slot now), status,
    statistics, rollout, config, region_add, region_remove, trace, log
    """

    id: int
    operation: str
    arguments: dict[str, str | int | float | bool | None] = {}


class AdminReply(Message, frozen=True):
    """`status` is an HTTP status; `body` is JSON, or Prometheus text for `metrics`.

    A body too long for one datagram comes in parts, the last one with `more` False.
    """

    id: int
    status: int
    body: bytes
    more: bool = False


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a client's shared memory, by the name that requests call it: `/dev/shm` + `key`."""

    name: str
    key: str
    offset: int
    byte_size: int


class RegionsChanged(Message, frozen=True):
    """Front end: clients may use these regions from now on, and those not any more.

    A front end that is new hears of all that there are.
    """

    upsert: tuple[Region, ...] = ()
    removed: tuple[str, ...] = ()


class TellCounts(Message, frozen=True):
    """Front end: say now what you have counted, and that it was for this question."""

    id: int


class LogLevel(Message, frozen=True):
    """Front end: log from this level on (a name as `logging` has it)."""

    level: str


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


class Load(Message, frozen=True):
    """Mover: bring the payload of one file, an image's or a part's, to these places.

    source "disk": read into `host` if given and copy on to `device` if given, else read straight
    into `device`.  source "host": copy `host` to `device`.
    """

    job: int
    slot: int
    source: Literal["disk", "host"]
    path: str
    nbytes: int
    host: Extents | None = None
    device: Extents | None = None
    verify: bool = True
    urgency: Urgency = "foreground"


class CancelLoad(Message, frozen=True):
    """Mover: take no further step of this load.

    Its LoadDone comes when the last running step has ended: not ok, CANCELLED; or as it would have,
    if it was over.  A job that is not known is ignored: its LoadDone is on its way.
    """

    job: int


class PromoteLoad(Message, frozen=True):
    """Mover: requests wait for this load now, it is a foreground load from here on."""

    job: int


class LoadProgress(Message, frozen=True):
    """So many bytes of a long load are where they belong.

    Now and then; one may come after a later one, or after the LoadDone.
    """

    job: int
    done_bytes: int


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


class Chunks(Message, frozen=True):
    """Descriptors of chunks `first`, `first + 1` ... of a CUDA arena: made, or to take over.

    `count` is how many there will be in all: less than planned where the GPU's memory is short.  To
    who has more it says that the others have to be given back; without descriptors it says nothing else.
    fds: one a chunk
    """

    first: int
    count: int = 0  # 0: nothing is said
    fds: tuple[str, ...] = ()


class ChunksTaken(Message, frozen=True):
    """So many chunks, from the first on, are here; send the next ones when there are any."""

    count: int


class Pack(Message, frozen=True):
    """Packer: make the image of one model version."""

    job: int
    name: str
    version: str
    folder: str
    config: ModelConfig
    cache_dir: str
    allow_code: bool


class PackProgress(Message, frozen=True):
    """How far the job is, in bytes of image."""

    job: int
    done: int
    total: int


class PackDone(Message, frozen=True):
    """The image exists, or why it does not."""

    job: int
    ok: bool
    message: str = ""
    image_path: str = ""
    content_key: str = ""
    program_key: str = ""
    nbytes: int = 0
    parts: tuple[PartInfo, ...] = ()  # of these bytes, what other images may share
    engine: str = ""
    config: ModelConfig = ModelConfig()


class Fork(Message, frozen=True):
    """Fork server: make a child that runs `kind` on the control socket that comes along.

    fds: control
    """

    kind: Kind
    ticket: int
    fds: tuple[str, ...] = ()


class Forked(Message, frozen=True):
    """The child exists.  fds: pidfd"""

    ticket: int
    pid: int
    fds: tuple[str, ...] = ()


class Exited(Message, frozen=True):
    """A forked child was reaped; `status` is as from waitpid."""

    pid: int
    status: int


class Preload(Message, frozen=True):
    """Fork server: import these modules too, for the children to come."""

    modules: tuple[str, ...]


class Unfit(Message, frozen=True):
    """The fork server's self-check failed: start children by spawn instead."""

    reason: str


AnyMessage = (
    Start
    | Ready
    | Drain
    | Stop
    | LinkUp
    | LinkDown
    | VersionInfo
    | Activate
    | Placed
    | Coming
    | Expected
    | ActivationFailed
    | Withdrawn
    | Pressure
    | BindFailed
    | Attaches
    | Forget
    | Rehearse
    | Rehearsed
    | Routes
    | Admin
    | AdminReply
    | Counters
    | RegionsChanged
    | LogLevel
    | TellCounts
    | Load
    | CancelLoad
    | PromoteLoad
    | LoadProgress
    | LoadDone
    | Populated
    | Chunks
    | ChunksTaken
    | Pack
    | PackProgress
    | PackDone
    | Fork
    | Forked
    | Exited
    | Preload
    | Unfit
)
