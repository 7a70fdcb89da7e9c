"""Which memory DEVICE is, by what is asked for and what the probe finds; budgets that follow."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
from fake_driver import FakeDriver, FakeGpu

from overcommit.runtime import device_choice, gpu_probe
from overcommit.runtime.config import GIB, MIB, Settings
from overcommit.runtime.device_choice import allow_descriptors, choose, read_devices
from overcommit.runtime.device_limits import CUDA_CONTEXT_BYTES, CUDA_RESERVE_BYTES, FDS_SPARE
from overcommit.runtime.driver import Result
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.gpu import Gpu
from overcommit.runtime.telemetry import budgets

TESTS = str(Path(__file__).parents[1])
FAKE = "gpu_server:open_fake"


@pytest.fixture
def fake_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join((TESTS, *filter(None, sys.path))))


@pytest.mark.parametrize(
    ("text", "is_read_as"),
    [
        *((" CPU", "cpu"), ("auto", "auto"), ("0", "0"), ("07", "7"), ("1, 0", "1,0")),
        *(("cpu:1", "cpu"), ("CPU:2", "cpu:2")),
    ],
)
def test_what_is_written_is_read(text: str, is_read_as: str) -> None:
    assert read_devices(text) == is_read_as


@pytest.mark.parametrize("text", ["", "gpu", "-1", "0x1", "0,0", "cpu:0", "cpu:17", "0,", "cpu,0"])
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_devices(text)


@pytest.mark.usefixtures("fake_path")
def test_a_gpu_by_its_number_is_probed_by_another_process() -> None:
    for devices in ("0", "auto"):
        (gpu,) = choose(Settings(devices=devices, cuda_driver=FAKE))
        assert gpu is not None
        assert (gpu.device, gpu.bus_id, gpu.total_bytes) == (0, "ffff:ff:00.0", 4 * GIB)
    assert "fake_driver" not in vars(device_choice)
    with pytest.raises(ConfigurationError, match="--devices 3: there is no GPU 3"):
        choose(Settings(devices="3", cuda_driver=FAKE))


@pytest.mark.usefixtures("fake_path")
def test_without_a_usable_gpu_auto_is_host_memory_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_GPU_BYTES", "0")
    assert choose(Settings(devices="auto", cuda_driver=FAKE)) == [None]
    assert "DEVICE is host memory: GPU 0 cannot be used: cuMemCreate failed" in caplog.text
    with pytest.raises(ConfigurationError, match=r"OUT_OF_MEMORY.*--devices cpu"):
        choose(Settings(devices="0", cuda_driver=FAKE))


def test_a_probe_that_crashes_is_a_reason() -> None:
    with pytest.raises(ConfigurationError, match="asking the driver ended with 1"):
        choose(Settings(devices="0", cuda_driver="no_such_module:open"))


def test_where_no_driver_is_loaded_auto_and_cpu_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_choice, "_CONTROL_DEVICE", "/nowhere")
    monkeypatch.setattr(device_choice, "_ask", None)
    assert choose(Settings()) == [None]
    assert choose(Settings(devices="cpu", cuda_driver=FAKE)) == [None]
    assert choose(Settings(devices="cpu:3")) == [None] * 3


@pytest.mark.parametrize("number", range(1, 20))
def test_a_driver_that_fails_at_any_call_gives_an_answer(number: int) -> None:
    driver = FakeDriver(FakeGpu())
    driver.fail_at(number, Result.UNKNOWN)
    (found,) = gpu_probe.look(driver, [0])
    called = len(driver.calls)
    assert bool(found.why) is (number <= called)


# --- budgets ------------------------------------------------------------------------------------
GPU = Gpu(device=0, total_bytes=80 * GIB, free_bytes=79 * GIB)


def test_device_is_what_is_free_less_what_workers_and_models_need() -> None:
    budget = budgets(Settings(workers=2, host_memory_bytes=64 * MIB), gpu=GPU)
    assert budget.device_bytes == 79 * GIB - 4 * GIB - 2 * CUDA_CONTEXT_BYTES
    assert budget.host_bytes == 64 * MIB
    small = Gpu(device=0, total_bytes=8 * GIB, free_bytes=8 * GIB)
    assert budgets(Settings(), gpu=small).device_bytes == (
        8 * GIB - CUDA_RESERVE_BYTES - CUDA_CONTEXT_BYTES
    )


def test_a_gpu_takes_no_host_memory_for_device() -> None:
    settings = Settings(device_memory_bytes=70 * GIB, host_memory_bytes=64 * MIB)
    assert budgets(settings, gpu=GPU).device_bytes == 70 * GIB


def test_more_than_is_free_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match=r"80.0 GiB is more than the 79.0 GiB.*lower it"):
        budgets(Settings(device_memory_bytes=80 * GIB), gpu=GPU)
    full = Gpu(device=1, total_bytes=80 * GIB, free_bytes=1 * GIB)
    with pytest.raises(ConfigurationError, match="no memory of GPU 1 is left for models"):
        budgets(Settings(), gpu=full)


def test_the_limit_of_open_files_follows_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 20_000))
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: limits.append(both))
    allow_descriptors(6000)
    assert limits == [(2 * 6000 + FDS_SPARE, 20_000)]
    with pytest.raises(ConfigurationError, match="ulimit -n"):
        allow_descriptors(12_000)
