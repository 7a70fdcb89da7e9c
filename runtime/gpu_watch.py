"""What NVML says of the GPU whose memory DEVICE is: memory, by process too, load, health, PCIe.

NVML can block for seconds while somebody pins memory, so a thread reads it, each GPU_WATCH_S, and keeps
the last reading; the supervisor looks at that.  Between two readings the thread waits for Xid events,
which are what the driver says of a GPU that is ill.

Invariants
 1. The supervisor's loop never calls NVML.
 2. A number that cannot be had is None or absent, never invented; without NVML there is no reading.
 3. Readings are values: whoever has one may keep it.

Started and closed by the house; read by status and metrics.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from overcommit.runtime.device_limits import GPU_WATCH_S, XIDS_KEPT
from overcommit.runtime.gpu import Gpu

log = logging.getLogger("overcommit.gpu")

T = TypeVar("T")
_KIB: Final = 1024


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
    """One reading; bytes, percent, degrees Celsius, bytes a second."""

    device: int
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    processes: dict[int, int] = {}  # pid -> bytes, as far as this container sees
    busy_percent: int | None = None
    memory_busy_percent: int | None = None
    temperature: int | None = None
    power_watts: float | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    pcie_to_gpu: int | None = None
    pcie_from_gpu: int | None = None
    xids: tuple[int, ...] = ()
    taken_ns: int = 0


class GpuWatch:
    """The last reading of one GPU."""

    def __init__(self, gpu: Gpu, open_nvml: Callable[[], Any]) -> None:
        self.reading: GpuReading | None = None
        self._gpu = gpu
        self._open = open_nvml
        self._xids: list[int] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-watch", daemon=True)
        self._thread.start()

    @property
    def uuid(self) -> str:
        """Which GPU it is, as its driver names it."""
        return self._gpu.uuid

    def close(self) -> None:
        """End the thread; one that hangs in NVML is left to the end of the process."""
        self._closing.set()
        self._thread.join(2 * GPU_WATCH_S)

    # --- the thread -----------------------------------------------------------------------------
    def _watch(self) -> None:
        try:
            nvml = self._open()
            nvml.nvmlInit()
            handle = _find(nvml, self._gpu)
        except Exception as error:  # a helper's boundary: NVML is not needed to serve
            log.warning("NVML cannot be used, nothing is known of the GPU's memory: %s", error)
            return
        events = self._listen(nvml, handle)
        while not self._closing.is_set():
            try:
                self.reading = read(nvml, handle, self._gpu.device, tuple(self._xids))
            except nvml.NVMLError as error:
                log.warning("NVML does not answer: %s", error)
                self.reading = None
            self._wait(nvml, events)

    def _listen(self, nvml: Any, handle: Any) -> Any:
        """Ask for Xid events; None where there are none."""
        try:
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError:
            return None
        return events

    def _wait(self, nvml: Any, events: Any) -> None:
        if events is None:
            self._closing.wait(GPU_WATCH_S)
            return
        try:
            event = nvml.nvmlEventSetWait_v2(events, int(GPU_WATCH_S * 1000))
        except nvml.NVMLError_Timeout:
            return
        except nvml.NVMLError:
            self._closing.wait(GPU_WATCH_S)
            return
        xid = int(event.eventData)
        log.error("GPU %d reports Xid %d; see NVIDIA's list of Xid errors", self._gpu.device, xid)
        self._xids = [*self._xids, xid][-XIDS_KEPT:]


def _find(nvml: Any, gpu: Gpu) -> Any:
    """Return NVML's handle of the driver's GPU: the two count in different orders."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(gpu.uuid.encode())
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByPciBusId(gpu.bus_id.encode())


def read(nvml: Any, handle: Any, device: int, xids: tuple[int, ...] = ()) -> GpuReading:
    """Take one reading.  Raises NVMLError when even the memory cannot be read."""

    def ask(call: Callable[[], T]) -> T | None:
        try:
            return call()
        except nvml.NVMLError:
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    rates = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    processes = ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    power = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))

    def ecc(kind: int) -> int | None:
        return ask(
            lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC))
        )

    def pcie(which: int) -> int | None:
        rate = ask(lambda: int(nvml.nvmlDeviceGetPcieThroughput(handle, which)))
        return None if rate is None else rate * _KIB

    return GpuReading(
        device=device,
        name=name.decode() if isinstance(name, bytes) else str(name),
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        free_bytes=int(memory.free),
        processes={int(p.pid): int(p.usedGpuMemory or 0) for p in processes},
        busy_percent=None if rates is None else int(rates.gpu),
        memory_busy_percent=None if rates is None else int(rates.memory),
        temperature=ask(
            lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        ),
        power_watts=None if power is None else power / 1000,
        ecc_corrected=ecc(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        ecc_uncorrected=ecc(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        pcie_to_gpu=pcie(nvml.NVML_PCIE_UTIL_RX_BYTES),
        pcie_from_gpu=pcie(nvml.NVML_PCIE_UTIL_TX_BYTES),
        xids=xids,
        taken_ns=time.monotonic_ns(),
    )


def describe(reading: GpuReading | None, pids: dict[int, str]) -> dict[str, object] | None:
    """Return a reading for status; `pids` says which processes are ours, and what they are."""
    if reading is None:
        return None
    told = msgspec.to_builtins(reading)
    assert isinstance(told, dict)
    told["processes"] = [
        {"pid": pid, "kind": pids.get(pid, ""), "bytes": nbytes}
        for pid, nbytes in reading.processes.items()
    ]
    told["age_s"] = (time.monotonic_ns() - reading.taken_ns) / 1e9
    del told["taken_ns"]
    return told
