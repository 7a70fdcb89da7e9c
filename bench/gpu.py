"""Scenario `gpu`: what only a GPU can show, in one run of less than 8 minutes.

 1. chunks and pinning       what making, exporting, taking over and registering cost
 2. warm loads               10 MB to 60 GB from registered HOST, against a copy's own limit
 3. attach                   mapping what is resident
 4. graphs                   a captured graph after its weights came back in other chunks
 5. others                   torch, safetensors and what else is installed, against the same limit
 6. kernels                  gather, scatter, digest, unpack, image: bits first, then time
 7. HTTP                     what a client waits for a BERT: resident, warm and cold
 8. kills under load         the scenario `chaos`, with DEVICE on the GPU: HTTP, workers and mover; weights
                             are held against their digests there

Without a GPU that can be used it says so, and that is all: no figure, no condition, status 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Final

from overcommit.bench import chaos, gpu_http
from overcommit.bench.gpu_memory import GpuMemory
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Figure, Report
from overcommit.kernels import cuda, digest, gather, image, scatter, timing, unpack
from overcommit.runtime import device_choice
from overcommit.runtime.config import GIB, Settings
from overcommit.runtime.cuda_driver import CudaDriver
from overcommit.runtime.gpu import Gpu
from overcommit.runtime.telemetry import Telemetry

DEVICE_SHARE: Final = 0.8  # of what is free on the GPU
HOST_SHARE: Final = 0.6  # of what is available
QUICK_BYTES: Final = 4 * GIB
HTTP_QUICK_S: Final = 3.0
NO_GPU: Final = "no GPU: nothing was measured"


def run(options: Options, report: Report) -> None:
    """Run every part; one that fails is a missed condition, and the others go on."""
    gpu = device_choice.choose(Settings())[0]
    if gpu is None:
        report.notes.append(NO_GPU)
        report.step(NO_GPU)
        return
    report.settings = {"gpu": gpu.device, "bus": gpu.bus_id, "GiB": f"{gpu.total_bytes / GIB:.1f}"}
    limits: list[float] = []
    _part(report, "memory", lambda: limits.append(_memory(options, report, gpu)))
    from overcommit.bench import gpu_torch  # imports torch

    if limits:
        place = f"cuda:{gpu.device}"
        _part(report, "others", lambda: gpu_torch.baselines(place, limits[0], report))
    if cuda.has_gpu():
        for kernel in (gather, scatter, digest, image):
            _part(report, kernel.__name__, lambda kernel=kernel: _kernel(report, kernel))  # type: ignore[misc]
        _part(report, "unpack", lambda: _unpack(report))
        _part(report, "gather against copies", lambda: gpu_torch.gather_against_copies(report))
    else:
        report.notes.append("cupy is not installed: kernels were left out")
    _part(report, "HTTP", lambda: _http(options, report, gpu))
    _part(report, "kills under load", lambda: _kills(options, report))


def _part(report: Report, name: str, run_it: Callable[[], None]) -> None:
    report.step(name)
    try:
        run_it()
    except Exception as error:  # a part's boundary: a run on a GPU is too dear to be lost to one
        report.expect(f"{name} ran", False, f"{type(error).__name__}: {error}")


def _memory(options: Options, report: Report, gpu: Gpu) -> float:
    from overcommit.bench import gpu_torch

    device_bytes = int(gpu.free_bytes * DEVICE_SHARE)
    host_bytes = int(Telemetry().host_available_bytes() * HOST_SHARE)
    host_bytes = min(host_bytes, device_bytes) // (1 << 21) * (1 << 21)
    if options.quick:
        device_bytes, host_bytes = min(device_bytes, QUICK_BYTES), min(host_bytes, QUICK_BYTES)
    device_choice.allow_descriptors(device_bytes // (1 << 21))
    driver = CudaDriver()
    driver.init()
    memory = GpuMemory(driver, gpu.device, device_bytes, host_bytes, report)
    try:
        memory.check()
        limit_gb_s = memory.limit_gb_s()
        report.add("warm loads", Figure("limit", limit_gb_s, "GB/s", note="copies of 64 MiB"))
        memory.sweep(limit_gb_s)
        memory.attach()
        gpu_torch.graph_after_reload(memory, f"cuda:{gpu.device}", report)
    finally:
        memory.close()
    return limit_gb_s


def _unpack(report: Report) -> None:
    unpack.check()
    for name, data in unpack.samples():
        packed = unpack.pack(data)
        ratio = data.nbytes / len(packed)
        report.add("unpack", Figure(f"{name}, ratio", ratio, "x"))
        _rows(report, "unpack", unpack.timing(data, packed))


def _kernel(report: Report, kernel: ModuleType) -> None:
    kernel.check()
    _rows(report, kernel.__name__.rpartition(".")[2], kernel.timing())


def _rows(report: Report, section: str, rows: list[timing.Row]) -> None:
    for row in rows:
        nanoseconds = timing.best_ns(row.call, row.wait)
        figure = Figure(
            row.name, row.nbytes / nanoseconds, "GB/s", note=f"{nanoseconds / 1e3:.1f} us"
        )
        report.add(section, figure)


def _http(options: Options, report: Report, gpu: Gpu) -> None:
    flags = ("--devices", str(gpu.device))
    seconds = HTTP_QUICK_S if options.quick else gpu_http.SECONDS
    with run_folder(options, report) as logs:
        gpu_http.measure(options.work / "gpu", logs, report, {}, flags, seconds)


def _kills(options: Options, report: Report) -> None:
    settings = report.settings
    # So workers digest what lies in DEVICE whenever weights came there: a wrong byte fails a request.
    chaos.run(dataclasses.replace(options, quick=True), report, ("--verify", "always"))
    report.settings = {**settings, **report.settings}
