"""The queue of versions that need an image, and the packer process that makes them.

One packer at a time: packing is bound by the disk, and foreground loads go first.  The packer may
run a model's code, so it is a process of its own; when it dies over a version twice, that version is
broken, and nothing else is disturbed.

Invariants
 1. A slot is queued or being packed at most once.
 2. Every slot that was added ends in exactly one `on_done(slot, PackDone)`, unless it was dropped.
 3. A version whose packing makes no progress for `pack_timeout_s` is broken, and its packer is killed: a
    model's own code may hang, and all others wait behind it.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Final

from overcommit.runtime.config import START_TIMEOUT_S, Settings
from overcommit.runtime.messages import LogLevel, Ready, Start, Stop
from overcommit.runtime.pack_limits import PACK_REMARK_S, PACK_TRIES_MAX, PACKER_IDLE_S
from overcommit.runtime.packer_messages import Pack, PackDone, PackProgress
from overcommit.runtime.process import Process

log = logging.getLogger("overcommit.packing")

TELL_PERIOD_NS: Final = 5_000_000_000


class Packing:
    """The pack queue.

    `start_packer` makes the process, `describe(slot)` the job (None: not wanted any more).
    """

    def __init__(
        self,
        settings: Settings,
        start_packer: Callable[[], Process | None],
        describe: Callable[[int, int], Pack | None],
        on_done: Callable[[int, PackDone], None],
    ) -> None:
        self._settings = settings
        self._start_packer = start_packer
        self._describe = describe
        self._on_done = on_done
        # Dicts as ordered sets: with 20,000 versions to pack, looking through a queue takes seconds.
        self._urgent: dict[int, None] = {}
        self._queue: dict[int, None] = {}
        self._packed = 0  # since the queue was empty
        self._told_ns = 0
        self._tries: dict[int, int] = {}
        self._job = 0
        self._idle_since_ns = 0
        self._is_ready = False
        self._moved_ns = 0  # when the packer was started, given its job, or told of progress
        self._remarked_ns = 0
        self._verdict = ""  # why it was killed
        self._title = ""  # of what is being packed
        self._epoch = self._deaths = 0
        self._level = ""  # that a client has set; "": none has
        self.current: int | None = None
        self.progress: tuple[int, int] = (0, 0)
        self.process: Process | None = None

    def __len__(self) -> int:
        """Versions that still need packing, the current one included."""
        return len(self._urgent) + len(self._queue) + (self.current is not None)

    def add(self, slot: int) -> None:
        """Queue a version."""
        if slot != self.current and slot not in self._urgent:
            self._queue[slot] = None

    def hurry(self, slot: int) -> bool:
        """Somebody waits for this one: it goes before those that nobody waits for.

        False: it is neither queued nor being packed.
        """
        if slot in self._queue:
            del self._queue[slot]
            self._urgent[slot] = None
        return slot in self._urgent or slot == self.current

    def share_done(self, slot: int) -> float | None:
        """How much of a version's image is written, from 0 to 1; None: it is not being packed."""
        done, total = self.progress
        return done / total if slot == self.current and total else None

    def drop(self, slot: int) -> None:
        """The version is gone."""
        self._urgent.pop(slot, None)
        self._queue.pop(slot, None)

    def _take(self) -> int | None:
        waiting = self._urgent or self._queue
        if not waiting:
            return None
        slot = next(iter(waiting))
        del waiting[slot]
        return slot

    def step(self, now_ns: int) -> None:
        """Start a packer when there is work, give it the next job, send it home when idle."""
        self._tell(now_ns)
        self._watch(now_ns)
        if (self._urgent or self._queue) and self.process is None:
            self.process = self._start_packer()
            if self.process is not None:
                self._epoch += 1
                start = Start(kind="packer", seat=0, epoch=self._epoch, settings=self._settings)
                self.process.control.post(start)
                self._tell_level()
                self._moved_ns = now_ns
        if self.process is None or not self._is_ready or self.process.kill_asked:
            return
        if self.current is not None:
            return
        while (slot := self._take()) is not None:
            self._job += 1
            job = self._describe(slot, self._job)
            if job is not None:
                log.debug("packing %s version %s", job.name, job.version)
                self.current, self.progress = slot, (0, 0)
                self._title = f"model '{job.name}' version {job.version}"
                self._moved_ns = self._remarked_ns = now_ns
                self.process.control.post(job)
                return
        if not self._idle_since_ns:
            self._idle_since_ns = now_ns
        elif now_ns - self._idle_since_ns > PACKER_IDLE_S * 1e9:
            self.process.control.post(Stop())
            self._is_ready = False

    def _watch(self, now_ns: int) -> None:
        """Kill a packer that does not get on; what it was at is broken when it is reaped."""
        process = self.process
        if process is None or process.kill_asked or (self._is_ready and self.current is None):
            return
        still_s = (now_ns - self._moved_ns) / 1e9
        if self.current is None:
            if still_s > START_TIMEOUT_S:
                log.error("the packer did not get ready in %.0f s: killed", still_s)
                process.kill()
            return
        limit_s = self._settings.pack_timeout_s
        if still_s > limit_s:
            self._verdict = (
                f"{self._title}: packing it made no progress for {limit_s:g} s and was given up: its "
                "code hangs (in its load, or a trial run), or it takes longer to read or compile than "
                "that; then give --pack-timeout more seconds, and load it again"
            )
            log.error("packing of %s: no progress for %.0f s: killed", self._title, still_s)
            process.kill()
        elif now_ns - max(self._remarked_ns, self._moved_ns) > PACK_REMARK_S * 1e9:
            self._remarked_ns = now_ns
            log.warning(
                "packing of %s makes no progress since %.0f s, and %d others wait; it is given up after "
                "%g s (--pack-timeout)",
                *(self._title, still_s, len(self) - 1, limit_s),
            )

    def describe(self) -> list[dict[str, object]]:
        """Return one row for the packer, if there is one, for status."""
        if self.process is None:
            return []
        state = "LIVE" if self._is_ready else "STARTING"
        return [
            {
                "kind": "packer",
                "seat": 0,
                "site": 0,
                "epoch": self._epoch,
                "pid": self.process.pid,
                "state": "DYING" if self.process.kill_asked else state,
                "deaths": self._deaths,
            }
        ]

    def set_level(self, level: str) -> None:
        """Log from this level on: this packer, and those that follow it."""
        self._level = level
        with contextlib.suppress(OSError):  # it is dying: the next one is told
            self._tell_level()

    def _tell_level(self) -> None:
        # Who was forked has the level of the fork server's start.
        if self._level and self.process is not None:
            self.process.control.post(LogLevel(level=self._level))

    def _tell(self, now_ns: int) -> None:
        """Log how far packing has come, now and then and at its end."""
        left = len(self)
        if not self._packed or (left and now_ns - self._told_ns < TELL_PERIOD_NS):
            return
        log.info("%d versions packed, %d to go", self._packed, left)
        self._told_ns = now_ns
        if not left:
            self._packed = 0

    def on_message(self, message: object, now_ns: int) -> None:
        """Handle what the packer said."""
        if isinstance(message, Ready):
            self._is_ready = True
        elif isinstance(message, PackProgress) and message.job == self._job:
            self._moved_ns = now_ns
            if message.total:
                self.progress = (message.done, message.total)
        elif isinstance(message, PackDone) and message.job == self._job:
            self._finish(message)
        self._idle_since_ns = 0
        self.step(now_ns)

    def on_dead(self, ending: str) -> None:
        """The packer is reaped; its job is tried once more."""
        self.process, self._is_ready, self._idle_since_ns = None, False, 0
        self._deaths += 1
        verdict, self._verdict = self._verdict, ""
        slot = self.current
        if slot is None:
            return
        if verdict:
            self._finish(PackDone(job=self._job, ok=False, message=verdict))
            return
        self._tries[slot] = self._tries.get(slot, 0) + 1
        if self._tries[slot] < PACK_TRIES_MAX:
            self.current = None
            self._urgent = {slot: None, **self._urgent}
            return
        message = (
            f"{self._title}: the process that packs died over it {PACK_TRIES_MAX} times ({ending}): its "
            "code, or the library that reads its files, ended it. A file may be damaged, memory too short "
            "(SIGKILL), or its code calls os._exit; mend it, and load it again"
        )
        self._finish(PackDone(job=self._job, ok=False, message=message))

    def _finish(self, done: PackDone) -> None:
        slot, self.current = self.current, None
        if slot is not None:
            self._tries.pop(slot, None)
            self._packed += 1
            self._on_done(slot, done)

    def close(self) -> None:
        """End the packer."""
        if self.process is not None:
            self.process.kill()
            self.process.close()
            self.process = None
