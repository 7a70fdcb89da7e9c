"""The models that scenarios make, packed and run as a worker runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_rig import Opened, packed

from overcommit.bench import headed, models_repo
from overcommit.bench.echo import EchoPlan, EchoWorkload
from overcommit.bench.errors import BenchError
from overcommit.bench.headed import HeadedPlan, HeadedWorkload
from overcommit.bench.known import KnownWorkload
from overcommit.bench.tables import TablePlan, TableWorkload
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.model_toml import parse, read_file, to_config


def opened(folder: Path, cache: Path) -> Opened:
    config: ModelConfig = to_config(parse(read_file(folder / "model.toml")))
    keys: dict[str, Any] = {
        "inputs": config.inputs,
        "outputs": config.outputs,
        "batching": config.batching,
    }
    keys |= {"entry": config.entry}
    done = packed(folder, cache, server_allows=True, allow_code=True, **keys)
    return Opened(done, allow_code=True)


def check(workload: KnownWorkload, root: Path, cache: Path) -> None:
    """Alone and in a batch, every answer is right to the bit."""
    for number, name in enumerate(workload.names):
        model = opened(root / name, cache).model
        batch = model.run({"x": np.concatenate(workload.inputs)})["y"]
        for which, x in enumerate(workload.inputs):
            expected = workload.expected(number, which)
            for got in (model.run({"x": x})["y"], batch[which : which + 1]):
                assert got.tobytes() == expected.tobytes()


def test_echoes_answer_with_their_own_scale(tmp_path: Path) -> None:
    scales = models_repo.make_echoes(tmp_path / "repository", 3)
    plan = EchoPlan(models=tuple(scales), scales=tuple(scales.values()), inputs=5)
    check(EchoWorkload(plan, 0), tmp_path / "repository", tmp_path / "cache")


def test_tables_answer_with_their_own_row(tmp_path: Path) -> None:
    seeds = models_repo.make_tables(tmp_path / "repository", 2, rows=1000)
    plan = TablePlan(models=tuple(seeds), seeds=tuple(seeds.values()), rows=1000, inputs=5)
    check(TableWorkload(plan, 0), tmp_path / "repository", tmp_path / "cache")


def test_an_echo_may_take_any_length(tmp_path: Path) -> None:
    folder = models_repo.make_echo(tmp_path / "repository", "echo", columns=-1, batch=1)
    x = np.random.default_rng(0).random((1, 5000), np.float32)
    got = opened(folder, tmp_path / "cache").model.run({"x": x})["y"]
    assert got.tobytes() == x.tobytes()


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    models_repo.make_tables(tmp_path, 2, rows=10)
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))]
    models_repo.make_tables(tmp_path, 2, rows=10)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))] == before


def test_no_room_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="free"):
        models_repo.make_tables(tmp_path, 1000, rows=10**9)
    assert not list(tmp_path.iterdir())


def test_headed_models_answer_with_the_trunk_s_rows_and_their_own_head_s(tmp_path: Path) -> None:
    root = tmp_path / "headed" / "repository"
    seeds = headed.make_headed(root, 2, rows=5000)
    plan = HeadedPlan(models=tuple(seeds), seeds=tuple(seeds.values()), rows=5000, inputs=5)
    check(HeadedWorkload(plan, 0), root, tmp_path / "cache")
    parts = list((tmp_path / "cache" / "parts").iterdir())
    images = list((tmp_path / "cache" / "images").iterdir())
    assert (len(parts), len(images)) == (1, 2)
    trunk_bytes = headed.LAYERS * 5000 * 64
    assert trunk_bytes < parts[0].stat().st_size < trunk_bytes + 16384
