"""The pack index: a file that may be torn, foreign or shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from overcommit.runtime import pack_index
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.pack_index import FILE_NAME, PackIndex
from overcommit.runtime.packer_messages import PackDone


def packed(tmp_path: Path) -> PackDone:
    image = tmp_path / "k.image"
    image.write_bytes(b"i" * 4096)
    return PackDone(job=1, ok=True, image_path=str(image), nbytes=4096, engine="torch")


def test_what_was_added_is_found_again_by_another_process(tmp_path: Path) -> None:
    done = packed(tmp_path)
    PackIndex(tmp_path).add("/f", "0", ModelConfig(), done)
    found = PackIndex(tmp_path).take("/f", "0", ModelConfig())
    assert found is not None
    assert (found.ok, found.image_path, found.nbytes) == (True, done.image_path, 4096)


def test_an_image_of_other_software_is_not_used(tmp_path: Path) -> None:
    index = PackIndex(tmp_path)
    index.add("/f", "0", ModelConfig(), packed(tmp_path))
    other = PackIndex(tmp_path)
    other._made_by = b"another torch"
    assert other.take("/f", "0", ModelConfig()) is None


def test_a_fact_is_here_until_it_is_taken_and_again_when_it_is_put_back(tmp_path: Path) -> None:
    PackIndex(tmp_path).add("/f", "0", ModelConfig(), packed(tmp_path))
    index = PackIndex(tmp_path)
    found = index.take("/f", "0", ModelConfig())
    assert found is not None
    assert index.take("/f", "0", ModelConfig()) is None
    index.put_back("/f", "0", ModelConfig(), found)
    assert index.take("/f", "0", ModelConfig()) == found


def test_an_image_that_is_too_short_is_not_used(tmp_path: Path) -> None:
    index = PackIndex(tmp_path)
    index.add("/f", "0", ModelConfig(), packed(tmp_path))
    (tmp_path / "k.image").write_bytes(b"torn")
    assert PackIndex(tmp_path).take("/f", "0", ModelConfig()) is None


def test_every_torn_index_loses_only_its_tail(tmp_path: Path) -> None:
    index = PackIndex(tmp_path)
    config = ModelConfig()
    ends = []
    for number in range(3):
        index.add("/f", str(number), config, packed(tmp_path))
        ends.append((tmp_path / FILE_NAME).stat().st_size)
    content = (tmp_path / FILE_NAME).read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / FILE_NAME).write_bytes(content[:length])
        known = PackIndex(tmp_path)
        whole = sum(1 for end in ends if end <= length)
        assert len(known) == whole
        known.add("/f", "new", config, packed(tmp_path))
        assert len(PackIndex(tmp_path)) == whole + 1


def test_a_flipped_bit_is_never_believed(tmp_path: Path) -> None:
    index = PackIndex(tmp_path)
    for number in range(2):
        index.add("/f", str(number), ModelConfig(), packed(tmp_path))
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    content[-5] ^= 1
    (tmp_path / FILE_NAME).write_bytes(content)
    known = PackIndex(tmp_path)
    assert known.take("/f", "0", ModelConfig()) is not None
    assert known.take("/f", "1", ModelConfig()) is None


def test_a_foreign_file_in_the_place_of_the_index_is_replaced(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"something else entirely, and long enough to look at")
    index = PackIndex(tmp_path)
    assert len(index) == 0
    index.add("/f", "0", ModelConfig(), packed(tmp_path))
    assert len(PackIndex(tmp_path)) == 1


def test_two_writers_keep_each_others_facts(tmp_path: Path) -> None:
    first, second = PackIndex(tmp_path), PackIndex(tmp_path)
    first.add("/f", "1", ModelConfig(), packed(tmp_path))
    second.add("/f", "2", ModelConfig(), packed(tmp_path))
    first.add("/f", "3", ModelConfig(), packed(tmp_path))
    assert len(PackIndex(tmp_path)) == 3


def test_of_versions_that_are_gone_the_latest_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_index, "SPARE_FACTS_MAX", 2)
    index, done = PackIndex(tmp_path), packed(tmp_path)
    for number in range(5):
        index.put_back(
            "/f", str(number), ModelConfig(), index.add("/f", str(number), ModelConfig(), done)
        )
    index.trim()
    assert [index.take("/f", str(n), ModelConfig()) is not None for n in range(5)] == [
        *(False, False, False, True, True)
    ]
    assert len(PackIndex(tmp_path)) == 5
