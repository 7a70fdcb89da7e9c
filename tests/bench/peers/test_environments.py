from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from overcommit.bench.peers import environments
from overcommit.bench.peers.environments import STAMP, ensure, find, folder_of
from overcommit.bench.peers.peer import CannotDo, Requirements

NEEDS = Requirements("1.0", (("numpy==1",), ("--no-deps", "server==1.0")))


class Pip:
    """Notes what it is asked; fails when told to."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.asked: list[list[str]] = []

    def __call__(self, folder: Path, arguments: list[str], log: Path) -> int:
        assert (folder / "bin" / "python").exists()
        assert not (folder / STAMP).exists()
        self.asked.append(arguments)
        log.write_text("no such package")
        return self.status


def test_an_environment_is_made_once_step_by_step(tmp_path: Path) -> None:
    pip = Pip()
    said: list[str] = []
    assert find(tmp_path, "peer", NEEDS) is None
    made = ensure(tmp_path, "peer", NEEDS, said.append, pip)
    assert pip.asked == [["install", "numpy==1"], ["install", "--no-deps", "server==1.0"]]
    assert any("step 2 of 2" in text for text in said)
    assert ensure(tmp_path, "peer", NEEDS, pip=pip) == made == find(tmp_path, "peer", NEEDS)
    assert len(pip.asked) == 2
    assert made.python.exists()
    assert made.packages.is_dir()


def test_an_environment_that_cannot_be_installed_is_made_anew_the_next_time(
    tmp_path: Path,
) -> None:
    with pytest.raises(CannotDo, match="no such package"):
        ensure(tmp_path, "peer", NEEDS, pip=Pip(status=1))
    assert find(tmp_path, "peer", NEEDS) is None
    rubbish = folder_of(tmp_path, "peer", NEEDS) / "rubbish"
    rubbish.write_text("of the broken run")
    ensure(tmp_path, "peer", NEEDS, pip=Pip())
    assert not rubbish.exists()


def test_another_pin_is_another_folder(tmp_path: Path) -> None:
    other = Requirements("1.0", (("numpy==2",), ("--no-deps", "server==1.0")))
    assert folder_of(tmp_path, "peer", NEEDS) != folder_of(tmp_path, "peer", other)


def test_a_python_that_the_peer_does_not_run_on_is_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    old = Requirements("1.0", (("server==1.0",),), frozenset({"2.7"}))
    with pytest.raises(CannotDo, match="does not run on Python"):
        ensure(tmp_path, "peer", old, pip=Pip())
    assert not (tmp_path / "peers").exists()


@pytest.mark.slow
def test_real_pip_installs_a_package_into_the_environment_alone(tmp_path: Path) -> None:
    wheel = tmp_path / "tinyserver-1.0-py3-none-any.whl"
    info = "tinyserver-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinyserver.py", "PORT = 1\n")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyserver\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    needs = Requirements("1.0", (("--no-index", str(wheel)),))
    made = environments.ensure(tmp_path, "tiny", needs)
    assert (made.packages / "tinyserver.py").exists()
    assert "tinyserver==1.0" in (made.folder / environments.FROZEN).read_text()
