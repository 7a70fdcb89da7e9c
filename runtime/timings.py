"""When each stage of an activation was: what the supervisor, the mover and the workers noted.

All instants are of CLOCK_MONOTONIC, one clock for all processes, in nanoseconds.  In order:

    asked       the worker sends Activate                     | Attach
    decided     the supervisor starts the first load          | Activation
    received    the mover has its message                     |
    began       its first step begins                         |
    ended       the last byte is in place                     |
    done        the supervisor knows, and publishes           |
    placed      the worker has Placed                         | Attach
    mapped      the weights are mapped; a lease can be had    |
    ready       the program is bound, the lane may run        |

An Attach without an Activation of its slot and generation found the weights on DEVICE.  A part that
another version's load brings is in that one's record.

Kept for status, a bounded number of each.  Called by the supervisor's activations.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field

from overcommit.runtime.config import ACTIVATIONS_KEPT, ATTACHES_KEPT, EXTENTS_SHOWN_MAX
from overcommit.runtime.messages import Extents
from overcommit.runtime.mover_messages import Load, LoadDone
from overcommit.runtime.wall import Wall
from overcommit.runtime.worker_messages import Attach


@dataclass(slots=True, frozen=True)
class Activation:
    """One finished load: what it moved, and how long each stage took (wall time)."""

    slot: int
    generation: int
    source: str
    nbytes: int
    read_ns: int
    copy_ns: int
    total_ns: int
    direct: bool
    decided_ns: int
    received_ns: int
    began_ns: int
    ended_ns: int
    done_ns: int
    host: Extents  # where it was put; empty where there are more than EXTENTS_SHOWN_MAX
    device: Extents


@dataclass(slots=True, frozen=True)
class Attached:
    """One worker's mapping of a version."""

    worker: int
    nbytes: int
    attach: Attach


@dataclass(slots=True)
class _Coming:
    """An activation under way: what the loads that were started for it have done so far."""

    decided_ns: int
    source: str
    nbytes: int = 0
    received_ns: int = 0
    read: Wall = field(default_factory=Wall)
    copy: Wall = field(default_factory=Wall)
    steps: Wall = field(default_factory=Wall)
    direct: bool = True
    host: Extents = ()
    device: Extents = ()

    def add(self, load: Load, done: LoadDone) -> None:
        """Take note of one load that ended well."""
        self.nbytes += load.nbytes
        self.host += load.host or ()
        self.device += load.device or ()
        self.received_ns = self.received_ns or done.received_ns
        self.read.add(Wall(done.read_began_ns, done.read_began_ns + done.read_ns))
        self.copy.add(Wall(done.copy_began_ns, done.copy_began_ns + done.copy_ns))
        self.steps.add(Wall(done.began_ns, done.ended_ns))
        if load.source == "disk":
            self.source = "disk"
            self.direct = self.direct and done.direct


class Timings:
    """The records of late, and what was moved since the start."""

    def __init__(self) -> None:
        self.activations: collections.deque[Activation] = collections.deque(maxlen=ACTIVATIONS_KEPT)
        self.attaches: collections.deque[Attached] = collections.deque(maxlen=ATTACHES_KEPT)
        self.bytes_read = 0
        self.bytes_copied = 0
        self._coming: dict[int, _Coming] = {}  # by slot

    def on_start(self, load: Load, now_ns: int) -> None:
        """A load begins; one that fills HOST alone, from wherever, is no activation."""
        if load.device is not None and load.source != "device":
            self._coming.setdefault(load.slot, _Coming(now_ns, load.source))

    def on_load(self, load: Load, done: LoadDone) -> None:
        """A load has ended well."""
        self.bytes_read += done.read_bytes
        self.bytes_copied += load.nbytes if load.device and load.host else 0
        if load.source == "device":
            return
        if load.device is not None and (coming := self._coming.get(load.slot)) is not None:
            coming.add(load, done)

    def on_publish(self, slot: int, generation: int, now_ns: int) -> None:
        """A version is on DEVICE; if loads were started for it, note how they went."""
        coming = self._coming.pop(slot, None)
        if coming is None:
            return
        self.activations.append(
            Activation(
                slot=slot,
                generation=generation,
                source=coming.source,
                nbytes=coming.nbytes,
                read_ns=coming.read.ended_ns - coming.read.began_ns,
                copy_ns=coming.copy.ended_ns - coming.copy.began_ns,
                total_ns=now_ns - coming.decided_ns,
                direct=coming.direct and coming.source == "disk",
                decided_ns=coming.decided_ns,
                received_ns=coming.received_ns,
                began_ns=coming.steps.began_ns,
                ended_ns=coming.steps.ended_ns,
                done_ns=now_ns,
                host=_shown(coming.host),
                device=_shown(coming.device),
            )
        )

    def forget(self, slot: int) -> None:
        """The activation was refused, or the version is gone."""
        self._coming.pop(slot, None)

    def on_attaches(self, worker: int, attaches: Iterable[tuple[int, Attach]]) -> None:
        """A worker has told of its mappings; each with the bytes of its version."""
        self.attaches.extend(Attached(worker, nbytes, attach) for nbytes, attach in attaches)


def _shown(extents: Extents) -> Extents:
    return extents if len(extents) <= EXTENTS_SHOWN_MAX else ()
