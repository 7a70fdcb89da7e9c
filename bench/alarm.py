"""A timer of the kernel's for an event loop: a loop's own timers count in whole milliseconds.

An open loop that is asked for ten thousand requests a second would send them in bundles of ten, and
each would look up to a millisecond slower than it was.

Called by `pacer`.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from typing import Final

_CLOCK_MONOTONIC: Final = 1  # that of time.monotonic_ns
_TFD_NONBLOCK: Final = os.O_NONBLOCK
_TFD_CLOEXEC: Final = os.O_CLOEXEC
_ABSOLUTE: Final = 1
_SECOND_NS: Final = 1_000_000_000


class _Spec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


_libc = ctypes.CDLL(None, use_errno=True)  # os.timerfd_create is Python 3.13's


class Alarm:
    """Calls `on_ring` from the loop when it is time; one time at most is set."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_ring: Callable[[], None]) -> None:
        self._fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _Spec()
        self._pointer = ctypes.byref(self._spec)
        self._loop = loop
        self._on_ring = on_ring
        loop.add_reader(self._fd, self._ring)

    def set(self, at_ns: int) -> None:
        """Ring at this time of `time.monotonic_ns`, or at once when it is over; undoes the former."""
        self._spec.value_s, self._spec.value_ns = divmod(max(at_ns, 1), _SECOND_NS)
        if _libc.timerfd_settime(self._fd, _ABSOLUTE, self._pointer, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _ring(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew since it rang
            return
        self._on_ring()

    def close(self) -> None:
        """Ring no more."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
