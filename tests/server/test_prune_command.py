"""`overcommit prune`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from overcommit.server import cli


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["prune", *arguments])
    return result.exit_code, result.output


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name, days in (("aa", 1), ("bb", 10)):
        path = tmp_path / "cache" / "images" / f"{name}.image"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 5000)
        then_s = time.time() - days * 86_400
        os.utime(path, (then_s, then_s))
    return tmp_path / "cache"


def test_it_removes_what_is_old_and_says_how_much(cache: Path) -> None:
    images = cache / "images"
    status, text = run("--cache-dir", str(cache), "--dry-run")
    assert status == 0
    assert "would remove 1 images, 0 parts and 0 programs" in text
    assert len(list(images.iterdir())) == 2
    status, text = run("--cache-dir", str(cache))
    assert status == 0
    assert "removed 1 images, 0 parts and 0 programs" in text
    assert [path.stem for path in images.iterdir()] == ["aa"]
    assert run("--cache-dir", str(cache), "--keep-days", "0.5")[0] == 0
    assert not list(images.iterdir())


def test_the_folder_may_come_from_the_environment(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERCOMMIT_CACHE_DIR", str(cache))
    assert "removed 1 images" in run()[1]


def test_wrong_usage_is_said(tmp_path: Path, cache: Path) -> None:
    status, text = run("--cache-dir", str(tmp_path / "none"))
    assert status == 2
    assert "there is no cache folder" in text
    assert run("--cache-dir", str(cache), "--keep-days", "0.01")[0] == 2
    assert len(list((cache / "images").iterdir())) == 2
