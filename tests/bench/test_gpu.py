"""The scenario `gpu`, as far as it goes without one: its memory part on the fake driver."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from fake_driver import FakeDriver, FakeGpu
from rich.console import Console

from overcommit.bench import gpu, gpu_http
from overcommit.bench.gpu_memory import GpuMemory, fit
from overcommit.bench.prepare import Options
from overcommit.bench.report import Report
from overcommit.runtime import device_choice
from overcommit.runtime.config import LARGE_CHUNK_BYTES, MIB


def report() -> Report:
    return Report("gpu", Console(file=io.StringIO()))


def test_without_a_gpu_it_says_so_and_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choice, "_CONTROL_DEVICE", "/nowhere")
    made = report()
    gpu.run(Options(work=tmp_path), made)
    assert made.notes == [gpu.NO_GPU]
    assert (made.sections, made.conditions) == ({}, [])


def test_every_measurement_of_memory_runs_and_gives_everything_back() -> None:
    driver = FakeDriver(FakeGpu())
    driver.init()
    made = report()
    memory = GpuMemory(driver, 0, 4 * LARGE_CHUNK_BYTES, 64 * MIB, made)
    memory.check()
    limit = memory.limit_gb_s()
    memory.sweep(limit, (1, 10, 60, 1000))
    memory.attach((1, 10, 100))
    memory.close()
    assert [f.name for f in made.sections["warm loads"]] == ["1 MB", "10 MB", "60 MB", "fixed cost"]
    assert [f.name for f in made.sections["attach"]] == ["1 MB", "10 MB", "100 MB"]
    assert made.notes == ["1000 MB do not fit here, and were left out"]
    (came_back,) = (c for c in made.conditions if c.name.startswith("bytes come back"))
    assert came_back.is_met
    assert (driver.gpu.used_bytes(), driver.handle_count) == (0, 0)


def test_a_fit_finds_the_fixed_cost_and_the_rate() -> None:
    fixed_s, rate = fit([(n, 0.0007 + n / 50e9) for n in (10**7, 10**8, 10**9, 10**10)])
    assert fixed_s == pytest.approx(0.0007)
    assert rate == pytest.approx(50e9)


def test_a_part_that_fails_is_a_missed_condition() -> None:
    made = report()
    gpu._part(made, "broken", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    (missed,) = made.missed()
    assert missed.detail.startswith("ZeroDivisionError")


@pytest.mark.slow
def test_a_bert_over_http_on_the_fake_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = Path(__file__).parents[1]
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join((str(tests), os.environ.get("PYTHONPATH", "")))
    )
    made = report()
    shape = {"vocab_size": 9000, "hidden_size": 128, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "intermediate_size": 256}
    flags, serve = ("--devices", "0"), (str(tests / "gpu_server.py"),)
    gpu_http.measure(tmp_path, tmp_path, made, shape, flags, seconds=0.3, serve=serve)
    kinds = [
        f"{kind}, {what}" for kind in ("resident", "warm", "cold") for what in ("median", "p99")
    ]
    assert [figure.name for figure in made.sections["HTTP"]] == kinds
    assert len(made.conditions) == 4
    assert not made.missed()
