"""What DEVICE is: host memory, or the memory of a GPU.

    "cpu"   host memory, nothing is asked
    "0"     that GPU, or the server does not start
    "auto"  the first GPU that can be used; host memory where there is none, and why is in the log

Invariants
 1. The supervisor calls no driver: a child does, for PROBE_TIMEOUT_S at most.
 2. Where no NVIDIA driver is loaded, "auto" starts no child.

Called by the house, once.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import subprocess
import sys
from typing import Final

import msgspec

from overcommit.runtime.config import FDS_SPARE, PROBE_TIMEOUT_S, Settings
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.gpu import Gpu

log = logging.getLogger("overcommit")

_CONTROL_DEVICE: Final = "/dev/nvidiactl"
_NUMBERS: Final = re.compile(r"\d{1,3}(,\d{1,3})*")
_DECODER: Final = msgspec.json.Decoder(list[Gpu])


def read_devices(text: str) -> str:
    """Check what an operator wrote for `devices`.  Raises ValueError."""
    text = text.strip().lower()
    if text in ("auto", "cpu"):
        return text
    if _NUMBERS.fullmatch(text) is None:
        raise ValueError("it is cpu, auto, or the number of a GPU")
    if "," in text:
        raise ValueError("a server uses one GPU; start one for each, or give one number")
    return str(int(text))


def choose(settings: Settings) -> Gpu | None:
    """Return the GPU whose memory DEVICE is; None: host memory.

    Raises ConfigurationError when a GPU was asked for by number and cannot be used.
    """
    wanted = settings.devices
    if wanted == "cpu":
        return None
    if wanted == "auto":
        if not settings.cuda_driver and not os.path.exists(_CONTROL_DEVICE):
            return None
        found = _ask(settings, [])
        usable = next((each for each in found if not each.why), None)
        if usable is None:
            reasons = "; ".join(each.why for each in found) or "the driver shows none"
            log.warning("no GPU can be used, DEVICE is host memory: %s", reasons)
        return usable
    found = _ask(settings, [int(wanted)])
    if not found or found[0].why:
        why = found[0].why if found else "the driver shows none"
        raise ConfigurationError(f"--devices {wanted}: {why}; give --devices cpu to do without")
    return found[0]


def _ask(settings: Settings, devices: list[int]) -> list[Gpu]:
    """Start the probe and read what it says."""
    command = [sys.executable, "-P", "-m", "overcommit.runtime.gpu_probe", settings.cuda_driver]
    try:
        done = subprocess.run(
            [*command, *map(str, devices)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        if done.returncode == 0:
            return _DECODER.decode(done.stdout)
        why = f"asking the driver ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        why = f"the driver did not answer in {PROBE_TIMEOUT_S:.0f} s"
    except msgspec.DecodeError as error:
        why = f"the probe's answer cannot be read: {error}"
    return [Gpu(device=device, why=why) for device in devices or [0]]


def allow_descriptors(chunks: int) -> None:
    """Raise this process's limit of open files to what the chunks of a GPU need.

    Children inherit it.  Raises ConfigurationError when the hard limit is too low.
    """
    needed = 2 * chunks + FDS_SPARE  # on their way to a child they count once more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigurationError(
                f"{chunks} chunks of GPU memory need {needed} open files, the limit is {hard}: raise "
                f"it (ulimit -n, LimitNOFILE=, --ulimit nofile) or lower --device-memory"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
