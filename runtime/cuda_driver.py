"""The real driver, by `cuda.bindings.driver`; imported when one is made, not with the package.

Every call is one call of the driver: what it returns beside the result comes back as integers, and
any result but success is raised as `DriverError`.  The bindings release the GIL in each call.

Invariants
 1. No call keeps state here but the module; a `CudaDriver` belongs to the process that made it and
    does not survive a fork.

Nothing of this has run on a GPU; `tests/runtime/test_cuda_driver.py` checks it against the bindings
as far as these go without one.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import TYPE_CHECKING, Any

from overcommit.runtime.driver import (
    Attribute,
    Context,
    DriverError,
    Event,
    MemoryHandle,
    Result,
    Stream,
    Unpacker,
)

if TYPE_CHECKING:
    from overcommit.runtime.engines.device_runner import Backend

_BUS_ID_BYTES = 32
_IPC_HANDLE_BYTES = 64
# CU_MEMHOSTREGISTER_DEVICEMAP and _READ_ONLY, which are macros of cuda.h.
_DEVICEMAP = 0x02
_READ_ONLY = 0x08
_KNOWN = {result.value: result for result in Result}


class CudaDriver:
    """`Driver` over the CUDA driver of this machine.

    Raises DriverError when the bindings cannot be imported.
    """

    def __init__(self) -> None:
        # The bindings carry no types that hold here, and `Any` does not leave this class.
        self._cu: Any = _import()

    def _call(self, name: str, *arguments: Any) -> Any:
        """Make one call; return what it returns beside the result, one value or a tuple."""
        try:
            result, *values = getattr(self._cu, name)(*arguments)
        except (RuntimeError, OSError, ImportError, AttributeError) as error:
            # The bindings look the driver's library up with the first call.
            raise DriverError(name, Result.NOT_SUPPORTED, str(error)) from error
        code = int(result)
        if code != Result.SUCCESS:
            raise DriverError(name, _KNOWN.get(code, Result.UNKNOWN), self._name(result))
        return values[0] if len(values) == 1 else tuple(values)

    def _name(self, result: Any) -> str:
        return str(getattr(result, "name", result))

    def _properties(self, device: int) -> Any:
        cu = self._cu
        properties = cu.CUmemAllocationProp()
        properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = device
        properties.requestedHandleTypes = self._fd_type
        return properties

    @property
    def _fd_type(self) -> Any:
        types = self._cu.CUmemAllocationHandleType
        return types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    # --- the device -----------------------------------------------------------------------------
    def init(self) -> None:
        self._call("cuInit", 0)

    def device_count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def device_attribute(self, attribute: Attribute, device: int) -> int:
        asked = self._cu.CUdevice_attribute(int(attribute))
        return int(self._call("cuDeviceGetAttribute", asked, self._device(device)))

    def _device(self, device: int) -> Any:
        return self._call("cuDeviceGet", device)

    def device_uuid(self, device: int) -> str:
        uuid = self._call("cuDeviceGetUuid", self._device(device))
        digits = bytes(byte % 256 for byte in uuid.bytes).hex()
        parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
        return "GPU-" + "-".join(parts)

    def device_bus_id(self, device: int) -> str:
        text: bytes = self._call("cuDeviceGetPCIBusId", _BUS_ID_BYTES, self._device(device))
        return text.partition(b"\0")[0].decode().lower()

    def torch_device(self, device: int) -> str:
        return f"cuda:{device}"

    def torch_backend(self, device: int) -> Backend:
        from overcommit.runtime.engines.cuda_backend import CudaBackend

        return CudaBackend(self.torch_device(device))

    def unpacker(self, device: int) -> Unpacker | None:
        from overcommit.kernels import cuda

        if not cuda.has_gpu():
            return None
        from overcommit.runtime.cuda_unpacker import CudaUnpacker

        return CudaUnpacker(device)

    def primary_context_retain(self, device: int) -> Context:
        return Context(int(self._call("cuDevicePrimaryCtxRetain", self._device(device))))

    def context_set_current(self, context: Context) -> None:
        self._call("cuCtxSetCurrent", self._cu.CUcontext(context))

    def mem_get_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    # --- memory objects -------------------------------------------------------------------------
    def mem_granularity(self, device: int) -> int:
        flags = self._cu.CUmemAllocationGranularity_flags
        least = flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._call("cuMemGetAllocationGranularity", self._properties(device), least))

    def mem_create(self, nbytes: int, device: int) -> MemoryHandle:
        return MemoryHandle(int(self._call("cuMemCreate", nbytes, self._properties(device), 0)))

    def mem_export(self, handle: MemoryHandle) -> int:
        own = self._cu.CUmemGenericAllocationHandle(handle)
        return int(self._call("cuMemExportToShareableHandle", own, self._fd_type, 0))

    def mem_import(self, fd: int) -> MemoryHandle:
        return MemoryHandle(int(self._call("cuMemImportFromShareableHandle", fd, self._fd_type)))

    def mem_release(self, handle: MemoryHandle) -> None:
        self._call("cuMemRelease", self._cu.CUmemGenericAllocationHandle(handle))

    # --- plain memory, shared by CUDA IPC ---------------------------------------------------------
    def mem_alloc(self, nbytes: int) -> int:
        return int(self._call("cuMemAlloc", nbytes))

    def mem_free(self, address: int) -> None:
        self._call("cuMemFree", self._cu.CUdeviceptr(address))

    def ipc_export(self, address: int) -> bytes:
        handle = self._call("cuIpcGetMemHandle", self._cu.CUdeviceptr(address))
        # The bindings of CUDA 13 show no fields of it, but all say where it lies.
        return ctypes.string_at(handle.getPtr(), _IPC_HANDLE_BYTES)

    def ipc_open(self, handle: bytes) -> int:
        cu = self._cu
        own = cu.CUipcMemHandle()
        ctypes.memmove(own.getPtr(), handle.ljust(_IPC_HANDLE_BYTES, b"\0"), _IPC_HANDLE_BYTES)
        flag = int(cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        return int(self._call("cuIpcOpenMemHandle", own, flag))

    def ipc_close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", self._cu.CUdeviceptr(address))

    # --- addresses ------------------------------------------------------------------------------
    def address_reserve(self, nbytes: int, alignment: int) -> int:
        nowhere = self._cu.CUdeviceptr(0)
        return int(self._call("cuMemAddressReserve", nbytes, alignment, nowhere, 0))

    def address_free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", self._cu.CUdeviceptr(address), nbytes)

    def mem_map(self, address: int, nbytes: int, handle: MemoryHandle) -> None:
        own = self._cu.CUmemGenericAllocationHandle(handle)
        self._call("cuMemMap", self._cu.CUdeviceptr(address), nbytes, 0, own, 0)

    def mem_unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", self._cu.CUdeviceptr(address), nbytes)

    def mem_set_access(self, address: int, nbytes: int, device: int, writable: bool) -> None:
        cu = self._cu
        access = cu.CUmemAccessDesc()
        access.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        flags = cu.CUmemAccess_flags
        access.flags = (
            flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            if writable
            else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        )
        self._call("cuMemSetAccess", cu.CUdeviceptr(address), nbytes, [access], 1)

    # --- host memory and copies -----------------------------------------------------------------
    def host_register(
        self, address: int, nbytes: int, *, is_mapped: bool = False, is_read_only: bool = False
    ) -> None:
        flags = _DEVICEMAP * is_mapped | _READ_ONLY * is_read_only
        self._call("cuMemHostRegister", address, nbytes, flags)

    def host_unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def memcpy_htod_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        cu = self._cu
        to = cu.CUdeviceptr(target)
        self._call("cuMemcpyHtoDAsync", to, source, nbytes, cu.CUstream(stream))

    def memcpy_dtoh_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        cu = self._cu
        at = cu.CUdeviceptr(source)
        self._call("cuMemcpyDtoHAsync", target, at, nbytes, cu.CUstream(stream))

    # --- streams and events ---------------------------------------------------------------------
    def stream_create(self, is_urgent: bool) -> Stream:
        lowest, highest = self._call("cuCtxGetStreamPriorityRange")
        flag = int(self._cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
        priority = int(highest if is_urgent else lowest)
        return Stream(int(self._call("cuStreamCreateWithPriority", flag, priority)))

    def stream_synchronize(self, stream: Stream) -> None:
        self._call("cuStreamSynchronize", self._cu.CUstream(stream))

    def stream_destroy(self, stream: Stream) -> None:
        self._call("cuStreamDestroy", self._cu.CUstream(stream))

    def event_create(self) -> Event:
        flags = self._cu.CUevent_flags
        # Who waits sleeps: the mover's threads wait for most of a copy's time.
        flag = int(flags.CU_EVENT_DISABLE_TIMING) | int(flags.CU_EVENT_BLOCKING_SYNC)
        return Event(int(self._call("cuEventCreate", flag)))

    def event_record(self, event: Event, stream: Stream) -> None:
        self._call("cuEventRecord", self._cu.CUevent(event), self._cu.CUstream(stream))

    def event_query(self, event: Event) -> bool:
        try:
            self._call("cuEventQuery", self._cu.CUevent(event))
        except DriverError as error:
            if error.result is Result.NOT_READY:
                return False
            raise
        return True

    def event_synchronize(self, event: Event) -> None:
        self._call("cuEventSynchronize", self._cu.CUevent(event))

    def event_destroy(self, event: Event) -> None:
        self._call("cuEventDestroy", self._cu.CUevent(event))


def _import() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DriverError(
            "import cuda.bindings.driver", Result.NOT_SUPPORTED, str(error)
        ) from error
