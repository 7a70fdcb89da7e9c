"""Packed payloads: their pieces, and loads of them in every way that a load can go."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from mover_rig import Memory, MoverProcess, bf16, flip_byte, make_packed_image

from overcommit.runtime import loading, packed
from overcommit.runtime.config import KIB, MIB, PAGE_BYTES, READ_BYTES, UNPACK_STEP_BYTES
from overcommit.runtime.errors import ImageError
from overcommit.runtime.loading import LoadState
from overcommit.runtime.messages import Extents
from overcommit.runtime.mover_messages import Load, LoadDone
from overcommit.runtime.places import Base

ARENA_BYTES = 48 * MIB
# Out of order and with gaps; a packed piece lies across several of HOST's.
DEVICE: Extents = ((40 * MIB, 8 * MIB), (0, 12 * MIB))
HOST: Extents = ((20 * MIB, 2 * MIB), (4 * MIB, 10 * MIB), (30 * MIB, 8 * MIB))
LENGTHS = [64 * KIB + PAGE_BYTES, READ_BYTES, 17 * MIB + PAGE_BYTES]


class Box:
    """Two arenas."""

    def __init__(self) -> None:
        self.host_memory = Memory("host", ARENA_BYTES)
        self.device_memory = Memory("device", ARENA_BYTES)
        self.host = Base("host", self.host_memory.address, ARENA_BYTES)
        self.device = Base("device", self.device_memory.address, ARENA_BYTES)

    def run(self, load: Load) -> LoadDone:
        state = LoadState(load, self.device, self.host)
        while not state.is_over:
            step = state.take_read() or state.take_copy()
            assert step is not None
            state.finish(step, state.run(step))
        return state.close()

    def close(self) -> None:
        self.host_memory.close()
        self.device_memory.close()


@pytest.fixture
def box() -> Iterator[Box]:
    made = Box()
    yield made
    made.close()


def load_of(path: Path, data: bytes, packed_bytes: int, **fields: object) -> Load:
    values = {"job": 1, "slot": 0, "source": "disk", "path": str(path), **fields}
    return Load(nbytes=len(data), packed_bytes=packed_bytes, **values)  # type: ignore[arg-type]


# --- pieces -------------------------------------------------------------------------------------
@pytest.mark.parametrize("nbytes", [1, 7, 4095, 64 * KIB + 1, READ_BYTES, READ_BYTES + 2])
@pytest.mark.parametrize("kind", ["weights", "noise", "zeros"])
def test_what_was_packed_comes_back(nbytes: int, kind: str) -> None:
    noise = random.Random(1).randbytes(nbytes)
    data = {"weights": bf16(nbytes)[:nbytes], "noise": noise, "zeros": bytes(nbytes)}[kind]
    cut = [memoryview(data)[: nbytes // 3], memoryview(data)[nbytes // 3 :]]
    pieces = list(packed.pieces_of(cut))
    assert all(len(piece) % PAGE_BYTES == 0 for piece in pieces)
    sizes = [len(piece) for piece in pieces]
    assert packed.unpack_payload(b"".join(pieces), sizes, nbytes) == data


def test_a_piece_that_was_changed_does_not_decode_to_something_else() -> None:
    piece = packed.pack_piece(bytearray(bf16(1 * MIB)))
    piece[300 * KIB] ^= 1
    with pytest.raises(ImageError, match="decoded"):
        packed.unpack_payload(bytes(piece), [len(piece)], 1 * MIB)


def test_a_sample_says_whether_packing_is_worth_it() -> None:
    weights, noise = bf16(4 * MIB), random.Random(2).randbytes(4 * MIB)
    for data, expected in ((weights, True), (noise, False), (noise + weights * 2, True)):
        found = packed.is_worth(len(data), lambda at, n, d=data: [memoryview(d)[at : at + n]])
        assert found is expected


# --- loads --------------------------------------------------------------------------------------
@pytest.mark.parametrize("nbytes", LENGTHS)
@pytest.mark.parametrize("host", [HOST, None])
@pytest.mark.parametrize("verify", [True, False])
def test_a_packed_file_reaches_the_device(
    box: Box, tmp_path: Path, nbytes: int, host: Extents | None, verify: bool
) -> None:
    data, size = make_packed_image(tmp_path / "file", nbytes)
    load = load_of(tmp_path / "file", data, size, host=host, device=DEVICE, verify=verify)
    done = box.run(load)
    assert (done.ok, done.message, done.read_bytes) == (True, "", size)
    assert box.device_memory.read(DEVICE, len(data)) == data


@pytest.mark.parametrize("nbytes", LENGTHS)
@pytest.mark.parametrize("host", [HOST, ((8 * MIB, 20 * MIB),)])
@pytest.mark.parametrize("verify", [True, False])
def test_a_copy_in_host_is_packed_and_is_decoded_to_the_device(
    box: Box, tmp_path: Path, nbytes: int, host: Extents, verify: bool
) -> None:
    data, size = make_packed_image(tmp_path / "file", nbytes)
    assert box.run(load_of(tmp_path / "file", data, size, host=host, verify=True)).ok
    stored = box.host_memory.read(host, size)
    assert (tmp_path / "file").read_bytes().endswith(stored)
    (tmp_path / "file").unlink()
    again = load_of(
        *(tmp_path / "file", data, size),
        host=host,
        device=DEVICE,
        source="host",
        verify=verify,
    )
    done = box.run(again)
    assert (done.ok, done.message, done.read_bytes) == (True, "", 0)
    assert box.device_memory.read(DEVICE, len(data)) == data


def test_a_copy_that_lies_in_one_is_decoded_by_several(box: Box, tmp_path: Path) -> None:
    data, size = make_packed_image(tmp_path / "file", 16 * MIB)
    host: Extents = ((8 * MIB, 20 * MIB),)
    assert box.run(load_of(tmp_path / "file", data, size, host=host)).ok
    fields = {"host": host, "device": DEVICE, "source": "host", "verify": False}
    state = LoadState(load_of(tmp_path / "file", data, size, **fields), box.device, box.host)
    steps = []
    while (step := state.take_copy()) is not None:
        steps.append(step)
    assert all(step.start % UNPACK_STEP_BYTES == 0 for step in steps)
    assert len(steps) > 2, "more than one a piece"
    for step in reversed(steps):
        state.finish(step, state.run(step))
    assert state.state is loading.State.DONE
    assert box.device_memory.read(DEVICE, len(data)) == data


@pytest.mark.parametrize("at", [100, 9 * MIB])
def test_a_damaged_file_is_refused(box: Box, tmp_path: Path, at: int) -> None:
    data, size = make_packed_image(tmp_path / "file", 17 * MIB)
    flip_byte(tmp_path / "file", at)
    done = box.run(load_of(tmp_path / "file", data, size, host=HOST, device=DEVICE))
    assert not done.ok
    assert "digest" in done.message, done.message


def test_damage_in_host_is_found_by_who_checks_what_was_decoded(box: Box, tmp_path: Path) -> None:
    data, size = make_packed_image(tmp_path / "file", 6 * MIB)
    assert box.run(load_of(tmp_path / "file", data, size, host=HOST)).ok
    at = HOST[1][0] + 100 * KIB
    box.host_memory.view[at] ^= 1
    fields = {"host": HOST, "device": DEVICE, "source": "host", "verify": True}
    done = box.run(load_of(tmp_path / "file", data, size, **fields))
    assert not done.ok
    assert "decoded" in done.message, done.message


def test_a_head_in_host_that_is_damaged_fails_its_load_alone(box: Box, tmp_path: Path) -> None:
    data, size = make_packed_image(tmp_path / "file", 17 * MIB)
    assert box.run(load_of(tmp_path / "file", data, size, host=HOST)).ok
    box.host_memory.view[HOST[0][0]] ^= 1
    fields = {"host": HOST, "device": DEVICE, "source": "host"}
    with pytest.raises(ImageError, match="does not begin"):
        box.run(load_of(tmp_path / "file", data, size, **fields))


def test_a_raw_file_is_not_taken_for_a_packed_one(box: Box, tmp_path: Path) -> None:
    from mover_rig import make_image

    data = make_image(tmp_path / "raw", 9 * MIB)
    done = box.run(load_of(tmp_path / "raw", bytes(12 * MIB), len(data), host=HOST))
    assert not done.ok
    _, size = make_packed_image(tmp_path / "packed", 9 * MIB)
    done = box.run(load_of(tmp_path / "packed", bytes(size), 0, host=HOST))
    assert not done.ok


@pytest.mark.parametrize("source", ["disk", "host"])
def test_a_mover_killed_in_the_middle_loses_nothing(tmp_path: Path, source: str) -> None:
    data, size = make_packed_image(tmp_path / "file", 17 * MIB + PAGE_BYTES)
    host, device = Memory("host", ARENA_BYTES), Memory("device", ARENA_BYTES)
    first = load_of(tmp_path / "file", data, size, host=HOST, device=DEVICE)
    mover = MoverProcess(device, host)
    try:
        if source == "host":
            assert mover.load(first).ok
            device.fill(3)
            first = load_of(tmp_path / "file", data, size, host=HOST, device=DEVICE, source="host")
        mover.control.send(first)
        mover.kill()
        mover.control.close()
        before = host.read(HOST, size)
        mover = MoverProcess(device, host)
        assert mover.load(first).ok
        assert device.read(DEVICE, len(data)) == data
        if source == "host":
            assert host.read(HOST, size) == before
    finally:
        mover.close()
        host.close()
        device.close()


def test_what_is_decoded_is_whole_blocks_but_at_the_end() -> None:
    spans = [(0, 2 * MIB), (6 * MIB, 64 * KIB), (9 * MIB, PAGE_BYTES)]
    found = [(address, first, count) for address, _, first, count in packed.blocks_of(spans)]
    assert found == [(0, 0, 32), (6 * MIB, 32, 1), (9 * MIB, 33, 1)]
