"""What GPUs there are and whether their memory can be DEVICE, asked in a process of its own.

    python -P -m overcommit.runtime.gpu_probe DRIVER PACKING DEVICE...  -> JSON on stdout, a list of `Gpu`
    python -P -m overcommit.runtime.gpu_probe DRIVER open DEVICE HANDLE     -> what was in the way

Without a DEVICE it looks at every one.  A process of its own because the supervisor has no CUDA: a
driver that was called cannot be forgotten, holds memory on the GPU, and may hang.

Invariants
 1. It says something of every device that was asked for, and ends with status 0 if it could.
 2. The free bytes that it reports are those beside its own context, as large as the mover's will be.

Started by `device_choice`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Callable

import msgspec

from overcommit.runtime.config import Settings
from overcommit.runtime.cuda_tier import probe, probe_ipc, try_open
from overcommit.runtime.device_limits import PROBE_TIMEOUT_S
from overcommit.runtime.driver import Driver, DriverError
from overcommit.runtime.drivers import open_driver
from overcommit.runtime.gpu import Gpu, Shares

# Opens an exported allocation of a device in another process; says what was in the way.
OpenElsewhere = Callable[[int, bytes], str]


def look(
    driver: Driver,
    devices: list[int],
    open_elsewhere: OpenElsewhere | None = None,
    *,
    asks_gain: bool = False,
) -> list[Gpu]:
    """Probe these devices, or all; no device at all is one `Gpu` that says why.

    Without `open_elsewhere` nobody looks whether CUDA IPC would do where VMM cannot be had.  `asks_gain`:
    measure what packed weights gain, too, which takes a second or two.
    """
    try:
        driver.init()
        count = driver.device_count()
    except DriverError as error:
        why = f"the CUDA driver cannot be used: {error.message}"
        return [Gpu(device=device, why=why) for device in devices or [0]]
    return [
        _look_at(driver, device, open_elsewhere, asks_gain) for device in devices or range(count)
    ]


def _look_at(
    driver: Driver, device: int, open_elsewhere: OpenElsewhere | None, asks_gain: bool
) -> Gpu:
    shares: Shares = "vmm"
    note = ""
    why = probe(driver, device)
    if why and open_elsewhere is not None:
        why_not = probe_ipc(driver, device, functools.partial(open_elsewhere, device))
        if not why_not:
            why, note, shares = "", why, "ipc"
    why = why or _torch_lacks(driver, device)
    if why:
        return Gpu(device=device, why=why)
    try:
        driver.context_set_current(driver.primary_context_retain(device))
        free, total = driver.mem_get_info()
        return Gpu(
            device=device,
            uuid=driver.device_uuid(device),
            bus_id=driver.device_bus_id(device),
            total_bytes=total,
            free_bytes=free,
            shares=shares,
            note=note,
            unpack_gain=_unpack_gain(driver, device) if asks_gain else 0.0,
        )
    except DriverError as error:
        return Gpu(device=device, why=f"GPU {device} cannot be used: {error.message}")


def _unpack_gain(driver: Driver, device: int) -> float:
    """Measure what packed weights gain; 0 where they cannot be decoded there: that is no reason to fail."""
    try:
        unpacker = driver.unpacker(device)
        return 0.0 if unpacker is None else unpacker.gain()
    except DriverError:
        return 0.0


def _torch_lacks(driver: Driver, device: int) -> str:
    """Say what this torch lacks, by the file that says how it was built: its import takes seconds."""
    if driver.torch_device(device) == "cpu":
        return ""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "torch is not installed"
    built = runpy.run_path(os.path.join(spec.submodule_search_locations[0], "version.py"))
    if built.get("cuda"):
        return ""
    return (
        f"torch {built.get('__version__')} is built without CUDA; install one that is built with it"
    )


def main(arguments: list[str]) -> int:
    """Print what there is."""
    path, *devices = arguments
    if devices[:1] == ["open"]:
        _, device, handle = devices
        driver = open_driver(Settings(cuda_driver=path))
        print(try_open(driver, int(device), bytes.fromhex(handle)), flush=True)
        return 0

    def open_elsewhere(device: int, handle: bytes) -> str:
        command = [sys.executable, "-P", "-m", "overcommit.runtime.gpu_probe", path, "open"]
        done = subprocess.run(
            [*command, str(device), handle.hex()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        return done.stdout.decode().strip() if done.returncode == 0 else "opening it failed"

    packing, *devices = devices
    try:
        driver = open_driver(Settings(cuda_driver=path))
        numbers = [int(each) for each in devices]
        found = look(driver, numbers, open_elsewhere, asks_gain=packing == "auto")
    except DriverError as error:
        found = [Gpu(device=int(each), why=error.message) for each in devices or ["0"]]
    sys.stdout.buffer.write(msgspec.json.encode(found))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    # Not by the interpreter's way out: a driver's own threads may crash there.
    status = main(sys.argv[1:])
    os._exit(status)
