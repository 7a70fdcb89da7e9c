"""What the design takes for granted of a GPU; each is a line of ARCHITECTURE's list until it has run.

None of this runs without a GPU.  Whatever may break a context runs in a process of its own.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from rich.console import Console

from overcommit.bench.gpu_memory import GpuMemory
from overcommit.bench.report import Report
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import GIB, MIB, Settings
from overcommit.runtime.cuda_driver import CudaDriver
from overcommit.runtime.device_choice import choose
from overcommit.runtime.driver import Driver

HAS_GPU = os.path.exists("/dev/nvidiactl")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU here")]

WATCHDOG_S = 120
SMALL = 2 * MIB
SHARED = """
import array, ctypes, os, socket, sys
from overcommit.runtime.cuda_driver import CudaDriver
driver = CudaDriver()
driver.init()
driver.context_set_current(driver.primary_context_retain(0))
NBYTES = 2 << 20
def mapped(handle, writable):
    address = driver.address_reserve(NBYTES, NBYTES)
    driver.mem_map(address, NBYTES, handle)
    driver.mem_set_access(address, NBYTES, 0, writable)
    return address
pattern = bytes(range(256)) * (NBYTES // 256)
source = ctypes.create_string_buffer(pattern, NBYTES)
stream = driver.stream_create(True)
"""


def python(script: str, *arguments: str, fds: tuple[int, ...] = ()) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", SHARED + script, *arguments],
        pass_fds=fds,
        capture_output=True,
        timeout=WATCHDOG_S,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.fixture(scope="module")
def driver() -> Driver:
    made = CudaDriver()
    made.init()
    made.context_set_current(made.primary_context_retain(0))
    return made


@pytest.fixture(scope="module")
def report() -> Report:
    return Report("gpu", Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def memory(driver: Driver, report: Report) -> Iterator[GpuMemory]:
    made = GpuMemory(driver, 0, 2 * GIB, 1 * GIB, report)
    yield made
    made.close()


def test_the_probe_finds_the_gpu_and_torch_calls_it_the_same() -> None:
    import torch

    (gpu,) = choose(Settings(devices="0"))
    assert gpu is not None
    assert not gpu.why
    assert gpu.total_bytes >= gpu.free_bytes > 0
    assert str(torch.cuda.get_device_properties(0).uuid) in gpu.uuid


def test_a_descriptor_alone_keeps_memory_and_bytes(driver: Driver) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = """
handle = driver.mem_create(NBYTES, 0)
address = mapped(handle, True)
driver.memcpy_htod_async(address, ctypes.addressof(source), NBYTES, stream)
driver.stream_synchronize(stream)
with socket.socket(fileno=int(sys.argv[1])) as control:
    socket.send_fds(control, [b"x"], [driver.mem_export(handle)])
os.kill(os.getpid(), 9)
"""
    status, output = python(script, str(theirs.fileno()), fds=(theirs.fileno(),))
    assert status == -9, output
    _, (fd,), _, _ = socket.recv_fds(ours, 16, 1)
    ours.close()
    theirs.close()
    handle = driver.mem_import(fd)
    os.close(fd)
    address = driver.address_reserve(SMALL, SMALL)
    driver.mem_map(address, SMALL, handle)
    driver.mem_set_access(address, SMALL, 0, False)
    back = np.zeros(SMALL, np.uint8)
    stream = driver.stream_create(is_urgent=True)
    driver.memcpy_dtoh_async(back.ctypes.data, address, SMALL, stream)
    driver.stream_synchronize(stream)
    assert back.tobytes() == bytes(range(256)) * (SMALL // 256)
    driver.mem_unmap(address, SMALL)
    driver.address_free(address, SMALL)
    driver.mem_release(handle)


def test_what_is_mapped_read_only_cannot_be_written() -> None:
    script = """
address = mapped(driver.mem_create(NBYTES, 0), False)
try:
    driver.memcpy_htod_async(address, ctypes.addressof(source), NBYTES, stream)
    driver.stream_synchronize(stream)
except Exception as error:
    print("refused:", error)
"""
    _, output = python(script)
    assert "refused:" in output


def test_bytes_come_back_from_chunks_of_both_sizes(memory: GpuMemory, report: Report) -> None:
    memory.check()
    assert not report.missed()


def test_one_copy_may_reach_over_several_chunks(memory: GpuMemory, driver: Driver) -> None:
    table = ChunkTable(memory.device.nbytes)
    at = table.offset(1) - SMALL // 2  # the border of the first two chunks
    pattern = np.random.default_rng(1).integers(0, 256, SMALL, np.uint8)
    back = np.zeros(SMALL, np.uint8)
    stream = driver.stream_create(is_urgent=True)
    address = memory.device.address + at
    driver.memcpy_htod_async(address, pattern.ctypes.data, SMALL, stream)
    driver.memcpy_dtoh_async(back.ctypes.data, address, SMALL, stream)
    driver.stream_synchronize(stream)
    assert np.array_equal(pattern, back)


def test_a_graph_replays_over_weights_in_other_chunks(memory: GpuMemory) -> None:
    from overcommit.bench import gpu_torch

    made = Report("gpu", Console(file=io.StringIO()))
    gpu_torch.graph_after_reload(memory, "cuda:0", made)
    (replays,) = (c for c in made.conditions if c.name.startswith("a graph replays"))
    assert replays.is_met, made.notes


def test_a_batch_that_needs_too_much_memory_fails_alone() -> None:
    script = (
        MODEL
        + """
def call(arguments):
    x = arguments["x"]
    if x[0, 0].item() == 7:
        torch.empty(1 << 45, dtype=torch.uint8, device=x.device)
    return x * 2
model = BoundModule(call, config)
try:
    model.run({"x": np.full((1, 2), 7, np.float32)})
except ModelError as error:
    print("failed:", error.message[:40])
for n in range(5):
    assert model.run({"x": np.full((1, 2), n, np.float32)})["y"].tolist() == [[2 * n, 2 * n]]
print("goes on")
"""
    )
    status, output = python(script)
    assert status == 0, output
    assert "failed: OutOfMemoryError" in output
    assert "goes on" in output


def test_a_fault_on_the_gpu_is_a_lost_device() -> None:
    script = (
        MODEL
        + """
def call(arguments):
    x = arguments["x"]
    return x[torch.full((1,), 10**6, device=x.device)] * 2
try:
    BoundModule(call, config).run({"x": np.zeros((1, 2), np.float32)})
except DeviceLost as error:
    print("lost:", error)
"""
    )
    _, output = python(script)
    assert "lost:" in output, output


MODEL = """
import numpy as np, torch
from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.engines import places
from overcommit.runtime.engines.bound_module import BoundModule
from overcommit.runtime.engines.cuda_backend import CudaBackend
from overcommit.runtime.errors import DeviceLost, ModelError
places.choose("cuda:0", CudaBackend("cuda:0"))
fields = {"datatype": "FP32", "shape": (-1, 2), "axes": ("batch", None)}
config = ModelConfig(
    inputs=(TensorSpec(name="x", **fields),), outputs=(TensorSpec(name="y", **fields),)
)
"""
