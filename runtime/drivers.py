"""Which CUDA driver and which NVML a process talks to: the machine's, or those that tests brought along.

`Settings.cuda_driver` and `Settings.nvml` name an object of a module (`module:name`).  No flag sets
them: they are how the whole program, with all its processes, runs in tests on a driver of theirs.
"""

from __future__ import annotations

import importlib
from typing import Any

from overcommit.runtime.config import Settings
from overcommit.runtime.cuda_driver import CudaDriver
from overcommit.runtime.driver import Driver


def open_driver(settings: Settings) -> Driver:
    """Return this process's driver; nothing is called yet.  Raises DriverError."""
    if not settings.cuda_driver:
        return CudaDriver()
    driver: Driver = _named(settings.cuda_driver)()
    return driver


def open_nvml(settings: Settings) -> Any:
    """Return the module `pynvml`, or what stands in for it."""
    if not settings.nvml:
        return importlib.import_module("pynvml")
    return _named(settings.nvml)


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found
