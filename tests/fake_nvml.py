"""NVML for tests: the calls of `gpu_watch`, over numbers in a file that a test may change.

`FAKE_NVML` names the file, JSON; a key that is absent is a call that is not supported.  A key with `/1`
behind it is what device 1 says of it, where that is something else.  Handles are 7, 8, ...
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML_TEMPERATURE_GPU, NVML_VOLATILE_ECC = 0, 0
NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
nvmlEventTypeXidCriticalError = 8
UUID = b"GPU-fa4e0000-0000-0000-0000-000000000000"
FIRST = 7


class NVMLError(Exception):
    """What NVML raises."""


class NVMLError_Timeout(NVMLError):
    """Nothing happened."""


def _get(key: str, handle: int = FIRST) -> Any:
    values = json.loads(Path(os.environ["FAKE_NVML"]).read_text())
    own = f"{key}/{handle - FIRST}"
    if own in values:
        return values[own]
    if key not in values:
        raise NVMLError(f"{key}: not supported")
    return values[key]


def nvmlInit() -> None:
    """Begin."""


def nvmlDeviceGetHandleByUUID(uuid: bytes) -> int:
    if not uuid.startswith(UUID[:-12]):
        raise NVMLError("not found")
    return FIRST + int(uuid[-12:])


def nvmlDeviceGetHandleByPciBusId(bus_id: bytes) -> int:
    if not bus_id.startswith(b"ffff:ff:"):
        raise NVMLError("not found")
    return FIRST + int(bus_id[8:10])


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    total, used = _get("memory", handle)
    return SimpleNamespace(total=total, used=used, free=total - used)


def nvmlDeviceGetName(handle: int) -> str:
    return "Fake GPU"


def nvmlDeviceGetUtilizationRates(handle: int) -> SimpleNamespace:
    gpu, memory = _get("rates", handle)
    return SimpleNamespace(gpu=gpu, memory=memory)


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in _get("processes", handle)]


def nvmlDeviceGetPowerUsage(handle: int) -> int:
    return _get("power", handle)  # type: ignore[no-any-return]


def nvmlDeviceGetTotalEccErrors(handle: int, kind: int, counter: int) -> int:
    return _get("ecc", handle)[kind]  # type: ignore[no-any-return]


def nvmlDeviceGetPcieThroughput(handle: int, which: int) -> int:
    return _get("pcie", handle)[which]  # type: ignore[no-any-return]


def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:
    return _get("temperature", handle)  # type: ignore[no-any-return]


def nvmlEventSetCreate() -> dict[str, int]:
    return {"told": 0, "handle": FIRST}


def nvmlDeviceRegisterEvents(handle: int, kinds: int, events: dict[str, int]) -> None:
    _get("xids", handle)
    events["handle"] = handle


def nvmlEventSetWait_v2(events: dict[str, int], timeout_ms: int) -> SimpleNamespace:
    xids = _get("xids", events["handle"])
    if events["told"] == len(xids):
        time.sleep(min(timeout_ms, 50) / 1000)
        raise NVMLError_Timeout
    events["told"] += 1
    return SimpleNamespace(eventData=xids[events["told"] - 1])
