"""What a model on a GPU costs by torch: a graph after its weights came back elsewhere, and others' loaders.

Only a GPU runs this; what it calls of ours is tested without one.  Called by the scenario `gpu`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from overcommit.bench.gpu_memory import GpuMemory
from overcommit.bench.report import Figure, Report
from overcommit.kernels import cuda, gather, timing
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.chunk_table import small_share_of
from overcommit.runtime.cuda_arena import CudaRanges
from overcommit.runtime.device_limits import COPY_FROM_BYTES
from overcommit.runtime.engines.cuda_backend import CudaBackend
from overcommit.runtime.engines.places import tensor_over
from overcommit.runtime.places import Places

WIDTH: Final = 2048
LAYERS: Final = 8  # 128 MiB of FP32
REPLAYS: Final = 50
AFTER_RELOAD_MAX: Final = 1.05
REQUESTS: Final = 64
REQUEST_BYTES: Final = tuple(1024 << shift for shift in (0, 2, 4, 6, 8, 10))
GATHER_GAIN: Final = 3.0
BASELINE_MB: Final = 1000


def graph_after_reload(memory: GpuMemory, place: str, report: Report) -> None:
    """Capture over mapped weights, bring other weights to other chunks of the range, replay."""
    backend = CudaBackend(place)
    nbytes = LAYERS * WIDTH * WIDTH * 4
    allocator = ChunkAllocator(
        memory.device.nbytes, can_split=False, small_share=small_share_of(memory.device.nbytes)
    )
    first, second = allocator.try_allocate(nbytes), allocator.try_allocate(nbytes)
    if first is None or second is None:
        report.notes.append("no room for two models of 128 MiB: graphs were left out")
        return
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(LAYERS, WIDTH, WIDTH, generator=generator) / 45 for _ in range(2)]
    for values, extents in zip(weights, (first, second), strict=True):
        spans = Places(memory.device, extents, nbytes).spans(0, nbytes)
        memory.copier.copy([(values.data_ptr(), nbytes)], spans, "foreground")
    mapping = CudaRanges(memory.taken).open(nbytes)
    mapping.map(first, 1)
    bound = tensor_over(mapping.view()).view(torch.float32).view(LAYERS, WIDTH, WIDTH)

    def call(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = tensors["x"]
        for layer in bound:
            x = torch.relu(x @ layer)
        return {"y": x}

    x = {"x": torch.randn(8, WIDTH, generator=generator).to(place)}
    with backend.entered(0), torch.inference_mode():
        for _ in range(3):
            call(x)
        graph = backend.capture(0, call, x)

        def replay() -> tuple[torch.Tensor, float]:
            began = time.perf_counter()
            y = graph.replay(x)["y"].clone()
            backend.settle(0)
            return y, (time.perf_counter() - began) * 1e6

        steady = statistics.median(replay()[1] for _ in range(REPLAYS))
        mapping.unmap()
        began = time.perf_counter()
        mapping.map(second, 2)
        map_us = (time.perf_counter() - began) * 1e6
        got, after_us = replay()
        expected = x["x"]
        for layer in weights[1].to(place):
            expected = torch.relu(expected @ layer)
        is_right = torch.equal(got, expected)
    mapping.close()
    report.add(
        "graphs",
        Figure("replay, steady", steady, "us"),
        Figure("first replay after a reload", after_us, "us", steady, f"mapped in {map_us:.0f} us"),
    )
    report.expect("a graph replays over weights that came to other chunks", is_right)
    report.expect(
        f"the first replay after a reload takes {AFTER_RELOAD_MAX:g} of a steady one at most",
        after_us <= AFTER_RELOAD_MAX * steady,
        f"{after_us / steady:.3f}",
    )


def gather_against_copies(report: Report) -> None:
    """Bring 64 requests to the GPU in one launch, and in a copy for each, by their size."""
    faster_from = 0
    for nbytes in REQUEST_BYTES:
        one_ns, many_ns = _gathered_and_copied(nbytes)
        report.add(
            "gather",
            Figure(f"64 requests of {nbytes // 1024} KiB, one launch", one_ns / 1000, "us"),
            Figure(f"64 requests of {nbytes // 1024} KiB, copies", many_ns / 1000, "us"),
        )
        if not faster_from and many_ns < one_ns:
            faster_from = nbytes
        if nbytes == REQUEST_BYTES[0]:
            report.expect(
                f"gather is {GATHER_GAIN:g} times as fast as a copy for each small request",
                many_ns >= GATHER_GAIN * one_ns,
                f"{many_ns / one_ns:.2f}",
            )
    report.notes.append(
        f"COPY_FROM_BYTES is {COPY_FROM_BYTES}; copies were faster from {faster_from or 'nowhere'} on"
    )


def _gathered_and_copied(nbytes: int) -> tuple[float, float]:
    """Return the nanoseconds of a launch with its table, and of as many copies."""
    cupy = cuda.cupy()
    pinned = cupy.cuda.alloc_pinned_memory(REQUESTS * nbytes)
    host = np.frombuffer(pinned, np.uint8, REQUESTS * nbytes)
    blocks = [host[n * nbytes : (n + 1) * nbytes] for n in range(REQUESTS)]
    target = cupy.empty((REQUESTS, nbytes), cupy.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)

    def copies() -> None:
        for number, block in enumerate(blocks):
            target[number].data.copy_from_host_async(
                ctypes.c_void_p(block.ctypes.data), nbytes, stream
            )
        stream.synchronize()

    def launch() -> None:
        entries = [
            (block.ctypes.data, 1, 1, nbytes // 8, 0, target[number].data.ptr, 0, 0)
            for number, block in enumerate(blocks)
        ]
        with stream:
            table = gather.launch(entries, "UINT64", "UINT64")
        stream.synchronize()
        del table

    return timing.best_ns(launch), timing.best_ns(copies)


def baselines(place: str, limit_gb_s: float, report: Report) -> None:
    """Bring 1 GB of tensors to the GPU as others do, from memory or from the page cache."""
    tensors = {f"t{n}": torch.randn(BASELINE_MB * 10**6 // 16 // 4) for n in range(16)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())

    def note(name: str, load: Callable[[], Any]) -> None:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            held = load()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            del held
        report.add("others", Figure(name, nbytes / min(times) / 1e9, "GB/s", limit_gb_s))

    note("torch .to, pageable", lambda: [tensor.to(place) for tensor in tensors.values()])
    pinned = [tensor.pin_memory() for tensor in tensors.values()]
    note("torch .to, pinned", lambda: [tensor.to(place, non_blocking=True) for tensor in pinned])
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import load_file, save_file

        path = str(Path(folder) / "model.safetensors")
        save_file(tensors, path)
        note("safetensors, page cache", lambda: load_file(path, device=place))
        if importlib.util.find_spec("fastsafetensors") is not None:
            note("fastsafetensors, page cache", lambda: _fastsafetensors(path, place))
    if importlib.util.find_spec("torch_memory_saver") is not None:
        _memory_saver(place, nbytes, limit_gb_s, report)
    for name in ("fastsafetensors", "torch_memory_saver"):
        if importlib.util.find_spec(name) is None:
            report.notes.append(f"{name} is not installed, and was left out")


def _fastsafetensors(path: str, place: str) -> list[torch.Tensor]:
    import fastsafetensors  # type: ignore[import-not-found]

    with fastsafetensors.fastsafe_open(filenames=[path], nogds=True, device=place) as file:
        return [file.get_tensor(name).clone() for name in file.keys()]  # noqa: SIM118


def _memory_saver(place: str, nbytes: int, limit_gb_s: float, report: Report) -> None:
    from torch_memory_saver import torch_memory_saver  # type: ignore[import-not-found]

    with torch_memory_saver.region(enable_cpu_backup=True):
        held = torch.zeros(nbytes, dtype=torch.uint8, device=place)
    torch_memory_saver.pause()
    began = time.perf_counter()
    torch_memory_saver.resume()
    torch.cuda.synchronize()
    rate = nbytes / (time.perf_counter() - began) / 1e9
    del held
    report.add("others", Figure("torch_memory_saver, resume", rate, "GB/s", limit_gb_s))
