"""A CUDA driver for tests: the calls of `driver.py`, their rules, and memory that is real.

`FakeGpu` is the machine's devices, shared by all who use them; a `FakeDriver` is one process's driver.
A memory object is a memfd, an exported descriptor a descriptor of it, an address one of this very
process: so descriptors can be passed on and imported elsewhere (in another process too), what nobody
holds any more is gone by the kernel's own count, and what may not be touched faults.  Two things differ
from a GPU, both on purpose: a CPU can read device addresses, and everything asynchronous waits until
somebody synchronises or queries.

Failures on demand: `fail_at(n, result)` makes the n-th call from now fail, `die_at(n)` ends the
"process" before it makes that call, raising `Died`; `die()` does so now.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import itertools
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from overcommit.runtime import _shm
from overcommit.runtime.config import MIB
from overcommit.runtime.driver import (
    Attribute,
    Context,
    DriverError,
    Event,
    MemoryHandle,
    Result,
    Stream,
)

if TYPE_CHECKING:
    from fake_backend import FakeBackend
    from fake_unpacker import FakeUnpacker

GRANULARITY = 2 * MIB
OPEN_COPIES_MAX = 1000  # a stream's queue; a copy beyond would block


class Died(BaseException):
    """The process that made this call is dead."""


class FakeGpu:
    """Devices of one size, and what is allocated there.  None reaches another's memory.

    `is_lost(device)`: whether it is off the bus; every call that needs it fails then, for good.
    """

    def __init__(
        self,
        total_bytes: int = 1 << 40,
        *,
        count: int = 1,
        has_vmm: bool = True,
        has_fd_export: bool = True,
        has_ipc: bool = True,
        is_lost: Callable[[int], bool] = lambda device: False,
    ) -> None:
        self.total_bytes = total_bytes
        self.count = count
        self.is_lost = is_lost
        self.has_ipc = has_ipc
        self.attributes = {
            Attribute.VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: int(has_vmm),
            Attribute.HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: int(has_fd_export),
            Attribute.CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: 1,
            Attribute.READ_ONLY_HOST_REGISTER_SUPPORTED: 1,
        }
        self.inodes: dict[int, int] = {}  # of every object that was ever made here -> bytes
        self.places: dict[int, int] = {}  # and the device that it lies on
        self.drivers: list[FakeDriver] = []
        self.export_numbers = itertools.count(10_000)

    def live(self) -> set[int]:
        """Inodes of the objects that a handle, a mapping or a descriptor in this process keeps."""
        kept = {_inode(memory.fd) for driver in self.drivers for memory in driver.memories()}
        for name in os.listdir("/proc/self/fd"):
            # By number alone a pipe, a socket or a file may pass for an object.
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:fake-gpu-"):
                    kept.add(_inode(int(name)))
        return kept & self.inodes.keys()

    def used_bytes(self, device: int | None = None) -> int:
        """Bytes of the objects that live, on a device or on all."""
        return sum(
            self.inodes[inode]
            for inode in self.live()
            if device is None or self.places[inode] == device
        )

    def note(self, inode: int, nbytes: int, device: int) -> None:
        """An object was made, or was heard of first."""
        self.inodes[inode] = nbytes
        self.places[inode] = device


def _is_writable(address: int) -> bool:
    """Whether this process may write there; what is not mapped at all is not the question."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, _, rest = line.partition("-")
            end, permissions = rest.split(maxsplit=2)[:2]
            if int(begin, 16) <= address < int(end, 16):
                return permissions[1] == "w"
    return True


def _inode(fd: int) -> int:
    return os.fstat(fd).st_ino


@dataclass(slots=True, eq=False)
class _Memory:
    """A handle's or mapping's hold on a memory object."""

    fd: int
    nbytes: int
    device: int = 0


@dataclass(slots=True)
class _Mapping:
    memory: _Memory
    writable: bool | None = None  # None: no access was set


@dataclass(slots=True)
class _Stream:
    is_urgent: bool
    queue: collections.deque[Callable[[], None]] = field(default_factory=collections.deque)
    done: int = 0
    asked: int = 0


class FakeDriver:
    """`Driver` of one process."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.calls: list[str] = []
        self.copies: list[tuple[int, int, int]] = []  # (target, source, bytes), as asked for
        self.registered: dict[int, int] = {}
        self.mapped_host: dict[int, int] = {}  # of these, what kernels reach
        self.open_max: dict[int, int] = {}  # by stream, the most that was ever queued
        self.has_unpacker = True
        self._plain: dict[int, int] = {}  # what cuMemAlloc gave, which nobody else can get at
        self.may_finish = threading.Event()  # cleared: who waits for an event goes on waiting
        self.may_finish.set()
        self.is_dead = False
        self._lock = threading.RLock()
        self._numbers = itertools.count(0x1000)
        self._is_init = False
        self._contexts: set[int] = set()
        self._current = threading.local()
        self._handles: dict[int, _Memory] = {}
        self._ranges: dict[int, int] = {}
        self._mappings: dict[int, _Mapping] = {}  # by address
        self._owned: set[int] = set()  # addresses of what cuMemAlloc gave ...
        self._opened: dict[int, bytes] = {}  # ... and of what was opened
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, tuple[_Stream, int] | None] = {}
        self._fail: dict[int, Result] = {}
        self._die_at: int | None = None
        self._sticky: Result | None = None
        self._exports: list[tuple[int, int]] = []  # descriptors given out, and their inodes
        gpu.drivers.append(self)

    # --- what tests ask -------------------------------------------------------------------------
    def memories(self) -> list[_Memory]:
        """Everything of this process that keeps an object alive, but descriptors."""
        return [*self._handles.values(), *(mapping.memory for mapping in self._mappings.values())]

    def mapped(self) -> dict[int, int]:
        """Address -> inode of the object there."""
        return {at: _inode(mapping.memory.fd) for at, mapping in self._mappings.items()}

    @property
    def handle_count(self) -> int:
        """Handles that were not released."""
        return len(self._handles)

    @property
    def reserved_bytes(self) -> int:
        """Addresses that were not freed."""
        return sum(self._ranges.values())

    def fail_at(self, number: int, result: Result = Result.OUT_OF_MEMORY) -> None:
        """Let the call `number` from now, 1 the next, fail."""
        self._fail[len(self.calls) + number] = result

    def die_at(self, number: int) -> None:
        """End the process before its call `number` from now, 1 the next."""
        self._die_at = len(self.calls) + number

    def die(self, *, unwinds: bool = False) -> None:
        """End the process: its handles, mappings and unfinished copies go, and its descriptors.

        `unwinds`: `Died` goes up through the code under test now, which closes its descriptors.
        """
        with self._lock:
            self.is_dead = True
            for address in list(self._mappings):
                self._drop_mapping(address)
            for address, nbytes in self._ranges.items():
                _shm.release(address, nbytes)
            for memory in self._handles.values():
                os.close(memory.fd)
            for fd, inode in () if unwinds else self._exports:
                with contextlib.suppress(OSError):
                    if _inode(fd) == inode:
                        os.close(fd)
            self._ranges.clear()
            self._owned.clear()
            self._opened.clear()
            self._handles.clear()
            self._streams.clear()
            self.registered.clear()
            self._exports.clear()

    # --- inside ---------------------------------------------------------------------------------
    def _enter(self, call: str, *, needs_context: bool = False) -> None:
        if self.is_dead:
            raise Died(call)
        self.calls.append(call)
        if self._die_at is not None and len(self.calls) >= self._die_at:
            self.die(unwinds=True)
            raise Died(call)
        result = self._fail.pop(len(self.calls), None)
        if result is not None:
            raise DriverError(call, result)
        if not self._is_init and call != "cuInit":
            raise DriverError(call, Result.NOT_INITIALIZED)
        if self._sticky is not None:
            raise DriverError(call, self._sticky)
        context = getattr(self._current, "context", None)
        if needs_context and context not in self._contexts:
            raise DriverError(call, Result.INVALID_CONTEXT)
        if context is not None and self.gpu.is_lost(context - 1):
            self._sticky = Result.UNKNOWN
            raise DriverError(call, Result.UNKNOWN)

    def _here(self) -> int:
        """The device of the context of this thread."""
        return int(self._current.context) - 1

    @staticmethod
    def _refuse(call: str, why: str, result: Result = Result.INVALID_VALUE) -> DriverError:
        return DriverError(call, result, f"CUDA_ERROR_{result.name} ({why})")

    def _check_device(self, call: str, device: int) -> None:
        if not 0 <= device < self.gpu.count:
            raise DriverError(call, Result.INVALID_DEVICE)
        if self.gpu.is_lost(device):
            raise DriverError(call, Result.UNKNOWN)

    def _drop_mapping(self, address: int) -> None:
        memory = self._mappings.pop(address).memory
        if self._range_of(address) is not None:
            _shm.unmap_fixed(address, memory.nbytes)
        os.close(memory.fd)

    def _range_of(self, address: int) -> tuple[int, int] | None:
        for start, nbytes in self._ranges.items():
            if start <= address < start + nbytes:
                return start, nbytes
        return None

    def _inside(self, call: str, address: int, nbytes: int) -> list[int]:
        """Addresses of the mappings that fill this range exactly, or raise."""
        found, at = [], address
        while at < address + nbytes:
            if at not in self._mappings:
                raise self._refuse(call, f"{at:#x} is no mapping's beginning")
            found.append(at)
            at += self._mappings[at].memory.nbytes
        if at != address + nbytes or not found:
            raise self._refuse(call, "the range ends inside a mapping")
        return found

    # --- the device -----------------------------------------------------------------------------
    def init(self) -> None:
        self._enter("cuInit")
        self._is_init = True

    def device_count(self) -> int:
        self._enter("cuDeviceGetCount")
        return self.gpu.count

    def device_attribute(self, attribute: Attribute, device: int) -> int:
        self._enter("cuDeviceGetAttribute")
        self._check_device("cuDeviceGetAttribute", device)
        return self.gpu.attributes[attribute]

    def device_uuid(self, device: int) -> str:
        self._enter("cuDeviceGetUuid")
        self._check_device("cuDeviceGetUuid", device)
        return f"GPU-fa4e0000-0000-0000-0000-{device:012}"

    def device_bus_id(self, device: int) -> str:
        self._enter("cuDeviceGetPCIBusId")
        self._check_device("cuDeviceGetPCIBusId", device)
        return f"ffff:ff:{device:02}.0"

    def torch_device(self, device: int) -> str:
        return "cpu"  # its memory is host memory, so torch for the CPU computes on it

    def torch_backend(self, device: int) -> FakeBackend:
        from fake_backend import FakeBackend

        return FakeBackend(lambda: self.gpu.is_lost(device), self.reaches)

    def unpacker(self, device: int) -> FakeUnpacker | None:
        from fake_unpacker import FakeUnpacker

        return FakeUnpacker(self) if self.has_unpacker else None

    def plain_alloc(self, nbytes: int) -> int:
        """cuMemAlloc, which others than this project's driver calls make."""
        self._enter("cuMemAlloc", needs_context=True)
        address = _shm.reserve(nbytes)
        fd = os.memfd_create("fake-plain")
        os.ftruncate(fd, nbytes)
        _shm.map_fixed(address, fd, 0, nbytes, True, False)
        os.close(fd)
        self._plain[address] = nbytes
        return address

    def check_launch(self, address: int, nbytes: int) -> None:
        """A kernel of the test's own is started that writes there."""
        with self._lock:
            self._enter("cuLaunchKernel", needs_context=True)
            if not self._may_touch(address, nbytes, True):
                raise self._refuse("cuLaunchKernel", "the device may not write there")

    def may_write(self, address: int) -> bool:
        """Whether the device may write this byte now."""
        return self._may_touch(address, 1, True)

    def primary_context_retain(self, device: int) -> Context:
        self._enter("cuDevicePrimaryCtxRetain")
        self._check_device("cuDevicePrimaryCtxRetain", device)
        self._contexts.add(device + 1)
        return Context(device + 1)

    def context_set_current(self, context: Context) -> None:
        self._enter("cuCtxSetCurrent")
        if context not in self._contexts:
            raise DriverError("cuCtxSetCurrent", Result.INVALID_CONTEXT)
        self._current.context = context

    def mem_get_info(self) -> tuple[int, int]:
        self._enter("cuMemGetInfo", needs_context=True)
        used = self.gpu.used_bytes(self._here())
        return self.gpu.total_bytes - used, self.gpu.total_bytes

    # --- memory objects -------------------------------------------------------------------------
    def mem_granularity(self, device: int) -> int:
        self._enter("cuMemGetAllocationGranularity")
        self._check_device("cuMemGetAllocationGranularity", device)
        return GRANULARITY

    def mem_create(self, nbytes: int, device: int) -> MemoryHandle:
        call = "cuMemCreate"
        self._enter(call)
        self._check_device(call, device)
        if not self.gpu.attributes[Attribute.VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED]:
            raise DriverError(call, Result.NOT_SUPPORTED)
        if nbytes <= 0 or nbytes % GRANULARITY:
            raise self._refuse(call, "the size is no multiple of the granularity")
        if self.gpu.used_bytes(device) + nbytes > self.gpu.total_bytes:
            raise DriverError(call, Result.OUT_OF_MEMORY)
        fd = os.memfd_create(f"fake-gpu-{device}", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        self.gpu.note(_inode(fd), nbytes, device)
        return self._hand_out(_Memory(fd, nbytes, device))

    def _hand_out(self, memory: _Memory) -> MemoryHandle:
        handle = next(self._numbers)
        self._handles[handle] = memory
        return MemoryHandle(handle)

    def _memory(self, call: str, handle: MemoryHandle) -> _Memory:
        if handle not in self._handles:
            raise self._refuse(call, "no such handle, or released")
        return self._handles[handle]

    def mem_export(self, handle: MemoryHandle) -> int:
        call = "cuMemExportToShareableHandle"
        self._enter(call)
        if not self.gpu.attributes[Attribute.HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED]:
            raise DriverError(call, Result.NOT_SUPPORTED)
        # Numbers that nobody else gets: what this process has not closed when it dies is closed then.
        memory = self._memory(call, handle)
        fd = fcntl.fcntl(memory.fd, fcntl.F_DUPFD_CLOEXEC, next(self.gpu.export_numbers))
        self._exports.append((fd, _inode(fd)))
        return fd

    def mem_import(self, fd: int) -> MemoryHandle:
        call = "cuMemImportFromShareableHandle"
        self._enter(call)
        try:
            status = os.fstat(fd)
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError as error:
            raise self._refuse(call, "not an open descriptor") from error
        if (found := re.match(r"/memfd:fake-gpu-(\d+)", name)) is None:
            raise self._refuse(call, "not an exported memory object")
        device = int(found[1])
        self.gpu.note(status.st_ino, status.st_size, device)
        return self._hand_out(_Memory(os.dup(fd), status.st_size, device))

    def mem_release(self, handle: MemoryHandle) -> None:
        self._enter("cuMemRelease")
        memory = self._memory("cuMemRelease", handle)
        del self._handles[handle]
        os.close(memory.fd)

    # --- plain memory, shared by CUDA IPC ---------------------------------------------------------
    def mem_alloc(self, nbytes: int) -> int:
        call = "cuMemAlloc"
        self._enter(call, needs_context=True)
        device = self._here()
        if nbytes <= 0:
            raise self._refuse(call, "nothing")
        if self.gpu.used_bytes(device) + nbytes > self.gpu.total_bytes:
            raise DriverError(call, Result.OUT_OF_MEMORY)
        fd = os.memfd_create(f"fake-gpu-{device}", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        self.gpu.note(_inode(fd), nbytes, device)
        return self._hold(_Memory(fd, nbytes, device), self._owned)

    def _hold(self, memory: _Memory, books: set[int]) -> int:
        address = _shm.reserve(memory.nbytes)
        _shm.map_fixed(address, memory.fd, 0, memory.nbytes, True, False)
        self._ranges[address] = memory.nbytes
        self._mappings[address] = _Mapping(memory, True)
        books.add(address)
        return address

    def _let_go(self, call: str, address: int, books: set[int]) -> None:
        if address not in books:
            raise self._refuse(call, "not an address of that kind")
        books.discard(address)
        self._drop_mapping(address)
        _shm.release(address, self._ranges.pop(address))

    def mem_free(self, address: int) -> None:
        self._enter("cuMemFree", needs_context=True)
        self._let_go("cuMemFree", address, self._owned)

    def ipc_export(self, address: int) -> bytes:
        call = "cuIpcGetMemHandle"
        self._enter(call, needs_context=True)
        if not self.gpu.has_ipc:
            raise DriverError(call, Result.NOT_SUPPORTED)
        if address not in self._owned:
            raise self._refuse(call, "not the beginning of what cuMemAlloc gave")
        memory = self._mappings[address].memory
        words = (os.getpid(), memory.fd, id(self), memory.device, _inode(memory.fd))
        return " ".join(map(str, words)).encode().ljust(64, b"\0")

    def ipc_open(self, handle: bytes) -> int:
        call = "cuIpcOpenMemHandle"
        self._enter(call, needs_context=True)
        pid, number, owner, device, inode = map(int, handle.rstrip(b"\0").split())
        if (pid, owner) == (os.getpid(), id(self)):
            raise DriverError(call, Result.INVALID_CONTEXT)
        if handle in self._opened.values():
            raise self._refuse(call, "opened twice")
        if device != self._here():
            raise self._refuse(call, "the memory of another device, and no peer access")
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._refuse(call, "its owner is dead") from error
        status = os.fstat(fd)
        if status.st_ino != inode:
            os.close(fd)
            raise self._refuse(call, "it was freed")
        self.gpu.note(inode, status.st_size, device)
        address = self._hold(_Memory(fd, status.st_size, device), set())
        self._opened[address] = handle
        return address

    def ipc_close(self, address: int) -> None:
        call = "cuIpcCloseMemHandle"
        self._enter(call, needs_context=True)
        if self._opened.pop(address, None) is None:
            raise self._refuse(call, "not opened here")
        self._let_go(call, address, {address})

    # --- addresses ------------------------------------------------------------------------------
    def address_reserve(self, nbytes: int, alignment: int) -> int:
        call = "cuMemAddressReserve"
        self._enter(call)
        if nbytes <= 0 or nbytes % GRANULARITY or alignment not in (0, GRANULARITY):
            raise self._refuse(call, "size or alignment is no multiple of the granularity")
        address = _shm.reserve(nbytes)
        self._ranges[address] = nbytes
        return address

    def address_free(self, address: int, nbytes: int) -> None:
        call = "cuMemAddressFree"
        try:
            self._enter(call)
        except Died:
            return  # mostly a finaliser's call, who could not tell anybody; the next call raises
        if self._ranges.get(address) != nbytes:
            raise self._refuse(call, "not a range that was reserved")
        if any(address <= at < address + nbytes for at in self._mappings):
            raise self._refuse(call, "something is mapped there")
        del self._ranges[address]
        _shm.release(address, nbytes)

    def mem_map(self, address: int, nbytes: int, handle: MemoryHandle) -> None:
        call = "cuMemMap"
        self._enter(call)
        memory = self._memory(call, handle)
        around = self._range_of(address)
        if nbytes != memory.nbytes:
            raise self._refuse(call, "not the whole object")
        if address % GRANULARITY:
            raise self._refuse(call, "the address is not aligned")
        if around is None or address + nbytes > sum(around):
            raise self._refuse(call, "outside of what is reserved")
        for at, other in self._mappings.items():
            if at < address + nbytes and address < at + other.memory.nbytes:
                raise self._refuse(call, "something is mapped there")
        self._mappings[address] = _Mapping(_Memory(os.dup(memory.fd), nbytes, memory.device))

    def mem_unmap(self, address: int, nbytes: int) -> None:
        call = "cuMemUnmap"
        self._enter(call)
        for at in self._inside(call, address, nbytes):
            self._drop_mapping(at)

    def mem_set_access(self, address: int, nbytes: int, device: int, writable: bool) -> None:
        call = "cuMemSetAccess"
        self._enter(call)
        self._check_device(call, device)
        for at in self._inside(call, address, nbytes):
            mapping = self._mappings[at]
            if mapping.memory.device != device:
                raise self._refuse(call, "the memory of another device, and no peer access")
            mapping.writable = writable
            _shm.map_fixed(at, mapping.memory.fd, 0, mapping.memory.nbytes, writable, False)

    # --- host memory and copies -----------------------------------------------------------------
    def host_register(
        self, address: int, nbytes: int, *, is_mapped: bool = False, is_read_only: bool = False
    ) -> None:
        call = "cuMemHostRegister"
        with self._lock:
            self._enter(call, needs_context=True)
            knows_read_only = self.gpu.attributes[Attribute.READ_ONLY_HOST_REGISTER_SUPPORTED]
            if is_read_only and not knows_read_only:
                raise DriverError(call, Result.NOT_SUPPORTED)
            if not is_read_only and not _is_writable(address):
                raise self._refuse(
                    call, "the CPU may not write there, and the flag does not say so"
                )
            if is_mapped:
                self.mapped_host[address] = nbytes
            for at, length in self.registered.items():
                if at < address + nbytes and address < at + length:
                    raise DriverError(call, Result.HOST_MEMORY_ALREADY_REGISTERED)
            self.registered[address] = nbytes

    def host_unregister(self, address: int) -> None:
        call = "cuMemHostUnregister"
        self._enter(call, needs_context=True)
        if address not in self.registered:
            raise DriverError(call, Result.HOST_MEMORY_NOT_REGISTERED)
        del self.registered[address]
        self.mapped_host.pop(address, None)

    def reaches(self, address: int, nbytes: int) -> bool:
        """Whether a kernel reaches this host memory: registered, and mapped, without a gap."""
        at = address
        for start, length in sorted(self.mapped_host.items()):
            if start <= at < start + length:
                at = start + length
        return at >= address + nbytes

    def is_registered_at(self, address: int) -> bool:
        """Whether this byte is."""
        return self._pieces(address, 1) == 1

    def _pieces(self, address: int, nbytes: int) -> int:
        """How many kinds of host memory this range is of: 0 pageable, 1 registered, else both."""
        touched = [
            (at, length)
            for at, length in self.registered.items()
            if at < address + nbytes and address < at + length
        ]
        if len(touched) == 1 and touched[0][0] <= address:
            at, length = touched[0]
            return 1 if address + nbytes <= at + length else 2
        return 2 * len(touched)

    def memcpy_htod_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self._copy("cuMemcpyHtoDAsync", target, source, nbytes, stream, device=target)

    def memcpy_dtoh_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self._copy("cuMemcpyDtoHAsync", target, source, nbytes, stream, device=source)

    def _copy(
        self, call: str, target: int, source: int, nbytes: int, stream: Stream, device: int
    ) -> None:
        with self._lock:
            self._enter(call, needs_context=True)
            queue = self._stream(call, stream)
            if len(queue.queue) >= OPEN_COPIES_MAX:
                raise AssertionError("the stream's queue is full: this call would block")
            writes = device == target
            if not self._may_touch(device, nbytes, writes):
                raise self._refuse(call, "the device may not touch that range")
            self.copies.append((target, source, nbytes))

            def carry_out() -> None:
                if not self._may_touch(device, nbytes, writes):
                    self._sticky = Result.ILLEGAL_ADDRESS
                    raise DriverError(call, Result.ILLEGAL_ADDRESS)
                _shm.copy(target, source, nbytes)

            host = source if writes else target
            pieces = self._pieces(host, nbytes)
            if pieces > 1:
                raise self._refuse(
                    call, "the host range is not inside one registration, nor outside"
                )
            if pieces:
                self._put(queue, carry_out)
                self.open_max[stream] = max(self.open_max.get(stream, 0), len(queue.queue))
            else:
                # From pageable memory the driver is done with the source when the call returns.
                self._advance(queue, queue.asked)
                carry_out()

    def _may_touch(self, address: int, nbytes: int, writes: bool) -> bool:
        """Whether mappings with access cover the range without a gap."""
        if any(at <= address and address + nbytes <= at + n for at, n in self._plain.items()):
            return True
        at = address
        for start, mapping in sorted(self._mappings.items()):
            if mapping.memory.device != self._here():
                continue
            if start <= at < start + mapping.memory.nbytes and at < address + nbytes:
                if mapping.writable is None or (writes and not mapping.writable):
                    return False
                at = start + mapping.memory.nbytes
        return at >= address + nbytes

    # --- streams and events ---------------------------------------------------------------------
    def _stream(self, call: str, stream: Stream) -> _Stream:
        if stream not in self._streams:
            raise DriverError(call, Result.INVALID_HANDLE)
        return self._streams[stream]

    @staticmethod
    def _put(queue: _Stream, work: Callable[[], None]) -> None:
        queue.queue.append(work)
        queue.asked += 1

    @staticmethod
    def _advance(queue: _Stream, until: int) -> None:
        while queue.done < until:
            queue.done += 1
            queue.queue.popleft()()

    def stream_create(self, is_urgent: bool) -> Stream:
        self._enter("cuStreamCreateWithPriority", needs_context=True)
        number = next(self._numbers)
        self._streams[number] = _Stream(is_urgent)
        return Stream(number)

    def enqueue(self, stream: Stream, work: Callable[[], None]) -> None:
        """Put a kernel of the test's own on a stream."""
        with self._lock:
            self._put(self._streams[stream], work)

    def stream_synchronize(self, stream: Stream) -> None:
        with self._lock:
            self._enter("cuStreamSynchronize")
            queue = self._stream("cuStreamSynchronize", stream)
            self._advance(queue, queue.asked)

    def stream_destroy(self, stream: Stream) -> None:
        self._enter("cuStreamDestroy")
        self._stream("cuStreamDestroy", stream)
        del self._streams[stream]

    def event_create(self) -> Event:
        self._enter("cuEventCreate", needs_context=True)
        number = next(self._numbers)
        self._events[number] = None
        return Event(number)

    def event_record(self, event: Event, stream: Stream) -> None:
        with self._lock:
            self._enter("cuEventRecord", needs_context=True)
            queue = self._stream("cuEventRecord", stream)
            self._event("cuEventRecord", event)
            self._events[event] = (queue, queue.asked)

    def _event(self, call: str, event: Event) -> tuple[_Stream, int] | None:
        if event not in self._events:
            raise DriverError(call, Result.INVALID_HANDLE)
        return self._events[event]

    def event_query(self, event: Event) -> bool:
        """Each query lets one more piece of work of the stream finish."""
        with self._lock:
            self._enter("cuEventQuery")
            recorded = self._event("cuEventQuery", event)
            if recorded is None:
                return True
            queue, until = recorded
            self._advance(queue, min(until, queue.done + 1))
            return queue.done >= until

    def event_synchronize(self, event: Event) -> None:
        self.may_finish.wait()
        with self._lock:
            self._enter("cuEventSynchronize")
            recorded = self._event("cuEventSynchronize", event)
            if recorded is not None:
                self._advance(*recorded)

    def event_destroy(self, event: Event) -> None:
        self._enter("cuEventDestroy")
        self._event("cuEventDestroy", event)
        del self._events[event]
