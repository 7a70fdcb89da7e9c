"""DEVICE as one allocation that is shared by CUDA IPC: its rules, the probe, and the whole server on it."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_rig import started
from fake_driver import Died, FakeDriver, FakeGpu
from residency_world import World
from serving import Server

from overcommit.runtime import _shm
from overcommit.runtime.config import MIB, Settings
from overcommit.runtime.cuda_tier import (
    open_ipc_for_mover,
    open_ipc_for_worker,
    probe_ipc,
    try_open,
)
from overcommit.runtime.device_choice import choose
from overcommit.runtime.driver import DriverError
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.ipc_arena import IpcRanges
from overcommit.runtime.messages import Message, Ready, Stop

TESTS = Path(__file__).parents[1]
NBYTES = 8 * MIB


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu(has_vmm=False)


def ranges_of(gpu: FakeGpu) -> tuple[FakeDriver, int, IpcRanges]:
    """A mover's driver and its arena, and a worker's view of it."""
    mover = started(gpu)
    said: list[Message] = []

    def send(message: Message, fds: Sequence[int]) -> None:
        said.append(message)

    tier = open_ipc_for_mover(mover, 0, NBYTES, 0, send)
    (made,) = said
    ranges = open_ipc_for_worker(started(gpu), 0, NBYTES, lambda: (made, {}))
    assert ranges is not None
    return mover, tier.device.address, ranges


def FakeDriver_started(gpu: FakeGpu) -> FakeDriver:
    return started(gpu)


# --- the arena ----------------------------------------------------------------------------------
def test_a_worker_sees_what_the_mover_writes_where_the_image_lies(gpu: FakeGpu) -> None:
    _, base, ranges = ranges_of(gpu)
    mapping = ranges.open(3 * MIB)
    mapping.map([(2 * MIB, 2 * MIB), (4 * MIB, 2 * MIB)], 7)
    _shm.view(base + 2 * MIB, 1, True)[0] = 42
    assert ctypes.c_ubyte.from_address(mapping.address).value == 42
    assert (mapping.generation, mapping.address - ranges.address) == (7, 2 * MIB)
    assert mapping.view().nbytes == 3 * MIB
    mapping.unmap()
    assert mapping.generation is None
    assert mapping.can_hold([(2 * MIB, 4 * MIB)])
    assert not mapping.can_hold([(0, 4 * MIB)]), "that needs another one, and a model bound anew"


@pytest.mark.parametrize(
    ("extents", "why"),
    [
        ([(0, 2 * MIB), (4 * MIB, 2 * MIB)], "an image in pieces"),
        ([(0, 2 * MIB)], "extents hold 2097152 bytes"),
        ([(6 * MIB, 4 * MIB)], "not inside the arena"),
    ],
)
def test_extents_that_are_no_place_for_it_are_refused(
    gpu: FakeGpu, extents: list[tuple[int, int]], why: str
) -> None:
    mapping = ranges_of(gpu)[2].open(3 * MIB)
    with pytest.raises(ValueError, match=why):
        mapping.map(extents, 1)
    assert mapping.generation is None


def test_an_image_elsewhere_needs_another_mapping(gpu: FakeGpu) -> None:
    mapping = ranges_of(gpu)[2].open(2 * MIB)
    mapping.map([(0, 2 * MIB)], 1)
    with pytest.raises(ValueError, match="another mapping"):
        mapping.map([(2 * MIB, 2 * MIB)], 2)


def test_the_rules_of_cuda_ipc(gpu: FakeGpu) -> None:
    mover, base, ranges = ranges_of(gpu)
    handle = mover.ipc_export(base)
    with pytest.raises(DriverError, match="INVALID_CONTEXT"):
        mover.ipc_open(handle)
    with pytest.raises(DriverError, match="opened twice"):
        ranges.driver.ipc_open(handle)
    with pytest.raises(DriverError, match="not the beginning"):
        mover.ipc_export(base + MIB)
    ranges.close()
    with pytest.raises(DriverError, match="not opened here"):
        ranges.close()
    mover.die()
    with pytest.raises(DriverError):
        ranges.driver.ipc_open(handle)
    assert gpu.used_bytes() == 0


def test_a_worker_that_is_stopped_first_opens_nothing(gpu: FakeGpu) -> None:
    assert open_ipc_for_worker(started(gpu), 0, NBYTES, lambda: (Stop(), {})) is None
    with pytest.raises(ProtocolError):
        open_ipc_for_worker(started(gpu), 0, NBYTES, lambda: (Ready(pid=1), {}))


@pytest.mark.parametrize("number", range(1, 12))
def test_a_mover_that_dies_at_any_call_leaves_no_memory(gpu: FakeGpu, number: int) -> None:
    driver = started(gpu)
    driver.die_at(number)
    try:
        open_ipc_for_mover(driver, 0, NBYTES, 0, lambda message, fds: None)
        driver.die()
    except Died:
        pass
    assert gpu.used_bytes() == 0


# --- the probe ----------------------------------------------------------------------------------
def test_the_probe_opens_it_elsewhere_and_leaves_nothing(gpu: FakeGpu) -> None:
    driver = started(gpu)
    assert probe_ipc(driver, 0, lambda handle: try_open(started(gpu), 0, handle)) == ""
    assert gpu.used_bytes() == 0
    gpu.has_ipc = False
    assert "CUDA IPC cannot be used" in probe_ipc(driver, 0, lambda handle: "")
    assert gpu.used_bytes() == 0


def test_where_vmm_is_missing_ipc_is_chosen_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join((str(TESTS), *filter(None, sys.path))))
    monkeypatch.setenv("FAKE_NO_VMM", "1")
    (found,) = choose(Settings(devices="0", cuda_driver="gpu_server:open_fake"))
    assert found is not None
    assert (found.why, found.shares) == ("", "ipc")
    assert "GPU 0 has no virtual memory management: DEVICE is one allocation" in caplog.text


def finish_all(world: World) -> None:
    while world.loads:
        world.finish()


# --- losing it ----------------------------------------------------------------------------------
def test_what_was_on_device_is_loaded_again_when_the_memory_is_gone() -> None:
    world = World(4, 4)
    world.add(1)
    world.add(2, pinned=True)
    world.want(1)
    finish_all(world)
    world.want(2)  # under way when it happens
    world.take(world.residency.lose_device(world.now_ns))
    assert world.residency.view(1).state.name == "HOST"  # type: ignore[union-attr]
    finish_all(world)
    assert world.residency.view(2).state.name == "DEVICE"  # type: ignore[union-attr]
    world.want(1)
    (load,) = world.loads.values()
    assert (load.slot, load.source) == (1, "host")


# --- the whole server ---------------------------------------------------------------------------
IDS = [[5, 17, 3, 99], [7, 8, 9, 10]]


@pytest.fixture(scope="module")
def repository(
    tmp_path_factory: pytest.TempPathFactory,
    bert_repository: Path,
    make_long_bert: Callable[[Path, int], None],
) -> Path:
    root = tmp_path_factory.mktemp("repository")
    for number in range(4):
        shutil.copytree(bert_repository / f"bert-{number:02}", root / f"small-{number}")
    for number in range(3):
        make_long_bert(root / f"large-{number}", 100 + number)
    return root


@pytest.fixture(scope="module")
def server(repository: Path, image_cache: Path) -> Iterator[Server]:
    os.environ["FAKE_NO_VMM"] = "1"  # the server's processes inherit it
    flags = ("--devices", "0", "--device-memory", "8MiB", "--host-memory", "32MiB")
    launch = (str(TESTS / "gpu_server.py"),)
    with Server(repository, cache=image_cache, flags=flags, serve=launch) as made:
        yield made
        assert made.stop() == 0
    del os.environ["FAKE_NO_VMM"]


def test_right_answers_through_evictions_and_a_mover_that_dies(
    server: Server, repository: Path, bert_reference: Callable[[Path, list[list[int]]], Any]
) -> None:
    want = {path.name: bert_reference(path, IDS) for path in sorted(repository.iterdir())}

    def check(name: str) -> None:
        answer = server.infer(name, {"input_ids": IDS, "attention_mask": [[1] * 4] * 2})
        assert answer.status == 200, answer.body
        (output,) = answer.json()["outputs"]
        got = np.array(output["data"], np.float32).reshape(output["shape"])
        np.testing.assert_allclose(got, want[name], atol=1e-5)

    def check_all(rounds: int) -> None:
        names = [name for name in want for _ in range(rounds)]
        random.Random(3).shuffle(names)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(check, name) for name in names]:
                done.result()

    check_all(3)
    status = server.status()
    assert status["totals"]["evictions_device"] > 0
    server.wait_for_log("DEVICE is made: one allocation")
    read = status["totals"]["bytes_read"]
    worker, mover = server.pids("worker")[0], server.pids("mover")[0]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(check_all, 3)
        os.kill(mover, signal.SIGKILL)
        asking.result()
    server.wait_until(lambda: server.pids("worker") not in ([], [worker]))
    assert server.pids("mover") != [mover]
    check_all(1)
    assert server.status()["totals"]["bytes_read"] == read, "HOST had them all"
