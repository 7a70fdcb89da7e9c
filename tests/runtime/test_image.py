"""The image file: a round trip, and every way in which a file can be wrong."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import image_rig
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overcommit.kernels import digest
from overcommit.runtime import image
from overcommit.runtime.config import (
    IMAGE_ALIGN_BYTES,
    PAGE_BYTES,
    READ_BYTES,
    TENSOR_ALIGN_BYTES,
    Batching,
    ModelConfig,
    TensorSpec,
)
from overcommit.runtime.container import read_stored, write_container
from overcommit.runtime.errors import ImageError
from overcommit.runtime.image import (
    FORMAT_VERSION,
    ImageHeader,
    TensorEntry,
    TensorFacts,
    lay_out,
    layout_hash,
    read_header,
    write_image,
)
from overcommit.runtime.parts import path_of

CONFIG = ModelConfig(
    engine="torch",
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4), axes=("batch", None), pad=0.0),),
    batching=Batching(max_batch_size=8),
    parameters={"a": 1, "b": 2.5, "c": "text", "d": True},
)


def fact(name: str, nbytes: int, alias_of: str | None = None) -> TensorFacts:
    return (name, "parameter", True, "uint8", (nbytes,), (1,), nbytes, alias_of)


def content(entry: TensorEntry) -> bytes:
    """Bytes that differ from tensor to tensor."""
    seed = zlib.crc32(entry.name.encode()).to_bytes(4, "little")
    return (seed * (entry.nbytes // 4 + 1))[: entry.nbytes]


def header_of(facts: list[TensorFacts]) -> ImageHeader:
    return image_rig.header_of(facts, CONFIG, {"class": "Linear", "config": "{}"})


def given_tensors(header: ImageHeader) -> Iterator[tuple[TensorEntry, memoryview]]:
    for entry in header.tensors:
        if entry.alias_of is None:
            yield entry, memoryview(content(entry))


def write(path: Path, facts: list[TensorFacts]) -> ImageHeader:
    header = header_of(facts)
    return write_image(path, header, given_tensors(header), None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small image on disk."""
    path = tmp_path / "some.image"
    write(path, [fact("weight", 5000), fact("bias", 10)])
    return path


def patch(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


# --- layout -------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 3000), max_size=30))
def test_tensors_are_aligned_and_do_not_overlap(sizes: list[int]) -> None:
    entries, nbytes = lay_out([fact(f"t{i}", size) for i, size in enumerate(sizes)])
    end = 0
    for entry, size in zip(entries, sizes, strict=True):
        assert entry.nbytes == size
        assert entry.offset % TENSOR_ALIGN_BYTES == 0
        assert end <= entry.offset < end + TENSOR_ALIGN_BYTES
        end = entry.offset + size
    assert nbytes % PAGE_BYTES == 0
    assert end <= nbytes
    assert nbytes >= PAGE_BYTES


def test_an_alias_takes_no_room_and_lies_where_its_tensor_lies() -> None:
    entries, nbytes = lay_out([fact("embed", 4096), fact("head", 4096, "embed"), fact("x", 1)])
    assert entries[1].offset == entries[0].offset
    assert entries[2].offset == 4096
    assert nbytes == 8192


def test_equal_tables_have_equal_hashes_and_others_do_not() -> None:
    tables = [[fact("a", 8)], [fact("b", 8)], [fact("a", 9)], [fact("a", 8), fact("c", 8, "a")]]
    names = [layout_hash(lay_out(facts)[0]) for facts in tables]
    assert len(set(names)) == len(names)
    assert layout_hash(lay_out([fact("a", 8)])[0]) == names[0]


# --- round trip ---------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 20_000), max_size=12))
def test_what_was_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("image") / "an.image"
    facts = [fact(f"layer.{i}", size) for i, size in enumerate(sizes)]
    facts += [fact("tied", size, "layer.0") for size in sizes[:1]]
    written = write(path, facts)
    header, start = read_header(path)
    assert header == written
    assert header.config == CONFIG
    assert start % IMAGE_ALIGN_BYTES == 0
    payload = path.read_bytes()[start:]
    assert len(payload) == header.nbytes
    expected = bytearray(header.nbytes)
    for entry, data in given_tensors(header):
        expected[entry.offset : entry.offset + entry.nbytes] = data
    assert payload == expected


@pytest.mark.parametrize("sizes", [[4096], [1, 7, 300], [5, 70_001, 3, 8]])
@pytest.mark.parametrize("packs", [False, True])
def test_the_digest_is_of_the_range_as_it_lies_in_memory(
    tmp_path: Path, sizes: list[int], packs: bool
) -> None:
    facts = [fact(f"t{n}", size) for n, size in enumerate(sizes)]
    data = [os.urandom(size) for size in sizes]
    header = header_of(facts)
    tensors = zip(header.tensors, map(memoryview, data), strict=True)
    written = write_image(tmp_path / "images" / "x.image", header, tensors, packs=packs)
    whole = bytearray(written.nbytes)
    for entry, raw in zip(header.tensors, data, strict=True):
        whole[entry.offset : entry.offset + entry.nbytes] = raw
    assert written.content_digest == digest.digest(whole)


def test_every_piece_has_its_own_digest(tmp_path: Path) -> None:
    path = tmp_path / "images" / "an.image"
    header = write(path, [fact("a", READ_BYTES - 100), fact("b", READ_BYTES), fact("c", 177)])
    (part,) = header.parts
    file = path_of(path, part.digest)
    stored, start = read_stored(file)
    payload = file.read_bytes()[start:]
    pieces = [payload[at : at + READ_BYTES] for at in range(0, len(payload), READ_BYTES)]
    assert len(pieces) == 3
    assert stored.piece_digests == tuple(zlib.crc32(piece) for piece in pieces)


def test_progress_is_told_on_the_way_and_ends_with_the_whole(tmp_path: Path) -> None:
    header = header_of([fact("a", 5000), fact("b", 300)])
    seen: list[tuple[int, int]] = []
    write_image(
        tmp_path / "an.image",
        header,
        given_tensors(header),
        lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert len({done for done, _ in seen}) > 2
    assert seen[-1] == (header.nbytes, header.nbytes)


def test_a_later_release_may_add_header_fields(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, start = read_header(path)

    class Longer(ImageHeader, frozen=True):
        note: str = "x" * 5000

    monkeypatch.setattr(image, "_DECODER", msgspec.msgpack.Decoder(Longer))
    later, later_start = read_header(path)
    assert later_start == start
    assert later.tensors == header.tensors


# --- atomicity ----------------------------------------------------------------------------------
class Interrupted(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


@pytest.mark.parametrize("error", [Interrupted(), OSError(errno.ENOSPC, "disk full")])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    header = header_of([fact("a", 5000), fact("b", 300)])

    def tensors() -> Iterator[tuple[TensorEntry, memoryview]]:
        yield header.tensors[0], memoryview(content(header.tensors[0]))
        raise error

    with pytest.raises(type(error)):
        write_image(tmp_path / "an.image", header, tensors(), None)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_image_as_it_was(path: Path) -> None:
    before = path.read_bytes()
    header = header_of([fact("a", 5000)])
    with pytest.raises(ImageError):
        write_image(path, header, [(header.tensors[0], memoryview(b"short"))], None)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_file_has_its_name_only_when_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "an.image"
    synced: list[bool] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.append(path.exists())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    write(path, [fact("a", 10)])
    assert synced == [False], "the file, before the rename"


@pytest.mark.parametrize("kept", [[], [0], [1], [1, 0]])
def test_tensors_that_do_not_follow_the_table_are_refused(tmp_path: Path, kept: list[int]) -> None:
    header = header_of([fact("a", 10), fact("b", 10)])
    parts = list(given_tensors(header))
    with pytest.raises(ImageError, match=r"not given|not the next"):
        write_image(tmp_path / "an.image", header, [parts[i] for i in kept], None)
    assert list(tmp_path.iterdir()) == []


# --- damage -------------------------------------------------------------------------------------
def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.image"
    path.write_bytes(b"PK\x03\x04" + bytes(9000))
    with pytest.raises(ImageError, match=r"other\.image is no image"):
        read_header(path)


def test_another_format_version_is_refused_by_name(path: Path) -> None:
    patch(path, 16, struct.pack("<I", FORMAT_VERSION + 1))
    with pytest.raises(ImageError, match=f"format {FORMAT_VERSION + 1}.*pack it again"):
        read_header(path)


def test_a_missing_file_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is gone from the cache"):
        read_header(tmp_path / "gone.image")


def test_a_file_that_was_torn_anywhere_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in [*range(0, 600, 7), IMAGE_ALIGN_BYTES, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ImageError):
            read_header(path)


def test_a_flipped_byte_before_the_payload_is_found_or_harmless(path: Path) -> None:
    good = read_header(path)
    data = path.read_bytes()
    for at in range(good[1]):
        damaged = data[at] ^ 0x41
        patch(path, at, bytes([damaged]))
        try:
            assert read_header(path) == good, "only the zeros after the header do not count"
        except ImageError:
            pass
        else:
            assert data[at] == 0
        patch(path, at, data[at : at + 1])


def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "an.image"
    header = header_of([fact("a", 10)])
    broken = msgspec.structs.replace(header, stored_bytes=header.nbytes + PAGE_BYTES)
    payload = [memoryview(bytes(header.nbytes + PAGE_BYTES))]
    write_container(path, lambda digests: _with(broken, digests), broken.stored_bytes, payload)
    with pytest.raises(ImageError, match="contradicts itself"):
        read_header(path)


def test_tensors_that_lie_elsewhere_than_the_layout_says_are_refused(tmp_path: Path) -> None:
    header = header_of([fact("a", 10)])
    longer = msgspec.structs.replace(header, nbytes=header.nbytes + PAGE_BYTES)
    with pytest.raises(ImageError, match="lay_out"):
        write_image(tmp_path / "an.image", longer, given_tensors(longer), None)


def _with(header: ImageHeader, digests: tuple[int, ...]) -> ImageHeader:
    return msgspec.structs.replace(header, piece_digests=digests)
