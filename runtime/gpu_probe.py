"""What GPUs there are and whether their memory can be DEVICE, asked in a process of its own.

    python -P -m overcommit.runtime.gpu_probe DRIVER DEVICE...      -> JSON on stdout, a list of `Gpu`

Without a DEVICE it looks at every one.  A process of its own because the supervisor has no CUDA: a
driver that was called cannot be forgotten, holds memory on the GPU, and may hang.

Invariants
 1. It says something of every device that was asked for, and ends with status 0 if it could.
 2. The free bytes that it reports are those beside its own context, as large as the mover's will be.

Started by `device_choice`.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys

import msgspec

from overcommit.runtime.config import Settings
from overcommit.runtime.cuda_tier import probe
from overcommit.runtime.driver import Driver, DriverError
from overcommit.runtime.drivers import open_driver
from overcommit.runtime.gpu import Gpu


def look(driver: Driver, devices: list[int]) -> list[Gpu]:
    """Probe these devices, or all; no device at all is one `Gpu` that says why."""
    try:
        driver.init()
        count = driver.device_count()
    except DriverError as error:
        why = f"the CUDA driver cannot be used: {error.message}"
        return [Gpu(device=device, why=why) for device in devices or [0]]
    return [_look_at(driver, device) for device in devices or range(count)]


def _look_at(driver: Driver, device: int) -> Gpu:
    why = probe(driver, device) or _torch_lacks(driver, device)
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
        )
    except DriverError as error:
        return Gpu(device=device, why=f"GPU {device} cannot be used: {error.message}")


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
    try:
        found = look(open_driver(Settings(cuda_driver=path)), [int(each) for each in devices])
    except DriverError as error:
        found = [Gpu(device=int(each), why=error.message) for each in devices or ["0"]]
    sys.stdout.buffer.write(msgspec.json.encode(found))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    # Not by the interpreter's way out: a driver's own threads may crash there.
    status = main(sys.argv[1:])
    os._exit(status)
