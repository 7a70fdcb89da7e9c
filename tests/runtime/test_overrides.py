"""What clients load in place of the repository's models: what holds, what leaves, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.runtime.test_repository import make_model

from overcommit.runtime import overrides as subject
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.errors import BadRequest, OvercommitError, Overloaded, RepositoryError
from overcommit.runtime.overrides import Overrides
from overcommit.runtime.repository import VersionSource, scan

ME, OTHER = (0, 1), (0, 2)
LATEST = '{"max_batch_size": 4}'
ALL = '{"version_policy": {"all": {}}}'


def write(folder: str, name: str, version: str, nbytes: int = 1) -> str:
    place = Path(folder) / name / version
    place.mkdir(parents=True)
    (place / "model.onnx").write_bytes(bytes(nbytes))
    return folder


def served(sources: list[VersionSource]) -> list[tuple[str, str, int]]:
    return [
        (each.name, each.version, (each.config or ModelConfig()).batching.max_batch_size)
        for each in sources
        if not each.spare
    ]


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == subject.FOLDER:
            thread.join()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for version in ("1", "2"):
        make_model(tmp_path / "models", f"m/{version}")
    make_model(tmp_path / "models", "n")
    return tmp_path / "models"


@pytest.fixture
def overrides(tmp_path: Path, root: Path) -> Overrides:
    return Overrides(str(tmp_path / "cache"), [str(root)])


def test_nothing_is_touched_where_clients_have_loaded_nothing(
    root: Path, overrides: Overrides
) -> None:
    sources = scan([root])
    assert overrides.laid_over(sources) is sources


def test_what_serves_stays_until_a_load_is_confirmed(root: Path, overrides: Overrides) -> None:
    sources = scan([root])
    folder = write(overrides.begin(ME), "m", "7")
    overrides.try_out("m", ALL, folder, ME)
    assert served([*overrides.laid_over(sources)]) == [
        *(("n", "1", 32), ("m", "1", 32), ("m", "2", 32), ("m", "7", 32))
    ]
    assert list(overrides.sought("m")) == ["7"]
    overrides.confirm("m")
    assert served([*overrides.laid_over(sources)]) == [("n", "1", 32), ("m", "7", 32)]
    # Another one that fails leaves the first.
    overrides.try_out("m", LATEST, "", ME)
    overrides.give_up("m")
    assert served([*overrides.laid_over(sources)]) == [("n", "1", 32), ("m", "7", 32)]
    assert overrides.drop("m")
    assert overrides.laid_over(sources) is sources
    assert not overrides.drop("m")


def test_a_configuration_changes_what_triton_can_say_and_nothing_else(
    root: Path, overrides: Overrides
) -> None:
    (root / "m" / "model.toml").write_text("pin = true\nallow_code = true\npriority = 3\n")
    sources = scan([root])
    overrides.try_out(
        "m", '{"max_batch_size": 4, "parameters": {"allow_code": {"string_value": "1"}}}', "", ME
    )
    made = [each for each in overrides.laid_over(sources) if each.name == "m"]
    assert [(each.version, each.spare) for each in made] == [("1", True), ("2", False)]
    config = made[1].config
    assert config is not None
    assert (config.pin, config.allow_code, config.priority) == (True, True, 3)
    assert config.batching.max_batch_size == 4
    before = next(each for each in sources if each.version == "2")
    assert made[1].fingerprint != before.fingerprint
    assert made[1].fingerprint[:16] == before.fingerprint[:16]
    # Files of a client get nothing of what the operator allows the model.
    overrides.give_up("m")
    overrides.try_out("m", LATEST, write(overrides.begin(ME), "m", "2"), ME)
    made = [
        each for each in overrides.laid_over(sources) if (each.name, each.version) == ("m", "2")
    ]
    assert [each.config and each.config.allow_code for each in made] == [False]


def test_folders_leave_when_nobody_uses_them(overrides: Overrides) -> None:
    first, second, third = (write(overrides.begin(ME), "m", "1") for _ in range(3))
    overrides.try_out("m", LATEST, first, ME)
    overrides.confirm("m")
    overrides.try_out("m", LATEST, second, ME)
    overrides.confirm("m")
    overrides.abandon(ME)  # the front end is gone: of the third nothing comes
    overrides.clear([f"{first}/m/1", f"{second}/m/1"])
    wait_for_threads()
    assert [Path(each).exists() for each in (first, second, third)] == [True, True, False]
    overrides.clear([f"{second}/m/1"])
    wait_for_threads()
    assert [Path(each).exists() for each in (first, second)] == [False, True]
    assert overrides.is_clear


def test_what_dead_servers_left_is_removed_and_what_living_ones_have_is_not(
    tmp_path: Path, overrides: Overrides
) -> None:
    mine = Path(overrides.begin(ME))
    dead = tmp_path / "cache" / subject.FOLDER / "dead"
    (dead / "x").mkdir(parents=True)
    other = Overrides(str(tmp_path / "cache"), [])
    assert (mine.exists(), dead.exists()) == (True, False)
    other.close()
    overrides.close()
    assert not list((tmp_path / "cache" / subject.FOLDER).iterdir())


@pytest.mark.parametrize(
    ("config", "error"),
    [("{", RepositoryError), ('{"backend": "tensorrt"}', RepositoryError)],
)
def test_a_load_that_is_refused_takes_its_folder_along(
    overrides: Overrides, config: str, error: type[OvercommitError]
) -> None:
    folder = write(overrides.begin(ME), "m", "1")
    with pytest.raises(error):
        overrides.try_out("m", config, folder, ME)
    overrides.clear([])
    wait_for_threads()
    assert not Path(folder).exists()
    assert not overrides.is_tried("m")


def test_a_folder_is_its_front_ends_alone(overrides: Overrides) -> None:
    folder = write(overrides.begin(ME), "m", "1")
    with pytest.raises(BadRequest, match="not there any more"):
        overrides.try_out("m", LATEST, folder, OTHER)
    overrides.abandon(OTHER)
    overrides.try_out("m", LATEST, folder, ME)
    with pytest.raises(Overloaded, match="is being loaded"):
        overrides.try_out("m", LATEST, "", ME)


def test_there_are_limits(overrides: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "OVERRIDES_BYTES_MAX", 100)
    overrides.try_out("a", LATEST, write(overrides.begin(ME), "a", "1", 60), ME)
    overrides.confirm("a")
    with pytest.raises(Overloaded, match="100 bytes"):
        overrides.try_out("b", LATEST, write(overrides.begin(ME), "b", "1", 60), ME)
    monkeypatch.setattr(subject, "OVERRIDES_MAX", 1)
    with pytest.raises(Overloaded, match="the limit"):
        overrides.begin(ME)
    with pytest.raises(Overloaded, match="the limit"):
        overrides.try_out("b", LATEST, "", ME)
    overrides.try_out("a", LATEST, "", ME)  # in its own place
