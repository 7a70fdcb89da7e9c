"""Looking at a repository again and again: what is seen when, and what a second start knows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from overcommit.runtime import known_configs, model_files, repository, scanner
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.scanner import Scanner


def make_model(root: Path, name: str, toml: str = "", *, age_s: float = 60) -> Path:
    """Make a model whose files were changed `age_s` ago."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "model.toml").write_text(toml)
    settle(root, folder, age_s)
    return folder


def settle(root: Path, folder: Path, age_s: float = 60) -> None:
    then = time.time() - age_s
    for path in (*folder.rglob("*"), folder, root):
        os.utime(path, (then, then))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name in ("ant", "bear", "cat"):
        make_model(root, name, f"weight = {len(name)}")
    return root


def names(looking: Scanner) -> list[str]:
    return [source.name for source in looking.sources]


def test_the_first_look_is_what_a_scan_is(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    assert looking.sources == repository.scan([root])


def test_with_nothing_changed_nothing_is_new(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    before = looking.sources
    assert not any(looking.look() for _ in range(3))
    assert looking.sources is before


def test_models_that_come_and_go_are_seen_by_the_next_look(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    ant = looking.sources[0]
    make_model(root, "bee")
    shutil.rmtree(root / "cat")
    assert looking.look()
    assert names(looking) == ["ant", "bear", "bee"]
    assert looking.sources[0] is ant


def test_a_folder_that_comes_right_after_a_look_is_seen(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    changed_ns = root.stat().st_mtime_ns
    make_model(root, "dog")
    os.utime(root, ns=(changed_ns, changed_ns))  # a clock too coarse to tell the two apart
    looking._roots[0].listed_ns = changed_ns
    looking._round = ["ant"]  # in the middle of a round
    assert looking.look()
    assert names(looking)[-1] == "dog"


def test_a_change_inside_of_a_folder_is_seen(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    make_model(root, "bear", "weight = 9", age_s=30)
    assert looking.look()
    config = looking.sources[1].config
    assert config is not None
    assert config.weight == 9


def test_what_is_being_copied_is_looked_at_until_it_is_whole(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    folder = make_model(root, "dog", age_s=0)
    assert looking.look()
    assert looking.sources[-1].settling
    settle(root, folder)
    looking._round = list(looking._folders)  # not its turn
    assert looking.look()
    assert not looking.sources[-1].settling


def test_a_large_repository_is_looked_at_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "repository"
    for number in range(12):
        make_model(root, f"m{number:02}")
    looking = Scanner([root])
    looking.first()
    monkeypatch.setattr(scanner, "WHOLE_MAX", 4)
    monkeypatch.setattr(scanner, "LOOK_SHARE", 0.0)  # no time at all: one folder each look
    make_model(root, "m05", "weight = 2", age_s=30)
    assert [looking.look() for _ in range(12)].count(True) == 1
    make_model(root, "m07", "weight = 2", age_s=30)
    assert looking.look_at(["m07"])
    assert not looking.look_at(["m07"])
    assert [source.name for source in looking.sources] == [f"m{number:02}" for number in range(12)]


def test_what_somebody_asks_for_is_looked_at_alone_and_as_it_is_now(
    root: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    make_model(second, "zoo")
    looking = Scanner([root, second])
    looking.first()
    ant = looking.sources[0]
    make_model(root, "bee", "weight = 4", age_s=0)
    make_model(root, "ant", "weight = 9", age_s=0)
    assert looking.look_at(["bee", "zoo"])
    assert names(looking) == ["ant", "bear", "bee", "cat", "zoo"]
    assert not looking.sources[2].settling
    assert looking.sources[0] is ant
    assert not looking.look_at(["nobody", "../second/zoo", ".", ""])


def test_what_is_gone_when_somebody_asks_for_it_is_gone(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    shutil.rmtree(root / "cat")
    assert looking.look_at(["cat"])
    assert names(looking) == ["ant", "bear"]


def test_a_model_in_a_folder_of_folders_is_found_by_its_name(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    inner = root / "team" / "inner"
    inner.mkdir(parents=True)
    (inner / "model-settings.json").write_text('{"name": "inner", "implementation": "x"}')
    assert looking.look_at(["inner"])
    assert names(looking) == ["ant", "bear", "cat", "inner"]
    assert not looking.sources[-1].settling


def test_a_symlink_that_gets_its_target_later_is_seen(root: Path) -> None:
    (root / "dog").symlink_to(root / ".hidden" / "dog")
    looking = Scanner([root])
    looking.first()
    changed = root.stat()
    make_model(root / ".hidden", "dog")
    os.utime(root, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    assert looking.look()
    assert names(looking)[-1] == "dog"


def test_of_two_roots_with_a_name_the_first_counts(root: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    make_model(second, "bear", "weight = 7")
    make_model(second, "zoo")
    looking = Scanner([root, second])
    looking.first()
    assert names(looking) == ["ant", "bear", "cat", "zoo"]
    assert Path(looking.sources[1].folder).parent == root
    shutil.rmtree(root / "bear")
    assert looking.look()
    assert names(looking) == ["ant", "cat", "bear", "zoo"]


def test_a_root_that_is_gone_raises_and_changes_nothing(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    root.rename(root.with_name("moved"))
    with pytest.raises(OSError):
        looking.look()
    assert names(looking) == ["ant", "bear", "cat"]


# --- across starts --------------------------------------------------------------------------------
class Parses:
    """Counts the files that are parsed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        read = model_files.read

        def counting(files: Iterable[tuple[str, bytes]]) -> tuple[ModelConfig, list[str]]:
            self.count += 1
            return read(files)

        monkeypatch.setattr(model_files, "read", counting)


def test_a_second_start_parses_only_what_has_changed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Scanner([root], tmp_path / "cache")
    first.first()
    make_model(root, "cat", "weight = 8", age_s=30)
    parses = Parses(monkeypatch)
    second = Scanner([root], tmp_path / "cache")
    second.first()
    assert parses.count == 1
    assert second.sources == repository.scan([root])


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_file_of_no_use_only_costs_time(
    root: Path, tmp_path: Path, content: bytes | None
) -> None:
    cache = tmp_path / "cache"
    Scanner([root], cache).first()
    file = cache / known_configs.FILE_NAME
    file.write_bytes(file.read_bytes()[:-3] if content is None else content)
    looking = Scanner([root], cache)
    looking.first()
    assert looking.sources == repository.scan([root])


def test_files_of_other_rules_are_parsed_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scanner([root], tmp_path / "cache").first()
    parses = Parses(monkeypatch)
    monkeypatch.setattr(known_configs, "rules", lambda: "other keys")
    Scanner([root], tmp_path / "cache").first()
    assert parses.count == 2  # two of the three say the same


def test_files_that_differ_in_comments_are_parsed_once_and_share_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "repository"
    for name in ("a", "b"):
        make_model(root, name, f"# made for {name}\n\n  weight = 3\n")
    parses = Parses(monkeypatch)
    looking = Scanner([root])
    looking.first()
    assert parses.count == 1
    assert looking.sources[0].config is looking.sources[1].config


def test_a_line_in_a_text_is_no_comment(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    for name in ("a", "b"):
        make_model(root, name, f'[parameters]\ntext = """\n# {name}\n"""\n')
    looking = Scanner([root])
    looking.first()
    texts = [source.config.parameters["text"] for source in looking.sources if source.config]
    assert texts == ["# a\n", "# b\n"]


def test_versions_that_only_a_policy_knows_are_logged_when_a_look_sees_a_change(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model(root, "old/1")
    (folder.parent / "model.toml").write_text("[versions]\nspecific = [1, 7]\n")
    settle(root, folder.parent)
    looking = Scanner([root])
    looking.first()
    looking.look()
    (record,) = caplog.records
    assert "model 'old': " in record.getMessage()
    assert "names version 7, which is not in" in record.getMessage()


def test_a_root_that_was_unmounted_takes_no_model_away(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = Scanner([root])
    looking.first()
    before = looking.sources
    away = root.with_name("away")
    root.rename(away)
    root.mkdir()  # as the folder that something was mounted over
    stat = os.stat

    def below(path: Path | str, *arguments: object, **more: object) -> os.stat_result:
        facts = stat(path, *arguments, **more)  # type: ignore[arg-type]
        if str(path) == str(root):
            return os.stat_result((*facts[:2], facts.st_dev + 1, *facts[3:]))
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(scanner.os, "stat", below)
        for _ in range(2):
            with pytest.raises(OSError, match="what was mounted there is gone"):
                looking.look()
    assert looking.sources == before
    root.rmdir()
    away.rename(root)
    assert not looking.look()
    assert looking.sources == before


def test_a_root_that_is_emptied_where_it_is_has_no_models(root: Path) -> None:
    looking = Scanner([root])
    looking.first()
    for name in ("ant", "bear", "cat"):
        shutil.rmtree(root / name)
    assert looking.look()
    assert not looking.sources
