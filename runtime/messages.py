"""Control messages: what they are, who sends what, and those between the supervisor and every child.

They travel as MessagePack over AF_UNIX SEQPACKET (see `control.py`), one message a datagram.  A
message that carries file descriptors names them in `fds`, in the order in which they are attached;
whoever receives it owns them.

Who sends what, by the room that has it:

    here                     supervisor -> all: Start, Drain, Stop; all -> supervisor: Ready
                             supervisor -> worker, front end: LinkUp, LinkDown
                             supervisor -> worker, front end, mover, packer: LogLevel
                             supervisor <-> mover, supervisor -> worker: Chunks
                             worker, mover -> supervisor: ChunksTaken
                             supervisor -> mover: MakeChunks
                             mover -> supervisor -> worker: ArenaMade
                             supervisor -> fork server: Fork, Preload, Stop
                             fork server -> supervisor: Ready, Unfit, Forked, Unforked, Exited
    `worker_messages`        supervisor -> worker: VersionInfo, Placed, Coming, Expected,
                             ActivationFailed, Withdrawn, Forget
                             worker -> supervisor: Activate, BindFailed, Attaches
    `front_end_messages`     supervisor -> front end: Routes, Homes, AdminReply, Pressure,
                             RegionsChanged, SeatNews, TellCounts, AskUsed, Rehearse
                             front end -> supervisor: Admin, Counters, Used, Rehearsed
    `mover_messages`         supervisor -> mover: Load, CancelLoad, PromoteLoad, WorkerBell
                             mover -> supervisor: LoadDone, Populated
    `packer_messages`        supervisor -> packer: Pack; packer -> supervisor: PackProgress, PackDone

Each room ends with the union of its messages; `control.py` decodes them all.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from overcommit.runtime.config import Settings
from overcommit.runtime.gpu import Shares

Kind = Literal["front_end", "worker", "mover", "packer"]
Extents = tuple[tuple[int, int], ...]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base: the class name is the tag on the wire."""


class Enclosed(Message, frozen=True):
    """`control` alone knows this one: a message of so many bytes lies in the first descriptor, a memfd."""

    nbytes: int


class Start(Message, frozen=True):
    """First message to every child.

    fds, worker: doorbell, supervisor_bell, residency, page (its own lease page + status), device
    fds, front end: doorbell, listen, ingress, egress; grpc where gRPC is served
    fds, mover: bell, device, residency, host (absent when there is no host tier)
    Where DEVICE is the memory of a GPU, the mover has no `residency`, and `device` is no descriptor; its
    chunks come as `Chunks`.
    fds, packer: none
    """

    kind: Kind
    seat: int
    epoch: int
    settings: Settings
    site: int = 0  # mover, worker: the device that it serves ...
    sites: int = 1  # ... of so many
    device_bytes: int = 0
    cuda_device: int | None = None  # the GPU whose memory DEVICE is; None: host memory
    shares: Shares = "vmm"  # how processes get at its memory
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


class LogLevel(Message, frozen=True):
    """Log from this level on (a name as `logging` has it)."""

    level: str


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
    site: int = 0  # to the front end: the worker's
    fds: tuple[str, ...] = ()


class LinkDown(Message, frozen=True):
    """The peer is dead and reaped: nothing can write to its memory any more."""

    seat: int
    epoch: int


class Chunks(Message, frozen=True):
    """Descriptors of chunks `first`, `first + 1` ... of a CUDA arena: made, or to take over.

    `count` is how many there will be in all: less than planned where the GPU's memory is short, more again
    when it is not.  To who has more it says that the others have to be given back; without descriptors it
    says nothing else.  Each is answered by one ChunksTaken, but from a mover while it makes chunks.
    fds: one a chunk
    """

    first: int
    count: int = 0  # 0: nothing is said
    fds: tuple[str, ...] = ()


class MakeChunks(Message, frozen=True):
    """Mover: there will be so many chunks, make what is missing; answered by Chunks."""

    count: int


class ChunksTaken(Message, frozen=True):
    """So many chunks, from the first on, are here; send the next ones when there are any."""

    count: int


class ArenaMade(Message, frozen=True):
    """DEVICE is one allocation, and this is its CUDA IPC handle; it is gone when the mover is."""

    handle: bytes


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


class Unforked(Message, frozen=True):
    """The child that was asked for does not exist: the machine has no process or descriptor for it."""

    ticket: int
    reason: str


class Exited(Message, frozen=True):
    """A forked child has ended, and is reaped next; `code` is its exit status, a signal negative."""

    pid: int
    code: int


class Preload(Message, frozen=True):
    """Fork server: import these modules too, for the children to come."""

    modules: tuple[str, ...]


class Unfit(Message, frozen=True):
    """The fork server's self-check failed: start children by spawn instead."""

    reason: str


ProcessMessage = (
    Enclosed
    | Start
    | Ready
    | LogLevel
    | Drain
    | Stop
    | LinkUp
    | LinkDown
    | Chunks
    | MakeChunks
    | ChunksTaken
    | ArenaMade
    | Fork
    | Forked
    | Unforked
    | Exited
    | Preload
    | Unfit
)
