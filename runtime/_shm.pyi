"""Shared-memory mechanics: rings, doorbells, residency and lease words, fixed mappings.

No policy.  Layouts are declared in `_shm.c` and checked there; the constants come from it.
Buffers are writable `mmap.mmap` objects (or read-only ones where said) that the object keeps alive.
"""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from _typeshed import ReadableBuffer, WriteableBuffer

LINE: Final[int]  # 128
RING_HEADER_BYTES: Final[int]  # 512
SLOT_BYTES: Final[int]  # 64
STATUS_BYTES: Final[int]  # bytes of a worker's status page, a multiple of 4096
STATUS_BATCH_MAX: Final[int]  # 64
TABLE_HEADER_BYTES: Final[int]
TABLE_ENTRY_BYTES: Final[int]  # 8
LEASE_ENTRY_BYTES: Final[int]  # 32

# submission kinds
SUBMIT: Final[int]
CANCEL: Final[int]
# completion status
OK: Final[int]
MORE: Final[int]
EXPIRED: Final[int]
OVERLOADED: Final[int]
CANCELLED: Final[int]
TOO_LARGE: Final[int]  # detail = bytes of egress needed
MODEL_ERROR: Final[int]  # the egress block holds a UTF-8 message of out_length bytes
NOT_RESIDENT: Final[int]  # activation failed; message in the egress block as above
BAD_REQUEST: Final[int]  # message in the egress block as above
# residency states
ABSENT: Final[int]
LOADING: Final[int]
RESIDENT: Final[int]
EVICTING: Final[int]
# status phases
PHASE_IDLE: Final[int]
PHASE_LOAD: Final[int]
PHASE_COPY_IN: Final[int]
PHASE_COMPUTE: Final[int]
PHASE_COPY_OUT: Final[int]
# bits that wait() returns
DOORBELL: Final[int]  # 1
CONTROL: Final[int]  # 2

# (request_id, deadline_ns, submitted_ns, in_offset, out_offset, in_length, out_capacity, kind, model, flags)
Submission: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int]
# (request_id, taken_ns, started_ns, finished_ns, out_length, status, batch_size, detail)
Completion: TypeAlias = tuple[int, int, int, int, int, int, int, int]

class RingCorrupt(RuntimeError):
    """The peer broke the ring's rules: wrong magic, size, epoch, sequence or counter."""

def ring_bytes(slot_count: int) -> int:
    """Bytes of one ring, a multiple of 4096."""

def create_ring(
    buffer: WriteableBuffer,
    offset: int,
    slot_count: int,
    slot_kind: int,  # 1 submission, 2 completion
    producer_epoch: int,
    consumer_epoch: int,
) -> None:
    """Write the header of a fresh ring; supervisor only, before the fd is sent."""

class SubmissionRing:
    """One side of a submission ring.  ValueError / RingCorrupt if the header is not this ring's."""

    def __init__(
        self,
        buffer: WriteableBuffer,
        offset: int,
        producer: bool,
        producer_epoch: int,
        consumer_epoch: int,
    ) -> None: ...
    def push(
        self,
        request_id: int,
        deadline_ns: int,
        in_offset: int,
        out_offset: int,
        in_length: int,
        out_capacity: int,
        kind: int,
        model: int,
        flags: int,
    ) -> bool:
        """Publish one submission (`submitted_ns` is filled in); False when the ring is full."""
    def pop(self, limit: int) -> list[Submission]:
        """Take up to `limit`; raises RingCorrupt."""
    def peek(self) -> int:
        """Slot of the version that the next submission is for, which stays there; -1: there is none."""
    def must_wake(self) -> bool:
        """Full fence, then: does the consumer sleep?  Producer, after push."""
    def depth(self) -> int: ...
    def tail(self) -> int:
        """Slots ever published (acquire)."""
    def head(self) -> int:
        """Slots ever consumed (acquire)."""
    def slot_count(self) -> int: ...

class CompletionRing:
    def __init__(
        self,
        buffer: WriteableBuffer,
        offset: int,
        producer: bool,
        producer_epoch: int,
        consumer_epoch: int,
    ) -> None: ...
    def push(
        self,
        request_id: int,
        taken_ns: int,
        started_ns: int,
        finished_ns: int,
        out_length: int,
        status: int,
        batch_size: int,
        detail: int,
    ) -> bool: ...
    def pop(self, limit: int) -> list[Completion]: ...
    def must_wake(self) -> bool: ...
    def depth(self) -> int: ...
    def tail(self) -> int: ...
    def head(self) -> int: ...
    def slot_count(self) -> int: ...

Ring: TypeAlias = SubmissionRing | CompletionRing

def arm(rings: Sequence[Ring]) -> bool:
    """Consumer: arm all, full fence, look again.  True: all empty, safe to sleep; False: disarmed."""

def disarm(rings: Sequence[Ring]) -> None: ...
def spin(rings: Sequence[Ring], spin_ns: int) -> bool:
    """Poll without the GIL for up to `spin_ns`; True as soon as a ring has something."""

def default_spin_ns() -> int:
    """0 where there are fewer than 4 CPUs to run on, else 20 000."""

def wait(doorbell_fd: int, control_fd: int, timeout_ns: int) -> int:
    """Sleep in ppoll without the GIL; clears the doorbell.  timeout < 0: for ever.  Returns bits."""

class StatusPage:
    """A worker's status: written by it alone, read by others as a hint, after its death as fact."""

    def __init__(self, buffer: ReadableBuffer, offset: int, writable: bool) -> None: ...
    def begin(
        self, model: int, phase: int, started_ns: int, request_ids: Sequence[int]
    ) -> None: ...
    def phase(self, phase: int) -> None: ...
    def end(self) -> None: ...
    def heartbeat(self, now_ns: int) -> None: ...
    def read(self) -> tuple[int, int, int, int, list[int]]:
        """(heartbeat_ns, batch_started_ns, phase, model, request ids of the batch)"""

def table_bytes(count: int) -> int: ...
def lease_page_bytes(count: int) -> int:
    """Lease entries only; the status page lies before them at offset 0 of the worker's memfd."""

class ResidencyTable:
    """State and generation per version slot, written by the supervisor, or the mover (`publishing`)."""

    def __init__(self, buffer: ReadableBuffer, offset: int, count: int, writable: bool) -> None: ...
    def get(self, slot: int) -> tuple[int, int]:
        """(state, generation)"""
    def set(self, slot: int, state: int, generation: int) -> None: ...
    def set_hungry(self, hungry: bool) -> None:
        """Supervisor: somebody waits for room; workers ring my bell when they drop a lease."""
    def hungry(self) -> bool:
        """Full fence, then the word.  Worker, after drop()."""

class LeasePage:
    """Leases and use counters of one worker: written by it alone."""

    def __init__(self, buffer: ReadableBuffer, offset: int, count: int, writable: bool) -> None: ...
    def take(self, table: ResidencyTable, slot: int, generation: int) -> bool:
        """Store 1, full fence, check RESIDENT and generation; else take it back and return False."""
    def take_all(
        self, table: ResidencyTable, slots: list[int], generations: list[int]
    ) -> list[int]:
        """`take` for each of up to STATUS_BATCH_MAX slots, with one fence; which were refused, by index."""
    def drop(self, slot: int) -> None: ...
    def drop_all(self, slots: list[int]) -> None: ...
    def set_waiting(self, slot: int, requests: int) -> None: ...
    def add_uses(self, slot: int, requests: int, now_ns: int) -> None: ...
    def add_all_uses(self, slots: list[int], requests: list[int], now_ns: int) -> None:
        """`add_uses` for each of these, in one call."""
    def read(self, slot: int) -> tuple[int, int, int, int]:
        """(lease, waiting, uses, last_used_ns)"""

def try_evict(
    table: ResidencyTable, pages: Sequence[LeasePage], slot: int, generation: int
) -> bool:
    """Store EVICTING, full fence, read every lease; put RESIDENT back and return False if one is held."""

# --- memory -------------------------------------------------------------------------------------
def reserve(nbytes: int) -> int:
    """Reserve address space (PROT_NONE); returns the address, 2 MiB aligned."""

def map_fixed(
    address: int, fd: int, offset: int, nbytes: int, writable: bool, populate: bool
) -> None:
    """Map a piece of `fd` over a reserved range (MAP_SHARED | MAP_FIXED)."""

def unmap_fixed(address: int, nbytes: int) -> None:
    """Put PROT_NONE back over a piece of a reserved range; the reservation stays."""

def copy_pieces(into: WriteableBuffer, stride: int, nbytes: int, addresses: Sequence[int]) -> None:
    """Copy `nbytes` from each of these addresses into a buffer, `stride` apart.

    The addresses must be mapped.  Raises ValueError when the buffer is too short.
    """

def move_fixed(source: int, destination: int, nbytes: int) -> None:
    """Move a mapping, with its page tables, into a reserved range; PROT_NONE stays behind.

    Raises OSError, and then nothing was moved, unless memory for page tables is short.
    """

def release(address: int, nbytes: int) -> None:
    """Give the address space back."""

def prefetch(rows: list[Submission], column: int, lists: tuple[list[Any], ...]) -> None:
    """Have what the lists hold at the indexes in a column on its way into the cache.

    What it refers to comes along.  An index that a list has not is passed over.
    """

def populate(address: int, nbytes: int, writable: bool) -> None:
    """MADV_POPULATE_READ / _WRITE without the GIL; OSError where memory is short."""

def view(address: int, nbytes: int, writable: bool) -> memoryview:
    """A view of raw memory; the caller keeps the mapping alive."""

def copy(destination: int, source: int, nbytes: int) -> None:
    """memcpy without the GIL; long copies go past the cache."""

def set_parent_death_signal(signal_number: int) -> None:
    """PR_SET_PDEATHSIG for the calling process."""
