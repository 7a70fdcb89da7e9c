"""Why a request gets no answer, in the words that a client reads: no weights, no time, no sequence.

Each names the model, the limit or reason, and the remedy.  Called by residency, its pump, a
worker's door and its sequences.
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
    return (
        f"model '{name}' was unloaded or replaced while requests for it waited; ask again for the "
        f"version that is current, or load it"
    )


def load_failed(name: str, reason: str, left_s: float) -> str:
    """A load failed, and the back-off runs for so long."""
    return f"model '{name}' could not be loaded: {reason}; it can be tried again in {left_s:.1f} s"


def in_quarantine(name: str, version: str, left_s: float) -> str:
    """Requests for the version have killed workers."""
    return (
        f"model '{name}' version {version} is in quarantine for {left_s:.0f} s: workers died while they "
        f"ran it; see the server's log"
    )


def never_fits(name: str, size: int, capacity: int, pinned: int) -> str:
    """No eviction can make room, because the tier is too small or pinned versions fill it."""
    if size > capacity:
        return (
            f"model '{name}' needs {mib(size)} of DEVICE memory and there are {mib(capacity)}; "
            f"raise --device-memory"
        )
    return (
        f"model '{name}' needs {mib(size)} of DEVICE memory and pinned models hold {mib(pinned)} "
        f"of {mib(capacity)}; raise --device-memory or pin fewer models"
    )


def no_room(name: str, capacity: int, waited_s: float) -> str:
    """Everything that could have made room was in use for as long as a wish may wait."""
    return (
        f"model '{name}' found no room in {mib(capacity)} of DEVICE memory for {waited_s:.0f} s, "
        f"because all of it is in use; send less, or raise --device-memory"
    )


def queue_too_long(name: str, waiting: int, wait_ms: int, left_ms: int, back_ms: int) -> str:
    """What waits before a request in its worker takes longer than the request has."""
    return (
        f"{name}: the answer would be there in {wait_ms} ms ({waiting} requests wait for the model) "
        f"and the request has {left_ms} ms; try again in {back_ms} ms, give it a longer timeout, or "
        f"add workers"
    )


def not_in_time(name: str, wait_ms: int, left_ms: int) -> str:
    """The weights will be there after the request's time."""
    return (
        f"{name}: its weights will be in DEVICE memory in {wait_ms} ms and the request has "
        f"{left_ms} ms; try again then, give it a longer timeout, or raise --device-memory"
    )


def too_much_before(name: str, queued: int, back_s: float) -> str:
    """So many loads wait that this one is not even queued."""
    return (
        f"model '{name}' is not in DEVICE memory, and {queued} loads wait before its own, more than "
        f"the requests for it have time for; try again in {back_s:.1f} s, or raise "
        f"--device-memory"
    )


def must_start(name: str, key: int | str) -> str:
    """What is said to a request in the middle of a sequence that nobody knows; as Triton says it."""
    return (
        f"inference request for sequence {key} to model '{name}' must specify the START flag on the "
        f"first request of the sequence"
    )


def no_slot(name: str, slots: int) -> str:
    """What is said to a sequence that found no slot in time; Triton's words first."""
    return (
        f"timeout of the corresponding sequence has been expired: model '{name}' has all of its "
        f"{slots} slots in use; end sequences, or raise max_batch_size (direct) or candidates (oldest)"
    )
