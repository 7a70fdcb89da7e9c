"""What the machine has, and what the tiers may take of it.

Reads `/proc`, the cgroup files (v1 and v2) and NVML; keeps nothing but the NVML handle.  A number
that cannot be read is left out, never invented.

Called by the supervisor at start and for status.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.runtime.config import (
    DEVICE_SHARE,
    GIB,
    KIB,
    MEMORY_RESERVE_BYTES,
    MIB,
    SMALL_CHUNK_BYTES,
    Settings,
)
from overcommit.runtime.device_limits import (
    CUDA_CONTEXT_BYTES,
    CUDA_HOST_SHARE,
    CUDA_RESERVE_BYTES,
    CUDA_RESERVE_SHARE,
)
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.gpu import Gpu

_CGROUP_DEPTH_MAX: Final = 64
_NO_LIMIT: Final = 1 << 60  # v1 writes a huge number for "none"


@dataclass(slots=True, frozen=True)
class DeviceMemory:
    """One GPU's memory, in bytes, as NVML sees it."""

    index: int
    name: str
    total: int
    used: int
    free: int


@dataclass(slots=True, frozen=True)
class Budgets:
    """What the tiers may take; `host_bytes` 0: no host tier."""

    device_bytes: int
    host_bytes: int


class Telemetry:
    """Reads the machine below `root` (another folder in tests)."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._cgroup = root / "sys/fs/cgroup"

    def host_available_bytes(self) -> int:
        """Memory that can be taken without swapping or being killed for it."""
        left = [max(0, limit - used) for limit, used in self._cgroup_limits()]
        return min([self._meminfo("MemAvailable"), *left])

    def devices(self) -> tuple[DeviceMemory, ...]:
        """Every GPU that NVML shows; nothing where there is no GPU or no driver."""
        if not os.path.exists("/dev/nvidiactl"):
            return ()
        import pynvml

        found = []
        try:
            pynvml.nvmlInit()
            try:
                for index in range(pynvml.nvmlDeviceGetCount()):
                    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                    name = str(pynvml.nvmlDeviceGetName(handle))
                    sizes = (int(memory.total), int(memory.used), int(memory.free))
                    found.append(DeviceMemory(index, name, *sizes))
            finally:
                pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            return ()
        return tuple(found)

    def _meminfo(self, key: str) -> int:
        return _fields(self._proc / "meminfo")[key]

    def _cgroup_limits(self) -> Iterator[tuple[int, int]]:
        """Yield (limit, used without page cache that can be dropped) of every enclosing cgroup."""
        try:
            lines = (self._proc / "self/cgroup").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if controllers == "":
                names = ("memory.max", "memory.current", "inactive_file")
                yield from _limits(self._cgroup, path, names)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _limits(self._cgroup / "memory", path, names)


def _limits(mount: Path, path: str, names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    limit_name, used_name, cache_name = names
    folder = mount / path.lstrip("/")
    # In a container the path may be that of the host, and only the mount itself is there.
    for _ in range(_CGROUP_DEPTH_MAX):
        limit = _number(folder / limit_name)
        used = _number(folder / used_name)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            yield limit, max(0, used - _stat(folder / "memory.stat", cache_name))
        if folder == mount or mount not in folder.parents:
            return
        folder = folder.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no number and no limit
        return None


def _stat(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        return 0
    return 0


def _fields(path: Path) -> dict[str, int]:
    """Read `Name:   123 kB` lines, as bytes."""
    fields = {}
    for line in path.read_text().splitlines():
        name, colon, value = line.partition(":")
        words = value.split()
        if colon and len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * KIB
    return fields


def budgets(
    settings: Settings,
    telemetry: Telemetry | None = None,
    gpu: Gpu | None = None,
    count: int = 1,
) -> Budgets:
    """Decide the size of both tiers for one of `count` devices.

    DEVICE is each device's own, `--device-memory` too; HOST is cut into equal shares.
    Without a `gpu` DEVICE is host memory: both would come from the same memory, so it gets all of it,
    and HOST nothing that no flag gives it.  With one DEVICE is what is free there, less what workers and
    models need beside weights.  A size from a flag is taken as it is or refused; what is left open gets
    its share of what is available after a reserve and the front ends' payload memory.

    Raises ConfigurationError when it does not fit.
    """
    telemetry = telemetry or Telemetry()
    available = telemetry.host_available_bytes()
    payload = 2 * settings.front_ends * settings.payload_bytes
    spare = max(0, available - MEMORY_RESERVE_BYTES - payload)
    device, host = settings.device_memory_bytes, settings.host_memory_bytes
    on_gpu = 0
    if gpu is not None:
        on_gpu = _gpu_bytes(settings, gpu)
        device = 0
    elif device is None:
        device = min(int(spare * DEVICE_SHARE), max(0, spare - (host or 0))) // count
    if host is None:
        host = 0 if gpu is None else int(spare * CUDA_HOST_SHARE) // count
        host = host if host >= SMALL_CHUNK_BYTES else 0
    else:
        host //= count
    if gpu is None and device < SMALL_CHUNK_BYTES:
        if settings.device_memory_bytes is not None:
            raise ConfigurationError(
                f"--device-memory {show_bytes(device)} is less than one chunk of "
                f"{show_bytes(SMALL_CHUNK_BYTES)}; give it more"
            )
        raise ConfigurationError(
            f"no memory is left for models: {show_bytes(available)} are available, "
            f"{show_bytes(MEMORY_RESERVE_BYTES)} stay in reserve and the front ends take "
            f"{show_bytes(payload)}; free some, lower --payload-memory, or set --device-memory"
        )
    if 0 < host < SMALL_CHUNK_BYTES:
        raise ConfigurationError(
            f"--host-memory {show_bytes(host)} is less than one chunk of "
            f"{show_bytes(SMALL_CHUNK_BYTES)}; give it more, or 0 for no host tier"
        )
    if count * (device + host) + payload > available:
        raise ConfigurationError(
            f"the tiers do not fit: device {show_bytes(count * device)}, host "
            f"{show_bytes(count * host)} and "
            f"payload {show_bytes(payload)} are more than the {show_bytes(available)} available; "
            f"lower --device-memory, --host-memory (0: no host tier) or --payload-memory"
        )
    return Budgets(device or on_gpu, host)


def _gpu_bytes(settings: Settings, gpu: Gpu) -> int:
    """Return the bytes of a GPU that weights may have.  Raises ConfigurationError."""
    wanted = settings.device_memory_bytes
    reserve = max(CUDA_RESERVE_BYTES, int(gpu.total_bytes * CUDA_RESERVE_SHARE))
    reserve += settings.workers * CUDA_CONTEXT_BYTES
    if wanted is None:
        wanted = gpu.free_bytes - reserve
        if wanted < SMALL_CHUNK_BYTES:
            raise ConfigurationError(
                f"no memory of GPU {gpu.device} is left for models: {show_bytes(gpu.free_bytes)} are "
                f"free, {show_bytes(reserve)} stay for {settings.workers} workers and for what models "
                f"compute with; free some, lower --workers, or set --device-memory"
            )
    if wanted < SMALL_CHUNK_BYTES:
        raise ConfigurationError(
            f"--device-memory {show_bytes(wanted)} is less than one chunk of "
            f"{show_bytes(SMALL_CHUNK_BYTES)}; give it more"
        )
    if wanted > gpu.free_bytes:
        raise ConfigurationError(
            f"--device-memory {show_bytes(wanted)} is more than the {show_bytes(gpu.free_bytes)} that "
            f"are free on GPU {gpu.device}; lower it"
        )
    return wanted


def show_bytes(nbytes: int) -> str:
    """Write a size for people: 1.5 GiB."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
