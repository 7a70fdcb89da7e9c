"""What the kernel says of a page of this process, and what happens to who touches it."""

from __future__ import annotations

import faulthandler
import os
import resource

from overcommit.runtime import _shm


def permissions(address: int) -> str | None:
    """The kernel's word on a page of this process: "r--s", "---p" ..., None when not mapped."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, flags, *_ = line.split()
            low, high = (int(part, 16) for part in span.split("-"))
            if low <= address < high:
                return flags
    return None


def signal_of_child(touch: str, address: int) -> int:
    """Read or write one byte in a forked child; return the signal that killed it, 0 if none did."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # pytest's would write a traceback
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if touch == "write":
            _shm.copy(address, address, 1)
        else:
            _shm.view(address, 1, False)[0]
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
