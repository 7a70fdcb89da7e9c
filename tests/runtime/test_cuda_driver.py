"""The real driver, as far as it goes without a GPU: types, order of arguments, errors.

The bindings' functions are replaced, their types are the real ones; what a driver would answer is
made up here.  The test with the marker `gpu` talks to a driver.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
from typing import Any

import pytest

from overcommit.runtime.cuda_driver import CudaDriver
from overcommit.runtime.driver import (
    Attribute,
    Context,
    Driver,
    DriverError,
    Event,
    MemoryHandle,
    Result,
    Stream,
)

MIB = 1 << 20


class Bindings:
    """The bindings' types, and functions that record what they were given."""

    def __init__(self) -> None:
        self.real: Any = pytest.importorskip("cuda.bindings.driver")
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: dict[str, tuple[Any, ...]] = {
            "cuDeviceGetCount": (2,),
            "cuDeviceGet": (7,),
            "cuDeviceGetAttribute": (1,),
            "cuDeviceGetUuid": (self.real.CUuuid(),),
            "cuDeviceGetPCIBusId": (b"0000:65:00.0\0\0",),
            "cuDevicePrimaryCtxRetain": (self.real.CUcontext(77),),
            "cuMemGetInfo": (3, 4),
            "cuMemGetAllocationGranularity": (2 * MIB,),
            "cuMemCreate": (self.real.CUmemGenericAllocationHandle(5),),
            "cuMemExportToShareableHandle": (9,),
            "cuMemImportFromShareableHandle": (self.real.CUmemGenericAllocationHandle(6),),
            "cuMemAlloc": (self.real.CUdeviceptr(0x710000000000),),
            "cuIpcGetMemHandle": (self.real.CUipcMemHandle(),),
            "cuIpcOpenMemHandle": (self.real.CUdeviceptr(0x720000000000),),
            "cuMemAddressReserve": (self.real.CUdeviceptr(0x700000000000),),
            "cuCtxGetStreamPriorityRange": (0, -5),
            "cuStreamCreateWithPriority": (self.real.CUstream(11),),
            "cuEventCreate": (self.real.CUevent(12),),
        }
        self.result = self.real.CUresult.CUDA_SUCCESS

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if inspect.isclass(found):
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            return (self.result, *self.answers.get(name, ()))

        return call


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    made = Bindings()
    monkeypatch.setattr("overcommit.runtime.cuda_driver._import", lambda: made)
    return made


def test_every_call_gets_what_the_driver_wants(bindings: Bindings) -> None:
    driver: Driver = CudaDriver()
    cu = bindings.real
    driver.init()
    assert driver.device_count() == 2
    assert driver.device_uuid(0) == "GPU-00000000-0000-0000-0000-000000000000"
    assert driver.device_bus_id(0) == "0000:65:00.0"
    assert driver.torch_device(1) == "cuda:1"
    assert driver.device_attribute(Attribute.VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 0) == 1
    context = driver.primary_context_retain(0)
    assert context == 77
    driver.context_set_current(Context(context))
    assert driver.mem_get_info() == (3, 4)
    assert driver.mem_granularity(1) == 2 * MIB
    handle = driver.mem_create(64 * MIB, 1)
    assert (handle, driver.mem_export(handle), driver.mem_import(9)) == (5, 9, 6)
    address = driver.address_reserve(64 * MIB, 2 * MIB)
    driver.mem_map(address, 64 * MIB, MemoryHandle(handle))
    driver.mem_set_access(address, 64 * MIB, 1, False)
    driver.mem_unmap(address, 64 * MIB)
    driver.address_free(address, 64 * MIB)
    driver.mem_release(handle)
    driver.host_register(4096, MIB)
    driver.host_unregister(4096)
    stream, event = driver.stream_create(is_urgent=True), driver.event_create()
    driver.memcpy_htod_async(address, 4096, MIB, Stream(stream))
    driver.memcpy_dtoh_async(4096, address, MIB, Stream(stream))
    driver.event_record(Event(event), stream)
    assert driver.event_query(event)
    driver.event_synchronize(event)
    driver.stream_synchronize(stream)
    driver.event_destroy(event)
    driver.stream_destroy(stream)

    calls = dict(bindings.calls)
    assert calls["cuInit"] == (0,)
    assert calls["cuDeviceGetAttribute"] == (
        cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        7,
    )
    nbytes, properties, flags = calls["cuMemCreate"]
    assert (nbytes, flags, properties.location.id) == (64 * MIB, 0, 1)
    fd_type = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    assert properties.requestedHandleTypes == fd_type
    assert properties.type == cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    assert properties.location.type == cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    assert calls["cuMemImportFromShareableHandle"] == (9, fd_type)
    at, nbytes, offset, mapped, flags = calls["cuMemMap"]
    assert (int(at), nbytes, offset, int(mapped), flags) == (address, 64 * MIB, 0, 5, 0)
    at, nbytes, (access,), count = calls["cuMemSetAccess"]
    assert (int(at), nbytes, count, access.location.id) == (address, 64 * MIB, 1, 1)
    assert access.flags == cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    assert calls["cuMemHostRegister"] == (4096, MIB, 0)
    assert calls["cuStreamCreateWithPriority"] == (1, -5)
    target, source, nbytes, on = calls["cuMemcpyHtoDAsync"]
    assert (int(target), source, nbytes, int(on)) == (address, 4096, MIB, 11)
    target, source, nbytes, on = calls["cuMemcpyDtoHAsync"]
    assert (target, int(source), nbytes, int(on)) == (4096, address, MIB, 11)


def test_memory_shared_by_ipc_goes_by_its_64_bytes(bindings: Bindings) -> None:
    driver: Driver = CudaDriver()
    cu = bindings.real
    made = driver.mem_alloc(64 * MIB)
    exported = bindings.answers["cuIpcGetMemHandle"][0]
    ctypes.memmove(exported.getPtr(), bytes(range(64)), 64)
    handle = driver.ipc_export(made)
    assert (made, handle) == (0x710000000000, bytes(range(64)))
    opened = driver.ipc_open(handle)
    assert opened == 0x720000000000
    driver.ipc_close(opened)
    driver.mem_free(made)
    calls = dict(bindings.calls)
    own, flags = calls["cuIpcOpenMemHandle"]
    assert isinstance(own, cu.CUipcMemHandle)
    assert ctypes.string_at(own.getPtr(), 64) == handle
    assert flags == int(cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
    assert calls["cuMemAlloc"] == (64 * MIB,)
    assert [int(calls[name][0]) for name in ("cuIpcCloseMemHandle", "cuMemFree")] == [opened, made]


@pytest.mark.parametrize("result", [result for result in Result if result not in (0, 600, 999)])
def test_our_numbers_are_the_drivers_and_an_error_names_call_and_result(
    bindings: Bindings, result: Result
) -> None:
    bindings.result = bindings.real.CUresult(int(result))
    with pytest.raises(DriverError) as raised:
        CudaDriver().mem_unmap(0, 0)
    assert (raised.value.call, raised.value.result) == ("cuMemUnmap", result)
    assert bindings.result.name in str(raised.value)


def test_work_that_is_not_done_is_no_error(bindings: Bindings) -> None:
    bindings.result = bindings.real.CUresult.CUDA_ERROR_NOT_READY
    assert CudaDriver().event_query(Event(3)) is False


def test_the_attributes_have_the_drivers_numbers(bindings: Bindings) -> None:
    for attribute in Attribute:
        name = f"CU_DEVICE_ATTRIBUTE_{attribute.name}"
        assert getattr(bindings.real.CUdevice_attribute, name) == attribute


def test_bindings_that_are_missing_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(DriverError, match="import cuda"):
        CudaDriver()


def test_a_driver_library_that_is_missing_is_said() -> None:
    pytest.importorskip("cuda.bindings.driver")
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a driver here")
    with pytest.raises(DriverError, match="cuInit failed"):
        CudaDriver().init()


@pytest.mark.gpu
@pytest.mark.skipif(not os.path.exists("/dev/nvidiactl"), reason="no GPU here")
def test_a_chunk_goes_round_on_a_real_driver() -> None:
    driver = CudaDriver()
    driver.init()
    driver.context_set_current(driver.primary_context_retain(0))
    granularity = driver.mem_granularity(0)
    made = driver.mem_create(granularity, 0)
    fd = driver.mem_export(made)
    driver.mem_release(made)
    taken = driver.mem_import(fd)
    os.close(fd)
    address = driver.address_reserve(granularity, granularity)
    driver.mem_map(address, granularity, taken)
    driver.mem_set_access(address, granularity, 0, True)
    stream = driver.stream_create(is_urgent=True)
    source, target = bytearray(os.urandom(granularity)), bytearray(granularity)
    ours, back = ((ctypes.c_char * granularity).from_buffer(data) for data in (source, target))
    driver.memcpy_htod_async(address, ctypes.addressof(ours), granularity, stream)
    driver.memcpy_dtoh_async(ctypes.addressof(back), address, granularity, stream)
    driver.stream_synchronize(stream)
    assert source == target
    driver.mem_unmap(address, granularity)
    driver.address_free(address, granularity)
    driver.mem_release(taken)
