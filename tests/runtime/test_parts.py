"""Where images are cut, and that equal stretches of weights become equal parts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_rig import header_of

from overcommit.runtime.config import (
    MIB,
    PAGE_BYTES,
    PART_BYTES_MIN,
    SMALL_CHUNK_BYTES,
    TENSOR_ALIGN_BYTES,
)
from overcommit.runtime.image import (
    ImageHeader,
    is_there,
    read_payload,
    write_image,
)
from overcommit.runtime.parts import PartInfo, PartTable, path_of, plan, private_bytes, round_up

CHUNK = SMALL_CHUNK_BYTES
MODULES = st.sampled_from(["stem", "blocks.0", "blocks.1", "blocks.2", "neck", "fc", ""])
SIZES = st.sampled_from([0, 4, 1000, CHUNK // 2, CHUNK - 256, CHUNK, 5 * MIB, PART_BYTES_MIN + 12])


def layers(prefix: str, count: int, nbytes: int) -> list[tuple[str, int]]:
    return [(f"{prefix}{n}.{name}", nbytes // 2) for n in range(count) for name in ("w", "v")]


@given(tensors=st.lists(st.tuples(MODULES, SIZES), max_size=24), prefix=st.sampled_from(["", "m."]))
def test_parts_cover_the_tensors_and_begin_at_chunks(
    tensors: list[tuple[str, int]], prefix: str
) -> None:
    named = [
        (f"{prefix}{module}.t{n}" if module else f"{prefix}t{n}", size)
        for n, (module, size) in enumerate(tensors)
    ]
    layout = plan(named)
    assert len(layout.offsets) == len(named)
    end = 0
    for offset, (_, nbytes) in zip(layout.offsets, named, strict=True):
        assert offset % TENSOR_ALIGN_BYTES == 0
        assert offset >= end
        end = offset + nbytes
    assert end <= layout.nbytes
    assert layout.nbytes % PAGE_BYTES == 0
    assert layout.nbytes > 0
    gap = layout.nbytes - sum(nbytes for _, nbytes in named)
    assert gap < CHUNK + PAGE_BYTES + TENSOR_ALIGN_BYTES * (len(named) + 1), "one gap at most"
    stretches = [*layout.parts]
    if layout.private_bytes:
        stretches.append((layout.nbytes - layout.private_bytes, layout.private_bytes))
    assert [start % CHUNK for start, _ in stretches] == [0] * len(stretches)
    for (start, nbytes), (following, _) in itertools.pairwise(stretches):
        assert following == start + round_up(nbytes, CHUNK)
    assert stretches[0][0] == 0
    assert sum(stretches[-1]) == layout.nbytes
    assert all(nbytes >= CHUNK and nbytes % PAGE_BYTES == 0 for _, nbytes in layout.parts)
    assert layout.private_bytes < CHUNK
    infos = [PartInfo(str(start), nbytes) for start, nbytes in layout.parts]
    assert private_bytes(layout.nbytes, infos) == layout.private_bytes


def test_a_small_image_has_no_parts() -> None:
    layout = plan([("trunk.w", 1_000_000), ("head.w", 500_000), ("head.b", 40)])
    assert (layout.parts, layout.private_bytes) == ((), layout.nbytes)


def test_a_small_head_is_private_and_a_large_one_is_a_part() -> None:
    trunk = [("bert.embeddings.w", 5 * MIB)]
    small = plan([*trunk, ("classifier.w", 4096), ("classifier.b", 8)])
    assert small.parts == ((0, 5 * MIB),)
    assert (small.nbytes, small.private_bytes) == (6 * MIB + 2 * PAGE_BYTES, 2 * PAGE_BYTES)
    large = plan([*trunk, ("lm_head.w", 3 * MIB)])
    assert large.parts == ((0, 5 * MIB), (6 * MIB, 3 * MIB))
    assert large.private_bytes == 0


def test_the_trunk_is_cut_alike_under_every_head_and_with_every_prefix() -> None:
    trunk = [("embeddings.w", 47 * MIB), *layers("encoder.layer.", 12, 7 * MIB)]
    wanted = plan(trunk).parts
    assert len(wanted) > 3
    under = [(f"bert.{name}", nbytes) for name, nbytes in trunk]
    for head in ([("classifier.w", 77)], [("qa.w", 9 * MIB)], [("a.w", 5), ("b.w", 6)]):
        assert plan([*under, *head]).parts[: len(wanted)] == wanted
        wrapped = [(f"model.{name}", nbytes) for name, nbytes in [*under, *head]]
        assert plan(wrapped).parts[: len(wanted)] == wanted


def test_cuts_fall_where_blocks_begin_and_leave_no_gap() -> None:
    block = 7 * MIB + 512
    layout = plan([("embeddings.w", block), *layers("encoder.layer.", 8, block)])
    assert layout.nbytes == round_up(9 * block, PAGE_BYTES)
    blocks = [n * block for n in range(9)]
    for start, _ in layout.parts[1:]:
        assert any(0 <= block - start < CHUNK for block in blocks)
    assert [nbytes >= PART_BYTES_MIN for _, nbytes in layout.parts[:-1]] == [True] * 2


def test_the_number_of_parts_grows_slowly() -> None:
    assert len(plan(layers("layer.", 64, 16 * MIB)).parts) == 64
    assert 300 < len(plan(layers("layer.", 12_800, 16 * MIB)).parts) < 450  # 200 GiB


# --- on disk --------------------------------------------------------------------------------------
def write(path: Path, trunk: bytes, head: bytes) -> ImageHeader:
    sizes = {"bert.w": len(trunk), "classifier.w": len(head)}
    header = header_of(
        [(n, "parameter", True, "uint8", (s,), (1,), s, None) for n, s in sizes.items()]
        + [("tied", "parameter", True, "uint8", (len(trunk),), (1,), len(trunk), "bert.w")]
    )
    first, second, _ = header.tensors
    given = [(first, memoryview(trunk)), (second, memoryview(head))]
    return write_image(path, header, given)


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_images_with_one_trunk_keep_it_once_and_read_back_whole(tmp_path: Path) -> None:
    trunk = bytes(range(256)) * (3 * MIB // 256) + b"end"
    written: dict[Path, bytes] = {}
    for number in range(5):
        path = tmp_path / "images" / f"{number}.image"
        head = bytes([number]) * 5000
        write(path, trunk, head)
        written[path] = head
    (part,) = (tmp_path / "parts").iterdir()
    assert disk_bytes(tmp_path) < len(trunk) + 5 * 20_000
    for path, head in written.items():
        header, payload = read_payload(path)
        assert path_of(path, header.parts[0].digest) == part
        weights = {entry.name: payload[entry.offset :][: entry.nbytes] for entry in header.tensors}
        assert weights == {"bert.w": trunk, "classifier.w": head, "tied": trunk}


def test_a_part_that_is_there_is_not_written_again_and_a_torn_one_is(tmp_path: Path) -> None:
    trunk = bytes(3 * MIB)
    path = tmp_path / "images" / "a.image"
    (info,) = write(path, trunk, b"a").parts
    file = path_of(path, info.digest)
    inode = file.stat().st_ino
    write(path, trunk, b"b")
    assert file.stat().st_ino == inode
    with file.open("r+b") as torn:
        torn.truncate(2 * MIB)
    assert not is_there(path, info)
    write(path, trunk, b"b")
    assert is_there(path, info)
    assert read_payload(path)[1][: len(trunk)] == trunk


def test_another_trunk_is_another_part(tmp_path: Path) -> None:
    digests = {
        write(tmp_path / "images" / f"{n}.image", bytes([n]) * (2 * MIB), b"head").parts[0].digest
        for n in range(3)
    }
    assert len(digests) == 3


# --- the table ------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_versions_get_the_same_part_until_the_last_is_forgotten(order: tuple[int, int]) -> None:
    table = PartTable()
    trunk = PartInfo("abc", 3 * MIB)
    versions = [table.parts_of(4 * MIB + PAGE_BYTES, [trunk]), table.parts_of(8 * MIB, [trunk] * 2)]
    assert [[part.digest for part in parts] for parts in versions] == [["abc", ""], ["abc", "abc"]]
    assert versions[0][1].nbytes == PAGE_BYTES
    assert len({id(part) for parts in versions for part in parts if part.digest}) == 1
    for number in order:
        assert len(table) == 1
        table.forget(versions[number])
    assert len(table) == 0
