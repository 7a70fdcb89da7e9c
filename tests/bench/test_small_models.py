"""The small models of the scenario `fleet`, packed and run as a worker runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pack_rig import Opened, packed
from safetensors.numpy import load_file

from overcommit.bench import small_models
from overcommit.bench.errors import BenchError
from overcommit.bench.small_models import (
    SHARES,
    SmallModelsPlan,
    SmallModelsWorkload,
    architecture_of,
    make_models,
    name_of,
    weights_of,
)
from overcommit.runtime.model_toml import parse, read_file, to_config

COUNT = 20


def nothing(done: int, total: int) -> None:
    """No progress is shown."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models") / "small"
    assert make_models(root, COUNT, nothing) == [name_of(number) for number in range(COUNT)]
    return root


def test_every_twenty_models_have_all_architectures() -> None:
    for start in (0, 40):
        found = [architecture_of(number) for number in range(start, start + COUNT)]
        assert {kind: found.count(kind) for kind in found} == dict(SHARES)


def test_files_are_what_the_numbers_say(root: Path) -> None:
    for number in range(COUNT):
        file = load_file(root / name_of(number) / "model.safetensors")
        weights = weights_of(number)
        assert file.keys() == weights.keys()
        assert all(np.array_equal(file[name], weights[name]) for name in file)


def test_every_answer_is_right_to_the_bit_alone_and_in_a_batch(root: Path, tmp_path: Path) -> None:
    workload = SmallModelsWorkload(SmallModelsPlan(numbers=tuple(range(COUNT))), 0)
    kinds = set()
    for number, name in enumerate(workload.names):
        if architecture_of(number) in kinds:
            continue
        kinds.add(architecture_of(number))
        config = to_config(parse(read_file(root / name / "model.toml")))
        keys = {key: getattr(config, key) for key in ("inputs", "outputs", "parameters")}
        done = packed(root / name, tmp_path, server_allows=True, allow_code=True, **keys)
        model = Opened(done, allow_code=True).model
        batch = model.run({"x": np.concatenate(workload.inputs)})["y"]
        for which, x in enumerate(workload.inputs):
            expected = workload.expected(number, which)
            for got in (model.run({"x": x})["y"], batch[which : which + 1]):
                assert got.tobytes() == expected.tobytes()
    assert len(kinds) == len(SHARES)


def test_no_two_models_give_the_same_answers() -> None:
    workload = SmallModelsWorkload(SmallModelsPlan(numbers=tuple(range(200))), 0)
    answers = {
        b"".join(workload.expected(model, which).tobytes() for which in range(4))
        for model in range(200)
    }
    assert len(answers) == 200


def test_what_is_there_is_not_made_again(root: Path) -> None:
    before = [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))]
    make_models(root, COUNT, nothing)
    assert [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))] == before


def test_no_room_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(small_models.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(BenchError, match="free"):
        make_models(tmp_path / "small", COUNT, nothing)
    assert list(tmp_path.iterdir()) == []
