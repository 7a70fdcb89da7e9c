"""Whether DEVICE can be a GPU's memory here, and how a process gets at it.

    usable? --[probe: a chunk is made, exported, imported and mapped]--> "" | why not

The probe is for a process of its own: the supervisor has no CUDA, and a driver that was called cannot
be forgotten.  What it finds missing (a driver before VMM, WSL and some virtual GPUs without exported
descriptors, bindings that are not installed) is a sentence for the log.  What lacks VMM or descriptors may
still have CUDA IPC: then DEVICE is one allocation, see `ipc_arena`.

Invariants
 1. After `probe` nothing that it made is left, whether it went well or not.
 2. A mover or worker that was opened has every chunk, and the context in the calling thread.

Called by the mover and by workers before they are ready; `probe` by who chooses the tier.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

from overcommit.runtime.chunk_exchange import Receive, Send, make_chunks, take_chunks
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import SMALL_CHUNK_BYTES
from overcommit.runtime.cuda_arena import CudaArena, CudaRanges
from overcommit.runtime.cuda_copy import CudaCopier
from overcommit.runtime.driver import Attribute, Driver, DriverError
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.ipc_arena import IpcRanges
from overcommit.runtime.messages import ArenaMade, ChunksTaken, Stop
from overcommit.runtime.numa import move_near
from overcommit.runtime.places import Base

_NEEDED = (
    (Attribute.VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "no virtual memory management"),
    (Attribute.HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, "no export as file descriptors"),
)


class MoverTier(NamedTuple):
    """DEVICE as the mover has it.

    `shrink(count)` and `grow(count)`: there are so many chunks from now on; return the bytes that there are.
    """

    device: Base
    copier: CudaCopier
    shrink: Callable[[int], int]
    grow: Callable[[int], int]


def probe(driver: Driver, device: int) -> str:
    """Return why this GPU's memory cannot be DEVICE; "" if it can."""
    try:
        driver.init()
        count = driver.device_count()
        if not 0 <= device < count:
            return f"there is no GPU {device}: the driver shows {count}"
        for attribute, lack in _NEEDED:
            if not driver.device_attribute(attribute, device):
                return f"GPU {device} has {lack}"
        granularity = driver.mem_granularity(device)
        if SMALL_CHUNK_BYTES % granularity:
            return f"GPU {device} has pages of {granularity} bytes, chunks are {SMALL_CHUNK_BYTES}"
        _try_one(driver, device)
    except DriverError as error:
        return f"GPU {device} cannot be used: {error.message}"
    return ""


def _try_one(driver: Driver, device: int) -> None:
    """Send one chunk all the way round.  Raises DriverError."""
    with contextlib.ExitStack() as ends:
        made = driver.mem_create(SMALL_CHUNK_BYTES, device)
        ends.callback(driver.mem_release, made)
        fd = driver.mem_export(made)
        ends.callback(os.close, fd)
        taken = driver.mem_import(fd)
        ends.callback(driver.mem_release, taken)
        address = driver.address_reserve(SMALL_CHUNK_BYTES, SMALL_CHUNK_BYTES)
        ends.callback(driver.address_free, address, SMALL_CHUNK_BYTES)
        driver.mem_map(address, SMALL_CHUNK_BYTES, taken)
        ends.callback(driver.mem_unmap, address, SMALL_CHUNK_BYTES)
        driver.mem_set_access(address, SMALL_CHUNK_BYTES, device, False)


def probe_ipc(driver: Driver, device: int, open_elsewhere: Callable[[bytes], str]) -> str:
    """Return why an allocation cannot be shared by CUDA IPC; "" if it can.

    `open_elsewhere(handle)` opens it in another process, and says what was in the way.
    """
    try:
        _enter(driver, device)
        with contextlib.ExitStack() as ends:
            address = driver.mem_alloc(SMALL_CHUNK_BYTES)
            ends.callback(driver.mem_free, address)
            return open_elsewhere(driver.ipc_export(address))
    except DriverError as error:
        return f"CUDA IPC cannot be used: {error.message}"


def try_open(driver: Driver, device: int, handle: bytes) -> str:
    """Open and close what another process has exported; return what was in the way."""
    try:
        _enter(driver, device)
        driver.ipc_close(driver.ipc_open(handle))
    except DriverError as error:
        return f"CUDA IPC cannot be used: {error.message}"
    return ""


def _enter(driver: Driver, device: int) -> None:
    driver.init()
    driver.context_set_current(driver.primary_context_retain(device))


def open_for_mover(
    driver: Driver,
    device: int,
    nbytes: int,
    held: int,
    count: int,
    host_address: int,
    receive: Receive,
    send: Send,
) -> MoverTier | None:
    """Take over the `held` chunks that exist, make the others up to `count`, map all.

    None: told to stop.  `nbytes` is what the layout of the chunks follows from.

    Raises DriverError; then this process has to end, and its successor finds what it made.
    """
    _enter(driver, device)
    move_near(driver.device_bus_id(device))
    chunks = Chunks(driver, ChunkTable(nbytes), device)
    chunks.limit = count
    if not take_chunks(chunks, held, receive, send):
        return None
    make_chunks(chunks, send)
    arena = CudaArena(chunks)
    base = Base("device", arena.map_all(True), arena.nbytes)

    def shrink(count: int) -> int:
        arena.shrink(count)
        send(ChunksTaken(count=len(chunks)), ())
        return arena.nbytes

    def grow(count: int) -> int:
        chunks.resize(count)
        make_chunks(chunks, send, arena.map_more)
        return arena.nbytes

    return MoverTier(base, CudaCopier(driver, device, host_address), shrink, grow)


def open_ipc_for_mover(
    driver: Driver, device: int, nbytes: int, host_address: int, send: Send
) -> MoverTier:
    """Allocate DEVICE and say how to open it.  Raises DriverError."""
    _enter(driver, device)
    move_near(driver.device_bus_id(device))
    address = driver.mem_alloc(nbytes)
    send(ArenaMade(handle=driver.ipc_export(address)), ())
    base = Base("device", address, nbytes)
    copier = CudaCopier(driver, device, host_address)
    return MoverTier(base, copier, one_allocation, one_allocation)


def open_ipc_for_worker(
    driver: Driver, device: int, nbytes: int, receive: Receive
) -> IpcRanges | None:
    """Open DEVICE as soon as it is there; None: told to stop.  Raises DriverError, ProtocolError."""
    message, _ = receive()
    if isinstance(message, Stop):
        return None
    if not isinstance(message, ArenaMade):
        raise ProtocolError(f"the arena was expected, {message} came")
    _enter(driver, device)
    return IpcRanges(driver, device, message.handle, nbytes)


def one_allocation(count: int) -> int:
    """Raise ProtocolError: there are no chunks."""
    raise ProtocolError("DEVICE is not made of chunks here")


def open_for_worker(
    driver: Driver, device: int, nbytes: int, count: int, receive: Receive, send: Send
) -> CudaRanges | None:
    """Take over every chunk, `count` or less; None: told to stop.  Raises DriverError."""
    _enter(driver, device)
    chunks = Chunks(driver, ChunkTable(nbytes), device)
    chunks.limit = count
    if not take_chunks(chunks, count, receive, send):
        return None
    return CudaRanges(chunks)
