"""What nothing needs leaves the cache folder; what is needed, here or by others, stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from overcommit.runtime import image_cache
from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.container import TEMPORARY_PREFIX
from overcommit.runtime.image import read_header
from overcommit.runtime.image_cache import Needed
from overcommit.runtime.kept_images import reusable
from overcommit.runtime.packer import pack
from overcommit.runtime.packer_messages import Pack, PackDone
from overcommit.runtime.parts import PartInfo, path_of

DAY_S = 86_400.0
MODEL = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(1024, 1024)
        self.head = torch.nn.Linear(1024, 4)

    def forward(self, x):
        return self.head(self.trunk(x))
"""


def make(root: Path, cache: Path, head: float) -> PackDone:
    """Pack a model with a trunk that all have, and a head of its own."""
    folder = root / f"m{head:g}"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL)
    trunk = {"trunk.weight": torch.eye(1024), "trunk.bias": torch.zeros(1024)}
    own = {"head.weight": torch.full((4, 1024), head), "head.bias": torch.zeros(4)}
    save_file({**trunk, **own}, folder / "model.safetensors")
    inputs = (TensorSpec(name="x", datatype="FP32", shape=(-1, 1024)),)
    config = ModelConfig(allow_code=True, entry="model.py:Model", inputs=inputs)
    job = Pack(
        job=1,
        name=folder.name,
        version="1",
        folder=str(folder),
        config=config,
        cache_dir=str(cache),
        allow_code=True,
    )
    done = pack(job, lambda _done, _total: None)
    assert done.ok, done.message
    return done


def needed(done: PackDone) -> Needed:
    return Needed(done.image_path, done.program_key, done.parts)


def age(cache: Path, days: float) -> None:
    """Let everything in the folder have been needed so long ago, the last time."""
    then_s = time.time() - days * DAY_S
    for path in sorted(cache.rglob("*"), reverse=True):
        os.utime(path, (then_s, then_s))


def names(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}


def prune(cache: Path, used: set[str], *, is_dry: bool = False) -> image_cache.Removed:
    return image_cache.prune(str(cache), used, time.time(), 7 * DAY_S, is_dry=is_dry)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_what_shares_a_trunk_goes_without_it(tmp_path: Path, cache: Path) -> None:
    first, second = (make(tmp_path, cache, head) for head in (1.0, 2.0))
    assert len(first.parts) == 1, "the trunk is a part"
    before = names(cache)
    age(cache, 8)
    used = image_cache.renew(str(cache), [needed(first)])
    counted = prune(cache, used, is_dry=True)
    assert names(cache) == before
    removed = prune(cache, used)
    assert removed == counted
    assert (removed.images, removed.parts, removed.programs) == (1, 0, 0)
    assert before - names(cache) == {f"images/{Path(second.image_path).name}"}
    assert reusable(Path(first.image_path)) is not None
    assert reusable(Path(second.image_path)) is None
    # Without anything that needs them the part and the program go, too.
    age(cache, 8)
    removed = prune(cache, set())
    assert (removed.images, removed.parts, removed.programs, removed.kept) == (1, 1, 1, 0)
    assert not names(cache)


def test_what_another_server_renews_stays(tmp_path: Path, cache: Path) -> None:
    done = make(tmp_path, cache, 1.0)
    age(cache, 8)
    image_cache.renew(str(cache), [needed(done)])
    assert not prune(cache, set())
    assert reusable(Path(done.image_path)) is not None


def test_an_image_that_is_used_again_is_needed_from_then_on(tmp_path: Path, cache: Path) -> None:
    done = make(tmp_path, cache, 1.0)
    age(cache, 8)
    assert reusable(Path(done.image_path)) is not None  # as when its model comes back
    assert not prune(cache, set())


def test_parts_and_programs_that_a_new_image_takes_over_are_needed(
    tmp_path: Path, cache: Path
) -> None:
    first = make(tmp_path, cache, 1.0)
    age(cache, 8)
    second = make(tmp_path, cache, 2.0)
    removed = prune(cache, set())
    assert (removed.images, removed.parts, removed.programs) == (1, 0, 0)
    assert not Path(first.image_path).exists()
    assert reusable(Path(second.image_path)) is not None


def test_what_is_in_use_stays_where_its_times_cannot_be_renewed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = make(tmp_path, cache, 1.0)
    age(cache, 8)

    def refuse(*_: object) -> None:
        raise PermissionError("not the owner")

    monkeypatch.setattr(image_cache.os, "utime", refuse)
    used = image_cache.renew(str(cache), [needed(done)])
    assert not prune(cache, used)


def test_other_files_stay(tmp_path: Path, cache: Path) -> None:
    make(tmp_path, cache, 1.0)
    others = ("index.msgpack", "images/notes.txt", "images/.tmp-1.image", "parts/README", "x/y")
    for name in others:
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_text("of somebody")
    age(cache, 400)
    assert prune(cache, set())
    assert names(cache) == set(others)


def test_what_cannot_be_removed_is_told_and_the_rest_goes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = make(tmp_path, cache, 1.0)
    age(cache, 8)
    unlink = os.unlink

    def refuse(path: str, **more: int) -> None:
        if path == done.image_path:
            raise PermissionError("read-only")
        unlink(path, **more)

    monkeypatch.setattr(image_cache.os, "unlink", refuse)
    removed = prune(cache, set())
    assert removed.failed == "read-only"
    assert (removed.images, removed.parts, removed.kept) == (0, 1, 1)


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert not image_cache.prune(str(tmp_path / "none"), set(), time.time(), 0.0)


def test_names_are_those_that_the_packer_gives(tmp_path: Path, cache: Path) -> None:
    """A name that the patterns do not know would be kept for ever."""
    done = make(tmp_path, cache, 1.0)
    header, _ = read_header(done.image_path)
    known = set(image_cache.paths_of(str(cache), [needed(done)]))
    for part in header.parts:
        assert str(path_of(done.image_path, part.digest)) in known
    assert str(Path(header.program["file"]).parent) in known
    age(cache, 8)
    prune(cache, set())
    assert not names(cache)


def test_a_file_of_another_user_who_lets_us_write_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.image"
    file.write_bytes(b"x")
    os.utime(file, (1, 1))
    utime = os.utime

    def as_for_others(path: Path, times: tuple[float, float] | None = None) -> None:
        if times is not None:
            raise PermissionError
        utime(path)

    monkeypatch.setattr(os, "utime", as_for_others)
    image_cache.touch(file)
    assert file.stat().st_mtime > 5.0


def test_what_a_removal_that_died_has_left_goes_with_the_next_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, cache, 1.0)
    age(cache, 8)

    def die(_path: str) -> None:
        raise OSError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(image_cache.shutil, "rmtree", die)
        prune(cache, set())
    left = [path.name for path in (cache / "programs").iterdir()]
    assert len(left) == 1
    assert left[0].startswith(TEMPORARY_PREFIX)
    prune(cache, set())
    assert not names(cache)


def test_a_part_in_both_its_forms_is_two_files(tmp_path: Path) -> None:
    image = str(tmp_path / "images" / "a.image")
    forms = (PartInfo("ab", 4096), PartInfo("ab", 4096, 1000))
    versions = [Needed(image, "cd", (form,)) for form in forms]
    paths = list(image_cache.paths_of(str(tmp_path), versions))
    assert {path.rpartition(".")[2] for path in paths if "/parts/" in path} == {"part", "packed"}
