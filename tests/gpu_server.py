"""`overcommit serve` on the fake driver: run this file with the arguments of `serve`.

Every process of the server gets its driver by import path; the tests' folder is on the path of all.
`FAKE_GPU_BYTES` is how much memory each of `FAKE_GPUS` devices has; `FAKE_LOST` names a folder in which a
file `1` says that device 1 is off the bus; with `FAKE_NO_VMM` there is no virtual memory management.
DEVICE grows again after two readings of NVML in place of half a minute of them.
"""

from __future__ import annotations

import os
import sys

TESTS = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":
    # Before anything is started: children inherit it.
    inherited = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (TESTS, inherited)))

from fake_driver import FakeDriver, FakeGpu  # noqa: E402
from msgspec.structs import replace  # noqa: E402

from overcommit.runtime import gpu_growth, supervisor  # noqa: E402

GPU_BYTES = 4 << 30


def open_fake() -> FakeDriver:
    """A process's driver."""
    total_bytes = int(os.environ.get("FAKE_GPU_BYTES", GPU_BYTES))
    count = int(os.environ.get("FAKE_GPUS", "1"))
    has_vmm = "FAKE_NO_VMM" not in os.environ
    return FakeDriver(FakeGpu(total_bytes, count=count, has_vmm=has_vmm, is_lost=is_lost))


def is_lost(device: int) -> bool:
    """Whether somebody pulled the device out."""
    folder = os.environ.get("FAKE_LOST")
    return folder is not None and os.path.exists(os.path.join(folder, str(device)))


def main(arguments: list[str]) -> None:
    """Serve as the command line does."""
    from overcommit.server import cli

    run = supervisor.run
    gpu_growth.GPU_GROW_LOOKS = 2

    def run_on_fake(settings: object) -> int:
        nvml = "fake_nvml" if "FAKE_NVML" in os.environ else "no_nvml_here"
        return run(replace(settings, cuda_driver="gpu_server:open_fake", nvml=nvml))  # type: ignore[type-var]

    supervisor.run = run_on_fake  # type: ignore[assignment]
    cli.app(["serve", *arguments], prog_name="overcommit")


if __name__ == "__main__":
    main(sys.argv[1:])
