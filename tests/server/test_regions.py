"""Pieces of a client's shared memory: never a byte beyond them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from overcommit.runtime.errors import BadRequest, Forbidden, NotFound, OvercommitError
from overcommit.runtime.front_end_messages import Region, RegionsChanged
from overcommit.server.regions import Regions, Window, window_of


def made(folder: Path, **regions: tuple[str, int, int]) -> Regions:
    here = Regions(is_allowed=True, folder=str(folder))
    upsert = tuple(
        Region(name=name, key=key, offset=offset, byte_size=size)
        for name, (key, offset, size) in regions.items()
    )
    here.apply(RegionsChanged(upsert=upsert))
    return here


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 60), st.integers(0, 60), st.binary())
def test_only_the_regions_own_bytes_are_read_and_written(
    tmp_path_factory: pytest.TempPathFactory,
    start: int,
    size: int,
    offset: int,
    nbytes: int,
    data: bytes,
) -> None:
    folder = tmp_path_factory.mktemp("shm")
    content = bytes(range(100))
    (folder / "f").write_bytes(content)
    regions = made(folder, r=("f", start, size))
    window = Window("r", offset, nbytes)
    if offset + nbytes > size:
        with pytest.raises(BadRequest, match="Invalid offset"):
            regions.hold(window).read()
    else:
        assert regions.hold(window).read() == content[start + offset : start + offset + nbytes]
    try:
        regions.hold(window).write("y", data)
    except BadRequest:
        assert offset + nbytes > size or len(data) > nbytes
        assert (folder / "f").read_bytes() == content
    else:
        at = start + offset
        assert (folder / "f").read_bytes() == content[:at] + data + content[at + len(data) :]
    regions.apply(RegionsChanged(removed=("r",)))
    assert not [fd for fd in os.listdir("/proc/self/fd") if _target(fd) == str(folder / "f")]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_a_file_that_became_shorter_is_refused_and_not_made_longer(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(64))
    regions = made(tmp_path, r=("f", 0, 64))
    os.truncate(tmp_path / "f", 10)
    for use in (
        lambda: regions.hold(Window("r", 0, 64)).read(),
        lambda: regions.hold(Window("r", 32, 32)).write("y", bytes(32)),
    ):
        with pytest.raises(BadRequest, match="shorter"):
            use()
    assert (tmp_path / "f").stat().st_size == 10


def test_a_name_that_was_registered_anew_means_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 8)
    (tmp_path / "b").write_bytes(b"b" * 8)
    regions = made(tmp_path, r=("a", 0, 8))
    assert regions.hold(Window("r", 0, 8)).read() == b"a" * 8
    regions.apply(RegionsChanged(removed=("r",)))
    with pytest.raises(NotFound):
        regions.hold(Window("r", 0, 8)).read()
    region = Region(name="r", key="/b", offset=0, byte_size=8)
    regions.apply(RegionsChanged(upsert=(region,)))
    assert regions.hold(Window("r", 0, 8)).read() == b"b" * 8


def test_what_was_said_is_heard_before_a_region_is_used(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcdefgh")
    regions = made(tmp_path)
    region = Region(name="r", key="a", offset=2, byte_size=4)
    regions.look = lambda: regions.apply(RegionsChanged(upsert=(region,)))
    assert regions.hold(Window("r", 1, 2)).read() == b"de"
    assert regions.listed("r") == [region]


def test_nothing_is_opened_unless_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(8))
    region = Region(name="r", key="f", offset=0, byte_size=8)
    regions = Regions(folder=str(tmp_path))
    regions.apply(RegionsChanged(upsert=(region,)))
    for use in (
        lambda: regions.check(region),
        lambda: regions.hold(Window("r", 0, 8)).read(),
        lambda: regions.hold(Window("r", 0, 8)).write("y", b"x"),
    ):
        with pytest.raises(Forbidden, match="--client-shared-memory"):
            use()


@pytest.mark.parametrize(
    ("key", "offset", "size"),
    [
        *(("", 0, 1), (".", 0, 1), ("..", 0, 1), ("../f", 0, 1), ("/../f", 0, 1), ("d", 0, 1)),
        *(("f\0", 0, 1), ("none", 0, 1), ("link", 0, 1), ("x" * 300, 0, 1), ("\udcff", 0, 1)),
        *(("f", 0, 9), ("f", 8, 1), ("f", 1 << 62, 1 << 62), ("f", 0, 0)),
    ],
)
def test_a_region_that_is_none_is_refused(tmp_path: Path, key: str, offset: int, size: int) -> None:
    (tmp_path / "f").write_bytes(bytes(8))
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "f")
    regions = Regions(is_allowed=True, folder=str(tmp_path))
    with pytest.raises(OvercommitError):
        regions.check(Region(name="r", key=key, offset=offset, byte_size=size))


@pytest.mark.parametrize(
    "given_",
    [
        {"shared_memory_region": 1},
        {"shared_memory_region": "r"},
        {"shared_memory_region": "r", "shared_memory_byte_size": -1},
        {"shared_memory_region": "r", "shared_memory_byte_size": "4"},
        {
            "shared_memory_region": "r",
            "shared_memory_byte_size": 4,
            "shared_memory_offset": 1.5,
        },
    ],
)
def test_parameters_that_say_no_window_are_refused(given_: dict[str, Any]) -> None:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in given_.items()}
    with pytest.raises(BadRequest):
        window_of(raw)
