"""The repository scan: what it sees, refuses and leaves for later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from overcommit.runtime.config import NAME_CHARS_MAX, Batching, ModelConfig, TensorSpec
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.known_configs import KnownConfigs
from overcommit.runtime.model_names import name_error
from overcommit.runtime.model_toml import merge, to_config
from overcommit.runtime.repository import SETTLE_NS, Folder, VersionSource, scan, scan_model


def make_model(root: Path, path: str, toml: str | None = None, age_s: float = 60) -> Path:
    """Make a version folder with one weights file, changed `age_s` ago."""
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if toml is not None:
        (folder / "model.toml").write_text(toml)
    settle(folder, age_s)
    return folder


def settle(folder: Path, age_s: float = 60) -> None:
    """Set every time of a folder back."""
    then = time.time() - age_s
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then), follow_symlinks=False)


def only(root: Path, **options: bool) -> VersionSource:
    sources = scan([root], **options)
    assert len(sources) == 1, sources
    return sources[0]


def test_a_folder_with_files_is_version_1(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "minilm")
    source = only(tmp_path)
    assert (source.name, source.version, source.folder) == ("minilm", "1", str(folder))
    assert source.config == ModelConfig()
    assert source.error is None


def test_version_folders_come_in_numeric_order(tmp_path: Path) -> None:
    for version in ("10", "9", "2"):
        make_model(tmp_path, f"minilm/{version}")
    assert [source.version for source in scan([tmp_path])] == ["2", "9", "10"]


def test_models_come_in_the_order_of_their_names_and_roots(tmp_path: Path) -> None:
    for path in ("a/zebra", "a/ant", "b/bear"):
        make_model(tmp_path, path)
    assert [s.name for s in scan([tmp_path / "a", tmp_path / "b"])] == ["ant", "zebra", "bear"]


def test_a_name_in_two_roots_is_served_from_the_first(tmp_path: Path) -> None:
    first = make_model(tmp_path, "a/minilm")
    make_model(tmp_path, "b/minilm")
    assert [s.folder for s in scan([tmp_path / "a", tmp_path / "b"])] == [str(first)]


def test_two_scans_of_an_unchanged_root_are_equal(tmp_path: Path) -> None:
    make_model(tmp_path, "minilm", "pin = true")
    make_model(tmp_path, "bad", "pin = 3")
    assert scan([tmp_path]) == scan([tmp_path], is_first=False)


def test_any_change_of_a_file_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "minilm/1")
    prints = {only(tmp_path).fingerprint}
    (folder / "model.safetensors").write_bytes(b"other bytes")
    prints.add(only(tmp_path).fingerprint)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    prints.add(only(tmp_path).fingerprint)
    (folder / "deep").mkdir()
    (folder / "deep" / "vocab.txt").write_text("a")
    prints.add(only(tmp_path).fingerprint)
    (folder.parent / "model.toml").write_text("pin = true")
    prints.add(only(tmp_path).fingerprint)
    assert len(prints) == 5


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "minilm")
    before = only(tmp_path)
    (folder / ".download").write_text("x")
    (tmp_path / ".git").mkdir()
    assert only(tmp_path) == before


@pytest.mark.parametrize("name", ["-x", "a..b", "ä", "a b", "_private", "new\nline"])
def test_a_bad_name_is_listed_with_its_reason(tmp_path: Path, name: str) -> None:
    make_model(tmp_path, name)
    make_model(tmp_path, "good")
    broken = [source for source in scan([tmp_path]) if source.error is not None]
    assert len(broken) == 1
    assert "rename the folder" in str(broken[0].error)
    assert broken[0].name.isprintable()


def test_a_name_longer_than_the_limit_is_refused() -> None:
    assert name_error("x" * NAME_CHARS_MAX) is None
    assert "longer than" in str(name_error("x" * (NAME_CHARS_MAX + 1)))


def test_a_name_that_is_not_unicode_is_listed_in_a_printable_form(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/bad\xff")
    source = only(tmp_path)
    assert source.name == "bad\\xff"
    assert source.error is not None


@pytest.mark.parametrize("version", ["0", "01", "9" * 30])
def test_a_bad_version_number_is_listed_and_others_stay(tmp_path: Path, version: str) -> None:
    make_model(tmp_path, f"minilm/{version}")
    make_model(tmp_path, "minilm/2")
    errors = {source.version: source.error for source in scan([tmp_path])}
    assert errors["2"] is None
    assert "whole numbers from 1 up" in str(errors[version])


def test_an_empty_folder_says_that_it_holds_no_files(tmp_path: Path) -> None:
    (tmp_path / "minilm").mkdir()
    assert "holds no model files" in str(only(tmp_path).error)


def test_model_toml_alone_is_no_model(tmp_path: Path) -> None:
    make_model(tmp_path, "minilm", "pin = true")
    (tmp_path / "minilm" / "model.safetensors").unlink()
    assert "holds no model files" in str(only(tmp_path).error)


def test_a_missing_root_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan([tmp_path / "nowhere"])


def test_plain_files_in_the_root_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    assert scan([tmp_path]) == []


# --- symlinks -----------------------------------------------------------------------------------
def test_a_file_link_that_leaves_the_root_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = make_model(tmp_path, "root/minilm")
    (folder / "weights").symlink_to(secret)
    assert "leaves the repository" in str(only(tmp_path / "root").error)


@pytest.mark.parametrize("place", ["minilm", "minilm/1"])
def test_a_folder_link_that_leaves_the_root_is_refused(tmp_path: Path, place: str) -> None:
    outside = make_model(tmp_path, "outside")
    (tmp_path / "root" / place).parent.mkdir(parents=True)
    (tmp_path / "root" / place).symlink_to(outside)
    assert "leaves the repository" in str(only(tmp_path / "root").error)


def test_a_root_whose_name_starts_like_another_is_not_inside_it(tmp_path: Path) -> None:
    outside = make_model(tmp_path, "root-private/minilm")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "minilm").symlink_to(outside)
    assert "leaves the repository" in str(only(tmp_path / "root").error)


def test_a_link_inside_the_root_is_followed_and_its_target_fingerprinted(tmp_path: Path) -> None:
    blob = tmp_path / ".blobs"
    blob.write_bytes(b"1")
    folder = make_model(tmp_path, "minilm")
    (folder / "weights").symlink_to("../.blobs")
    before = only(tmp_path)
    assert before.error is None
    blob.write_bytes(b"22")
    assert only(tmp_path).fingerprint != before.fingerprint


def test_a_link_to_its_own_parent_ends_with_a_reason(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "minilm")
    (folder / "loop").symlink_to(folder)
    assert "nested more than" in str(only(tmp_path).error)


def test_a_root_that_is_a_link_itself_is_fine(tmp_path: Path) -> None:
    make_model(tmp_path, "real/minilm")
    (tmp_path / "link").symlink_to("real")
    assert only(tmp_path / "link").error is None


# --- settling -----------------------------------------------------------------------------------
def test_a_fresh_folder_is_settling_unless_the_scan_is_the_first(tmp_path: Path) -> None:
    make_model(tmp_path, "minilm", age_s=0)
    assert not only(tmp_path, is_first=True).settling
    assert only(tmp_path, is_first=False).settling
    settle(tmp_path / "minilm")
    assert not only(tmp_path, is_first=False).settling


def test_a_time_in_the_future_does_not_settle_for_ever(tmp_path: Path) -> None:
    make_model(tmp_path, "minilm", age_s=-60 - SETTLE_NS / 1e9)
    assert not only(tmp_path, is_first=False).settling


# --- model.toml ---------------------------------------------------------------------------------
def test_every_key_of_model_toml_arrives(tmp_path: Path) -> None:
    make_model(
        tmp_path,
        "minilm",
        """
engine = "torch"
pin = true
priority = 3
min_resident = 30
ttl = 0.5
weight = 7
warm_up = false
timeout_ms = 500
allow_code = true
entry = "model.py:Model"
[batching]
max_batch_size = 8
max_queue_delay_us = 100
max_queue_size = 16
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, 16]
pad = 0
optional = true
[[output]]
name = "y"
datatype = "BYTES"
shape = [-1]
[parameters]
a = 1
b = "two"
""",
    )
    source = only(tmp_path)
    assert source.error is None
    assert source.config == ModelConfig(
        engine="torch",
        pin=True,
        priority=3,
        min_resident_s=30.0,
        ttl_s=0.5,
        weight=7,
        warm_up=False,
        timeout_ms=500,
        allow_code=True,
        entry="model.py:Model",
        batching=Batching(max_batch_size=8, max_queue_delay_us=100, max_queue_size=16),
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 16), pad=0, optional=True),),
        outputs=(TensorSpec(name="y", datatype="BYTES", shape=(-1,)),),
        parameters={"a": 1, "b": "two"},
    )


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("pinn = true", "unknown key 'pinn'"),
        ("[batching]\nsize = 3", "unknown key 'size' in [batching]"),
        ("[[input]]\nname='x'\ndatatype='FP32'\nshape=[1]\nzz=1", "unknown key 'zz' in [input]"),
        ("weight = 0", "weight"),
        ("weight = 101", "weight"),
        ("pin = 1", "pin"),
        ("[batching]\nmax_batch_size = 5000", "batching.max_batch_size"),
        ("[[output]]\nname='x'\ndatatype='FLOAT'\nshape=[1]", "unknown datatype 'FLOAT'"),
        ("[[input]]\nname='x'\ndatatype='FP32'\nshape=[-2]", "shape"),
        ("[[input]]\nname='x'\ndatatype='FP32'\nshape=[1]\n" * 2, "is there twice"),
        ("input = 3", "input"),
        ("pin = ", "not valid TOML"),
        ("# " + "x" * 300_000, "longer than"),
    ],
)
def test_a_bad_model_toml_makes_the_model_broken_and_names_the_key(
    tmp_path: Path, toml: str, said: str
) -> None:
    make_model(tmp_path, "minilm", toml)
    source = only(tmp_path)
    assert source.config is None
    assert said in str(source.error)
    assert "model.toml" in str(source.error)


def test_the_version_folders_model_toml_wins_key_by_key(tmp_path: Path) -> None:
    make_model(tmp_path, "minilm/1", "weight = 2\n[batching]\nmax_batch_size = 1")
    model_toml = "weight = 9\npin = true\n[batching]\nmax_queue_size = 5"
    (tmp_path / "minilm" / "model.toml").write_text(model_toml)
    config = only(tmp_path).config
    assert config is not None
    assert (config.weight, config.pin) == (2, True)
    assert (config.batching.max_batch_size, config.batching.max_queue_size) == (1, 5)


def test_a_mended_model_toml_is_read_again(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "minilm", "oops")
    assert only(tmp_path).error is not None
    (folder / "model.toml").write_text("pin = true")
    config = only(tmp_path).config
    assert config is not None
    assert config.pin


def test_merge_replaces_lists_and_joins_tables() -> None:
    merged = merge({"input": [1], "t": {"a": 1, "b": 2}}, {"input": [2], "t": {"b": 3}})
    assert merged == {"input": [2], "t": {"a": 1, "b": 3}}


def test_to_config_of_nothing_is_the_default() -> None:
    assert to_config({}) == ModelConfig()


def test_to_config_refuses_what_toml_can_say_and_json_cannot() -> None:
    with pytest.raises(RepositoryError):
        to_config({"timeout_ms": float("inf")})


# --- symlinks that lead nowhere -----------------------------------------------------------------
@pytest.mark.parametrize("link", ["minilm/vocabulary", "minilm/sub/vocabulary"])
def test_a_file_link_that_leads_nowhere_is_named(tmp_path: Path, link: str) -> None:
    folder = make_model(tmp_path, "minilm")
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to("gone")
    settle(folder)
    for is_first in (True, False):
        assert "'vocabulary' is a symlink that leads nowhere" in str(
            only(tmp_path, is_first=is_first).error
        )


def test_a_file_link_without_a_target_yet_is_settling(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "minilm")
    (folder / "vocabulary").symlink_to("gone")
    assert only(tmp_path, is_first=False).settling


@pytest.mark.parametrize("target", ["gone", "minilm"])
def test_a_model_that_is_a_link_to_nowhere_is_listed(tmp_path: Path, target: str) -> None:
    (tmp_path / "minilm").symlink_to(target)
    source = only(tmp_path)
    assert (source.name, source.version) == ("minilm", "1")
    assert "'minilm' is a symlink that leads nowhere" in str(source.error)


def test_a_version_that_is_a_link_to_nowhere_is_listed_beside_others(tmp_path: Path) -> None:
    make_model(tmp_path, "minilm/1")
    (tmp_path / "minilm" / "2").symlink_to("gone")
    good, lost = scan([tmp_path])
    assert (good.version, good.error) == ("1", None)
    assert lost.version == "2"
    assert "leads nowhere" in str(lost.error)


@pytest.mark.parametrize(("target", "text"), [("gone", "nowhere"), ("../../secret", "leaves")])
def test_a_models_own_toml_is_no_way_out_of_the_root(
    tmp_path: Path, target: str, text: str
) -> None:
    (tmp_path / "secret").write_text("pin = true")
    make_model(tmp_path, "root/minilm/1")
    (tmp_path / "root" / "minilm" / "model.toml").symlink_to(target)
    assert text in str(only(tmp_path / "root").error)


def test_while_a_models_folder_cannot_be_read_each_version_says_so(tmp_path: Path) -> None:
    for version in ("2", "3"):
        make_model(tmp_path, f".releases/minilm/{version}")
    link = tmp_path / "minilm"
    link.symlink_to(".releases/minilm")
    folder, configs = Folder("minilm", str(link), True), KnownConfigs()
    first = scan_model(str(tmp_path), folder, None, configs)
    (tmp_path / ".releases").rename(tmp_path / ".away")
    lost = scan_model(str(tmp_path), folder, None, configs, first)
    assert [each.version for each in lost] == ["2", "3"]
    assert all("leads nowhere" in str(each.error) for each in lost)
    assert [each.fingerprint for each in lost] == [each.fingerprint for each in first]
    (tmp_path / ".away").rename(tmp_path / ".releases")
    assert scan_model(str(tmp_path), folder, None, configs, lost) == first


# --- what is no file ----------------------------------------------------------------------------
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_toml_that_is_no_file_keeps_nobody_waiting(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make_model(tmp_path, "ant/1")
    make(tmp_path / "ant" / "model.toml")
    make_model(tmp_path, "bear/1")
    ant, bear = scan([tmp_path])
    assert "model.toml is no file" in str(ant.error)
    assert bear.error is None


def test_a_model_below_a_folder_whose_name_is_no_text_says_so(tmp_path: Path) -> None:
    inner = os.path.join(tmp_path, "team", os.fsdecode(b"t\xff"), "inner")
    os.makedirs(inner)
    Path(inner, "model-settings.json").write_text('{"name": "inner", "implementation": "x"}')
    Path(inner, "model.joblib").write_bytes(b"x")
    source = only(tmp_path)
    assert "no UTF-8" in str(source.error)
