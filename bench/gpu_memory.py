"""What a GPU's memory costs by the driver alone: chunks, pinning, copies, mapping, in this process.

The same classes as in the server, on the same calls; the mover's end and a worker's end side by side.
Runs on any `Driver`, so a test runs all of it on one that is not a GPU.

Called by the scenario `gpu`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from overcommit.bench.report import Figure, Report
from overcommit.runtime import _shm
from overcommit.runtime.allocator import ChunkAllocator, Extent
from overcommit.runtime.arena import Arena
from overcommit.runtime.chunk_table import ChunkTable, small_share_of
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import LARGE_CHUNK_BYTES, MIB, PIN_BYTES
from overcommit.runtime.cuda_arena import CudaArena, CudaRanges
from overcommit.runtime.cuda_copy import CudaCopier
from overcommit.runtime.driver import Driver
from overcommit.runtime.places import Base, Places

T = TypeVar("T")
SIZES: Final = (10, 32, 100, 256, 1000, 4000, 16_000, 60_000)  # MB
ROUNDS: Final = 5
ATTACH_ROUNDS: Final = 50
LIMIT_FROM_MB: Final = 256  # from here on a warm load must reach the limit ...
LIMIT_SHARE: Final = 0.95  # ... up to this
FIXED_MS_MAX: Final = 1.0
ATTACH_MS_MAX: Final = 2.0


class GpuMemory:
    """A mover's arena of `device_bytes`, a HOST arena of `host_bytes`, and a worker's ranges."""

    def __init__(
        self, driver: Driver, device: int, device_bytes: int, host_bytes: int, report: Report
    ) -> None:
        self.driver = driver
        self.report = report
        self.context = driver.primary_context_retain(device)
        driver.context_set_current(self.context)
        table = ChunkTable(device_bytes)
        self.made, self.taken = Chunks(driver, table, device), Chunks(driver, table, device)
        made: dict[int, list[float]] = {}
        taken: list[float] = []
        while not self.made.is_complete:
            nbytes = table.nbytes(len(self.made))
            fd, took_us = _timed(self.made.make)
            made.setdefault(nbytes, []).append(took_us)
            taken.append(_timed(lambda fd=fd: self.taken.take(fd))[1])  # type: ignore[misc]
        self.arena = CudaArena(self.made)
        address, map_us = _timed(lambda: self.arena.map_all(True))
        self.device = Base("device", address, self.arena.nbytes)
        self.host = Arena.create("bench", host_bytes)
        self.host_address = self.host.map_all(True)
        self.copier = CudaCopier(driver, device, self.host_address)
        for nbytes, times in sorted(made.items()):
            name = f"make and export a chunk of {nbytes // MIB} MiB"
            report.add("chunks", Figure(name, statistics.median(times), "us"))
        report.add(
            "chunks",
            Figure("take over a chunk", statistics.median(taken), "us"),
            Figure("map the whole arena", map_us / 1000, "ms", note=f"{len(table)} chunks"),
        )
        self._pin()

    def _pin(self) -> None:
        populate_us = pin_us = longest_us = 0.0
        for at in range(0, self.host.nbytes, PIN_BYTES):
            part = min(PIN_BYTES, self.host.nbytes - at)
            address = self.host_address + at
            populate_us += _timed(lambda a=address, n=part: _shm.populate(a, n, True))[1]  # type: ignore[misc]
            took_us = _timed(lambda a=address, n=part: self.copier.pin(a, n))[1]  # type: ignore[misc]
            pin_us, longest_us = pin_us + took_us, max(longest_us, took_us)
        self.report.add(
            "pinning",
            Figure("touch", self.host.nbytes / populate_us / 1000, "GB/s"),
            Figure("register", self.host.nbytes / max(pin_us, 1) / 1000, "GB/s"),
            Figure("longest call", longest_us / 1000, "ms", note="the driver's lock is held"),
        )

    # --- copies ---------------------------------------------------------------------------------
    def limit_gb_s(self) -> float:
        """Measure what copies of 64 MiB from registered memory reach, one by one on one stream."""
        driver, stream = self.driver, self.driver.stream_create(is_urgent=True)
        nbytes = min(LARGE_CHUNK_BYTES, self.device.nbytes, self.host.nbytes)
        # As many as one registration holds: a copy reaches over no border of that.
        count = min(PIN_BYTES, self.device.nbytes, self.host.nbytes) // nbytes
        best = 0.0
        for _ in range(ROUNDS):
            began, moved = time.perf_counter(), 0
            for _ in range(4):
                for number in range(count):
                    source = self.host_address + number * nbytes
                    target = self.device.address + number * nbytes
                    driver.memcpy_htod_async(target, source, nbytes, stream)
                    moved += nbytes
            driver.stream_synchronize(stream)
            best = max(best, moved / (time.perf_counter() - began) / 1e9)
        driver.stream_destroy(stream)
        return best

    def sweep(self, limit_gb_s: float, sizes_mb: Sequence[int] = SIZES) -> None:
        """Load each size from HOST as the mover does, into chunks that it gets when others went."""
        allocator = ChunkAllocator(
            self.device.nbytes, can_split=False, small_share=small_share_of(self.device.nbytes)
        )
        points: list[tuple[int, float]] = []
        for size in sizes_mb:
            nbytes = size * 10**6
            extents = allocator.try_allocate(nbytes) if nbytes <= self.host.nbytes else None
            if extents is None:
                self.report.notes.append(f"{size} MB do not fit here, and were left out")
                continue
            places = Places(self.device, extents, nbytes)
            best_us = min(_timed(lambda p=places, n=nbytes: self._load(p, n))[1] for _ in range(5))  # type: ignore[misc]
            allocator.free(extents)
            points.append((nbytes, best_us / 1e6))
            rate = nbytes / best_us / 1000
            self.report.add(
                "warm loads",
                Figure(f"{size} MB", rate, "GB/s", limit_gb_s, f"{best_us / 1e3:.2f} ms"),
            )
            if size >= LIMIT_FROM_MB:
                self.report.expect(
                    f"{size} MB reach {LIMIT_SHARE:.0%} of the copy limit",
                    rate >= LIMIT_SHARE * limit_gb_s,
                    f"{rate / limit_gb_s:.1%}",
                )
        if len(points) > 1:
            fixed_ms = fit(points)[0] * 1000
            self.report.add("warm loads", Figure("fixed cost", fixed_ms, "ms", note="fitted"))
            self.report.expect(
                f"the fixed cost of a load is {FIXED_MS_MAX:g} ms at most",
                fixed_ms <= FIXED_MS_MAX,
                f"{fixed_ms:.3f} ms",
            )

    def _load(self, places: Places, nbytes: int) -> None:
        self.copier.copy([(self.host_address, nbytes)], places.spans(0, nbytes), "foreground")

    # --- mapping --------------------------------------------------------------------------------
    def attach(self, sizes_mb: Sequence[int] = SIZES) -> None:
        """Map each size in a worker's range, as it does for what is resident already."""
        allocator = ChunkAllocator(
            self.device.nbytes, can_split=False, small_share=small_share_of(self.device.nbytes)
        )
        ranges = CudaRanges(self.taken)
        for size in sizes_mb:
            nbytes = size * 10**6
            extents = allocator.try_allocate(nbytes)
            if extents is None:
                continue
            times = [self._attach_us(ranges, nbytes, extents) for _ in range(ATTACH_ROUNDS)]
            allocator.free(extents)
            middle, worst = statistics.median(times) / 1000, max(times) / 1000
            chunks = len(self.made.table.pieces(extents))
            note = f"{chunks} chunks, {worst:.3f} ms at worst"
            self.report.add("attach", Figure(f"{size} MB", middle, "ms", note=note))
            self.report.expect(
                f"attach of {size} MB takes less than {ATTACH_MS_MAX:g} ms",
                middle < ATTACH_MS_MAX,
                f"{middle:.3f} ms",
            )

    def _attach_us(self, ranges: CudaRanges, nbytes: int, extents: tuple[Extent, ...]) -> float:
        mapping = ranges.open(nbytes)
        took_us = _timed(lambda: mapping.map(extents, 1))[1]
        mapping.close()
        return took_us

    # --- what it holds --------------------------------------------------------------------------
    def check(self) -> None:
        """Send bytes that are known through chunks of both sizes and back."""
        nbytes = min(self.device.nbytes, self.host.nbytes // 2, PIN_BYTES)
        pattern = os.urandom(4096)
        source = _shm.view(self.host_address, nbytes, True)
        source[:] = pattern * (nbytes // 4096) + pattern[: nbytes % 4096]
        self.copier.copy(
            [(self.host_address, nbytes)], [(self.device.address, nbytes)], "foreground"
        )
        back = self.host_address + self.host.nbytes // 2
        stream = self.driver.stream_create(is_urgent=False)
        at, table = 0, self.made.table
        while at < nbytes:  # by chunk: whether one copy may reach over several is not known
            chunk = table.chunk_at(at)
            part = min(nbytes - at, table.offset(chunk) + table.nbytes(chunk) - at)
            part = min(part, PIN_BYTES - (back + at - self.host_address) % PIN_BYTES)
            self.driver.memcpy_dtoh_async(back + at, self.device.address + at, part, stream)
            at += part
        self.driver.stream_synchronize(stream)
        self.driver.stream_destroy(stream)
        is_equal = _shm.view(back, nbytes, False) == source
        self.report.expect("bytes come back from the device as they went", is_equal)

    def close(self) -> None:
        """Let go of everything."""
        self.arena.close()
        self.taken.close()
        for at in range(0, self.host.nbytes, PIN_BYTES):
            self.driver.host_unregister(self.host_address + at)
        self.host.close()


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit seconds = a + bytes / b; return a (s) and b (bytes/s).

    Weighted by 1 / seconds^2, so that the small sizes decide about a and the large ones about b.
    """
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    over = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = over / sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    return mean_y - slope * mean_x, 1 / slope


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """Call it; return what it gave and the microseconds that it took."""
    began_ns = time.perf_counter_ns()
    value = call()
    return value, (time.perf_counter_ns() - began_ns) / 1000
