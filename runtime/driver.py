"""The calls of the CUDA driver that this project uses, and nothing else.

A protocol, so that all that stands on it runs on a driver that is there or on one that tests made
(`tests/fake_driver.py`).  Each method is one driver call, whose name its docstring gives; what the
call reports comes back, and a result other than success is raised as `DriverError`.

Handles are what the driver gives out, as plain integers.  Sizes are bytes.  An address is one in the
device's address space, which on CUDA is that of the process.

Rules of the driver that callers must keep, and that the fake enforces
 1. `init` comes first.  Memory objects need no context; streams, events, copies and registration do.
 2. A memory object is a multiple of the granularity and is mapped whole, from its offset 0.
 3. A mapped range may be touched only after `mem_set_access`, and only as far as that allows.
 4. `mem_unmap` takes ranges as they were mapped; `address_free` takes ranges without mappings.
 5. A memory object lives as long as a handle, a mapping or an exported descriptor of it, in any
    process: who dies takes only its own along.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NewType, Protocol

from overcommit.runtime.errors import OvercommitError

if TYPE_CHECKING:  # torch is imported by the process that computes
    from overcommit.runtime.engines.device_runner import Backend

Context = NewType("Context", int)
MemoryHandle = NewType("MemoryHandle", int)
Stream = NewType("Stream", int)
Event = NewType("Event", int)


class Result(enum.IntEnum):
    """The CUresult values that are told apart, with the driver's numbers."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    NO_DEVICE = 100
    INVALID_DEVICE = 101
    INVALID_CONTEXT = 201
    INVALID_HANDLE = 400
    NOT_READY = 600
    ILLEGAL_ADDRESS = 700
    HOST_MEMORY_ALREADY_REGISTERED = 712
    HOST_MEMORY_NOT_REGISTERED = 713
    NOT_SUPPORTED = 801
    UNKNOWN = 999


_PASSING: Final = frozenset(
    (
        *(Result.INVALID_VALUE, Result.OUT_OF_MEMORY, Result.INVALID_HANDLE, Result.NOT_READY),
        *(Result.HOST_MEMORY_ALREADY_REGISTERED, Result.HOST_MEMORY_NOT_REGISTERED),
        Result.NOT_SUPPORTED,
    )
)


class Attribute(enum.IntEnum):
    """The CUdevice_attribute values that are asked for, with the driver's numbers."""

    VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102
    HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103
    CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91
    READ_ONLY_HOST_REGISTER_SUPPORTED = 113


class DriverError(OvercommitError):
    """A driver call did not succeed.

    `result` is UNKNOWN for a value that is not told apart; the message has the driver's own name.
    """

    code = "device"

    def __init__(self, call: str, result: Result, name: str = "") -> None:
        super().__init__(f"{call} failed: {name or 'CUDA_ERROR_' + result.name}")
        self.call = call
        self.result = result

    @property
    def is_sticky(self) -> bool:
        """Whether the context may be beyond use: every later call would fail as well."""
        return self.result not in _PASSING


class Unpacker(Protocol):
    """`kernels.unpack` on a device, for threads that have its context.  Raises DriverError."""

    def allocate(self, nbytes: int) -> int:
        """Return device memory for packed bytes, aligned to 16, that stays for good."""
        ...

    def launch(self, packed: int, target: int, first: int, count: int, stream: Stream) -> None:
        """Decode `count` blocks from block `first` of what lies at `packed`; does not wait."""

    def gain(self) -> float:
        """Measure how many times as fast packed BF16 weights come to the device as raw ones."""
        ...


class Driver(Protocol):
    """One process's access to the driver."""

    # --- the device -----------------------------------------------------------------------------
    def init(self) -> None:
        """cuInit."""

    def device_count(self) -> int:
        """cuDeviceGetCount."""
        ...

    def device_attribute(self, attribute: Attribute, device: int) -> int:
        """cuDeviceGetAttribute."""
        ...

    def device_uuid(self, device: int) -> str:
        """cuDeviceGetUuid, as NVML writes it: GPU-01234567-89ab-..."""
        ...

    def device_bus_id(self, device: int) -> str:
        """cuDeviceGetPCIBusId: 0000:65:00.0"""
        ...

    def torch_device(self, device: int) -> str:
        """Return what torch calls this device; no call of the driver."""
        ...

    def torch_backend(self, device: int) -> Backend:
        """Return what runs torch there; imports torch, for workers only."""
        ...

    def unpacker(self, device: int) -> Unpacker | None:
        """Return what decodes packed weights there; None: what it takes is not installed."""
        ...

    def primary_context_retain(self, device: int) -> Context:
        """cuDevicePrimaryCtxRetain: the context that torch uses too."""
        ...

    def context_set_current(self, context: Context) -> None:
        """cuCtxSetCurrent: for the calling thread."""

    def mem_get_info(self) -> tuple[int, int]:
        """cuMemGetInfo: (free, total) of the current context's device."""
        ...

    # --- memory objects -------------------------------------------------------------------------
    def mem_granularity(self, device: int) -> int:
        """cuMemGetAllocationGranularity, the least that is possible, of exportable memory."""
        ...

    def mem_create(self, nbytes: int, device: int) -> MemoryHandle:
        """cuMemCreate: pinned to the device, exportable as a file descriptor."""
        ...

    def mem_export(self, handle: MemoryHandle) -> int:
        """cuMemExportToShareableHandle: a fresh file descriptor, the caller's to close."""
        ...

    def mem_import(self, fd: int) -> MemoryHandle:
        """cuMemImportFromShareableHandle: a handle of one's own; the descriptor stays the caller's."""
        ...

    def mem_release(self, handle: MemoryHandle) -> None:
        """cuMemRelease: mappings stay, and keep the memory alive."""

    # --- plain memory, shared by CUDA IPC ---------------------------------------------------------
    def mem_alloc(self, nbytes: int) -> int:
        """cuMemAlloc: an address, in the current context; it dies with this process."""
        ...

    def mem_free(self, address: int) -> None:
        """cuMemFree: nobody who has opened it may use it any more."""

    def ipc_export(self, address: int) -> bytes:
        """cuIpcGetMemHandle: 64 bytes that say to another process what it is."""
        ...

    def ipc_open(self, handle: bytes) -> int:
        """cuIpcOpenMemHandle: an address here, writable; not in the process that made it, and once."""
        ...

    def ipc_close(self, address: int) -> None:
        """cuIpcCloseMemHandle: no work on it may be left."""

    # --- addresses ------------------------------------------------------------------------------
    def address_reserve(self, nbytes: int, alignment: int) -> int:
        """cuMemAddressReserve."""
        ...

    def address_free(self, address: int, nbytes: int) -> None:
        """cuMemAddressFree: the whole of what was reserved."""

    def mem_map(self, address: int, nbytes: int, handle: MemoryHandle) -> None:
        """cuMemMap: the whole object, into reserved addresses where nothing is mapped."""

    def mem_unmap(self, address: int, nbytes: int) -> None:
        """cuMemUnmap: one or more whole mappings.  No work that touches them may be left."""

    def mem_set_access(self, address: int, nbytes: int, device: int, writable: bool) -> None:
        """cuMemSetAccess: PROT_READ or PROT_READWRITE for the device, over whole mappings."""

    # --- host memory and copies -----------------------------------------------------------------
    def host_register(
        self, address: int, nbytes: int, *, is_mapped: bool = False, is_read_only: bool = False
    ) -> None:
        """cuMemHostRegister; `is_mapped`: kernels reach it, `is_read_only`: this process may not write it."""

    def host_unregister(self, address: int) -> None:
        """cuMemHostUnregister."""

    def memcpy_htod_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """cuMemcpyHtoDAsync."""

    def memcpy_dtoh_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """cuMemcpyDtoHAsync."""

    # --- streams and events ---------------------------------------------------------------------
    def stream_create(self, is_urgent: bool) -> Stream:
        """cuStreamCreateWithPriority: non-blocking, of the highest priority or of the lowest."""
        ...

    def stream_synchronize(self, stream: Stream) -> None:
        """cuStreamSynchronize."""

    def stream_destroy(self, stream: Stream) -> None:
        """cuStreamDestroy."""

    def event_create(self) -> Event:
        """cuEventCreate, without timing; who waits for it sleeps."""
        ...

    def event_record(self, event: Event, stream: Stream) -> None:
        """cuEventRecord."""

    def event_query(self, event: Event) -> bool:
        """cuEventQuery: whether the work before its last record is done."""
        ...

    def event_synchronize(self, event: Event) -> None:
        """cuEventSynchronize."""

    def event_destroy(self, event: Event) -> None:
        """cuEventDestroy."""
