"""What DEVICE is: host memory, or the memory of GPUs.

    "cpu"    host memory, nothing is asked
    "cpu:2"  host memory, as two devices; on a machine with several NUMA nodes each lies on its own
    "0,1"    these GPUs, or the server does not start
    "auto"   every GPU that can be used; host memory where there is none, and why is in the log

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
from collections.abc import Sequence
from typing import Final

import msgspec

from overcommit.runtime.config import Settings
from overcommit.runtime.device_limits import DEVICES_MAX, FDS_SPARE, PROBE_TIMEOUT_S
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.gpu import Gpu

log = logging.getLogger("overcommit")

_CONTROL_DEVICE: Final = "/dev/nvidiactl"
_NUMBERS: Final = re.compile(r"\d{1,3}(,\d{1,3})*")
_CPUS: Final = re.compile(r"cpu:(\d{1,3})")
_DECODER: Final = msgspec.json.Decoder(list[Gpu])


def read_devices(text: str) -> str:
    """Check what an operator wrote for `devices`.  Raises ValueError."""
    text = re.sub(r"\s*,\s*", ",", text.strip().lower())
    if text in ("auto", "cpu"):
        return text
    if (found := _CPUS.fullmatch(text)) is not None:
        count = int(found[1])
        if not 1 <= count <= DEVICES_MAX:
            raise ValueError(f"cpu:N is for 1 to {DEVICES_MAX} devices")
        return "cpu" if count == 1 else f"cpu:{count}"
    if _NUMBERS.fullmatch(text) is None:
        raise ValueError("it is cpu, cpu:N, auto, or the numbers of GPUs: 0,1")
    numbers = [int(each) for each in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a GPU is named twice")
    if len(numbers) > DEVICES_MAX:
        raise ValueError(f"a server uses {DEVICES_MAX} GPUs at most")
    return ",".join(map(str, numbers))


def choose(settings: Settings) -> list[Gpu | None]:
    """Return the devices, one at least: a GPU whose memory it is, or None for host memory.

    Raises ConfigurationError when a GPU was asked for by number and cannot be used.
    """
    wanted = settings.devices
    if (cpus := _CPUS.fullmatch(wanted)) is not None:
        return [None] * int(cpus[1])
    if wanted == "cpu":
        return [None]
    if wanted == "auto":
        if not settings.cuda_driver and not os.path.exists(_CONTROL_DEVICE):
            return [None]
        found = _ask(settings, [])
        usable = [each for each in found if not each.why][:DEVICES_MAX]
        reasons = "; ".join(each.why for each in found if each.why)
        if not usable:
            reasons = reasons or "the driver shows none"
            log.warning("no GPU can be used, DEVICE is host memory: %s", reasons)
        elif reasons:
            log.warning("not every GPU can be used: %s", reasons)
        _say_what_lacks(usable)
        return [*usable] or [None]
    numbers = [int(each) for each in wanted.split(",")]
    found = _ask(settings, numbers)
    for number in numbers:
        gpu = next((each for each in found if each.device == number), None)
        if gpu is None or gpu.why:
            why = "the driver shows none" if gpu is None else gpu.why
            raise ConfigurationError(f"--devices {number}: {why}; give --devices cpu to do without")
    _say_what_lacks(found)
    return [*found]


def _say_what_lacks(gpus: list[Gpu]) -> None:
    for gpu in gpus:
        if gpu.shares == "ipc":
            log.warning(
                "%s: DEVICE is one allocation there, shared by CUDA IPC; weights are read again when the "
                "mover dies, and a model that comes back elsewhere is bound anew",
                gpu.note,
            )


def with_packing(settings: Settings, gpus: Sequence[Gpu | None]) -> Settings:
    """Decide whether weights are packed in HOST: "on" or "off" from now on.

    "auto" is what was measured.  Where DEVICE is host memory decoding is slower than a copy, always; on
    GPUs the probe has measured both, and the slowest decides.
    """
    chosen = settings.host_packing
    if chosen == "auto":
        gain = min((0.0 if gpu is None else gpu.unpack_gain for gpu in gpus), default=0.0)
        chosen = "on" if gain >= 1 else "off"
        if any(gpu is not None for gpu in gpus):
            log.info(
                "weights are %s in HOST: packed ones come %.2f times as fast as raw ones",
                *("packed" if chosen == "on" else "not packed", gain),
            )
    return msgspec.structs.replace(settings, host_packing=chosen)


def _ask(settings: Settings, devices: list[int]) -> list[Gpu]:
    """Start the probe and read what it says."""
    command = [sys.executable, "-P", "-m", "overcommit.runtime.gpu_probe"]
    command += [settings.cuda_driver, settings.host_packing]
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
