"""Why a wish ends without weights, in the words that a client reads.

Each names the model, the limit or reason, and the remedy.  Called by residency.
"""

from __future__ import annotations

from overcommit.runtime.config import MIB


def mib(nbytes: int) -> str:
    """Write bytes for people."""
    return f"{nbytes / MIB:.1f} MiB"


def gone(name: str | None = None) -> str:
    """The version was removed; without a name: before it was asked for."""
    if name is None:
        return "the model was unloaded or replaced; ask again for the version that is current"
    return f"model '{name}' was unloaded or replaced while requests for it waited"


def load_failed(name: str, reason: str, left_s: float) -> str:
    """A load failed, and the back-off runs for so long."""
    return f"model '{name}' could not be loaded: {reason}; it can be tried again in {left_s:.1f} s"


def never_fits(name: str, size: int, capacity: int, pinned: int) -> str:
    """No eviction can make room, because the tier is too small or pinned versions fill it."""
    if size > capacity:
        return (
            f"model '{name}' needs {mib(size)} of DEVICE memory and there are {mib(capacity)}; "
            f"raise device_memory_bytes"
        )
    return (
        f"model '{name}' needs {mib(size)} of DEVICE memory and pinned models hold {mib(pinned)} "
        f"of {mib(capacity)}; raise device_memory_bytes or pin fewer models"
    )


def no_room(name: str, capacity: int, waited_s: float) -> str:
    """Everything that could have made room was in use for as long as a wish may wait."""
    return (
        f"model '{name}' found no room in {mib(capacity)} of DEVICE memory for {waited_s:.0f} s, "
        f"because all of it is in use; send less, or raise device_memory_bytes"
    )
