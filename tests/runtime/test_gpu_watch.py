"""Readings of NVML, by a thread; what cannot be had is left out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import fake_nvml
import pytest

from overcommit.runtime.gpu import Gpu
from overcommit.runtime.gpu_watch import GpuWatch, describe, read

UUID = fake_nvml.UUID.decode()
EVERYTHING = {
    "memory": [1000, 300],
    "rates": [70, 20],
    "processes": [[10, 200], [11, 50]],
    "power": 250_000,
    "ecc": [4, 1],
    "pcie": [3, 5],
    "temperature": 61,
    "xids": [79],
}


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, object]], None]:
    path = tmp_path / "values.json"
    monkeypatch.setenv("FAKE_NVML", str(path))

    def change(values: dict[str, object]) -> None:
        path.with_suffix(".new").write_text(json.dumps(values))
        path.with_suffix(".new").rename(path)

    return change


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_reading_has_what_nvml_has(say: Callable[[dict[str, object]], None]) -> None:
    say(EVERYTHING)
    got = read(fake_nvml, 7, 0)
    assert (got.total_bytes, got.used_bytes, got.free_bytes) == (1000, 300, 700)
    assert (got.busy_percent, got.memory_busy_percent, got.temperature) == (70, 20, 61)
    assert (got.power_watts, got.ecc_corrected, got.ecc_uncorrected) == (250.0, 4, 1)
    assert (got.pcie_to_gpu, got.pcie_from_gpu) == (5 * 1024, 3 * 1024)


def test_what_is_not_supported_is_none(say: Callable[[dict[str, object]], None]) -> None:
    say({"memory": [1000, 300]})
    got = read(fake_nvml, 7, 0)
    assert got.free_bytes == 700
    assert got.processes == {}
    for name in ("busy_percent", "temperature", "power_watts", "ecc_corrected", "pcie_to_gpu"):
        assert getattr(got, name) is None


@pytest.mark.parametrize("gpu", [Gpu(device=0, uuid=UUID), Gpu(device=0, bus_id="ffff:ff:00.0")])
def test_the_thread_follows_and_hears_of_xids(
    say: Callable[[dict[str, object]], None], gpu: Gpu
) -> None:
    say(EVERYTHING)
    watch = GpuWatch(gpu, lambda: fake_nvml)
    try:
        wait_for(lambda: watch.reading is not None and watch.reading.xids == (79,))
        say({**EVERYTHING, "memory": [1000, 900]})
        wait_for(lambda: watch.reading is not None and watch.reading.free_bytes == 100)
        told = describe(watch.reading, {11: "mover"})
        assert told is not None
        assert told["processes"] == [
            {"pid": 10, "kind": "", "bytes": 200},
            {"pid": 11, "kind": "mover", "bytes": 50},
        ]
    finally:
        watch.close()


def test_without_nvml_there_is_no_reading(caplog: pytest.LogCaptureFixture) -> None:
    def none_here() -> object:
        raise ImportError("no NVML")

    watch = GpuWatch(Gpu(device=0), none_here)
    watch.close()
    assert watch.reading is None
    assert describe(watch.reading, {}) is None
    assert "NVML cannot be used" in caplog.text
