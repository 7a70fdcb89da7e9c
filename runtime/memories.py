"""Which model's demand is whose: versions come and go, what was learnt stays with the model's name.

Owns what was read from the file and no version has taken up yet, and the snapshot that is being made for
the next file.

Invariants
 1. A version begins with what its predecessor of the same name was known for, or with what the file
    said; its own past comes first.
 2. A snapshot is made piece by piece (PREFETCH_LOOKS models a step) and written in a thread, one at
    a time; nothing is written if nothing was learnt since the last one.

Called by `prefetching`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from overcommit.runtime import demand_file
from overcommit.runtime.prefetch import Prefetcher
from overcommit.runtime.prefetch_limits import PREFETCH_LOOKS, PREFETCH_MODELS_MAX, PREFETCH_SAVE_S

log = logging.getLogger("overcommit.prefetch")


class Memories:
    """See the module.  `name_of(slot)` is the model's name, None for a slot that is free."""

    def __init__(
        self, folder: Path, prefetcher: Prefetcher, name_of: Callable[[int], str | None]
    ) -> None:
        self._folder = folder
        self._prefetcher = prefetcher
        self._name_of = name_of
        self._learnt = demand_file.read(folder)
        self._slots: dict[str, int] = {}  # the latest version of a name that has a past
        self._is_dirty = False
        self._saved_ns: int | None = None
        self._to_do: list[int] | None = None
        self._records: list[bytes] = []
        self._writer: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._learnt)

    def on_ready(self, slot: int, name: str) -> None:
        """A version can be served: it takes up what is known of its name."""
        fields = self._learnt.pop(name, None)
        if fields is None and (former := self._slots.get(name)) is not None and former != slot:
            demand = self._prefetcher.demand(former)
            fields = None if demand is None else demand_file.encode(demand)
        if fields is not None:
            demand = demand_file.decode(fields, self._prefetcher.pool)
            if demand is not None:
                self._prefetcher.adopt(slot, demand)
                self._slots[name] = slot

    def on_use(self, slot: int) -> None:
        """The version was used."""
        self._is_dirty = True
        name = self._name_of(slot)
        if name is not None:
            self._slots[name] = slot

    def on_removed(self, slot: int, name: str) -> None:
        """The version is served no more; its name may come back."""
        demand = self._prefetcher.forget(slot)
        if self._slots.get(name) == slot:
            del self._slots[name]
            if demand is not None and len(self._learnt) < PREFETCH_MODELS_MAX:
                self._learnt[name] = demand_file.encode(demand)

    # --- the file -------------------------------------------------------------------------------
    def step(self, now_ns: int) -> None:
        """Go on with the snapshot, or begin one when it is time."""
        if self._to_do is None:
            self._saved_ns = now_ns if self._saved_ns is None else self._saved_ns
            if not self._is_dirty or now_ns - self._saved_ns < PREFETCH_SAVE_S * 1e9:
                return
            self._saved_ns = now_ns
            self._begin()
        self._go_on(PREFETCH_LOOKS)
        if not self._to_do and (self._writer is None or not self._writer.is_alive()):
            records, self._records, self._to_do = self._records, [], None
            self._writer = threading.Thread(
                target=_write, args=(self._folder, records), name="demand", daemon=True
            )
            self._writer.start()

    def close(self) -> None:
        """Write what was learnt since the last time."""
        if self._writer is not None:
            self._writer.join()
        if self._is_dirty or self._to_do is not None:
            self._begin()
            self._go_on(PREFETCH_MODELS_MAX)
            _write(self._folder, self._records)

    def _begin(self) -> None:
        self._is_dirty = False
        self._to_do = list(self._slots.values())
        self._records = [demand_file.record_of(name, f) for name, f in self._learnt.items()]

    def _go_on(self, count: int) -> None:
        assert self._to_do is not None
        for slot in self._to_do[-count:]:
            demand, name = self._prefetcher.demand(slot), self._name_of(slot)
            if demand is not None and name is not None:
                self._records.append(demand_file.record_of(name, demand_file.encode(demand)))
        del self._to_do[-count:]


def _write(folder: Path, records: list[bytes]) -> None:
    try:
        demand_file.write(folder, records)
    except OSError as error:
        log.warning("what was learnt of the models' demand could not be written: %s", error)
