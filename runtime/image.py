"""The image file: a model version's weights exactly as they lie in an arena.

    bytes 0..31     magic, format version, header length, header crc32
    then            header, MessagePack (`ImageHeader`), zero padding to 4096
    then            payload: tensors at 256-byte boundaries, padded to 4096

Invariants
 1. A file under its final name is complete: it is written elsewhere, synced, then renamed.
 2. `piece_digests[i]` is the crc32 of payload piece i (READ_BYTES each), so that a loader can check
    what it reads while the next piece is on its way.
 3. Equal tensors tables give equal layouts: `layout_hash` names the layout.

Written by the packer, read by the mover (payload) and by workers (header).
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from overcommit.runtime.config import (
    IMAGE_ALIGN_BYTES,
    PAGE_BYTES,
    READ_BYTES,
    TENSOR_ALIGN_BYTES,
    ModelConfig,
)
from overcommit.runtime.errors import ImageError

MAGIC: Final = b"OVERCOMMITIMAGE\0"
FORMAT_VERSION: Final = 1
HEADER_BYTES_MAX: Final = 64 << 20
_PREFIX: Final = struct.Struct("<16sIQI")
_ENCODER = msgspec.msgpack.Encoder()


class TensorEntry(msgspec.Struct, frozen=True):
    """One registered tensor: a parameter or a buffer, persistent or not, or an alias of another.

    `stride` counts elements; `offset` is from the start of the payload; `dtype` is torch's name.
    """

    name: str
    role: Literal["parameter", "buffer"]
    persistent: bool
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    alias_of: str | None = None


class ImageHeader(msgspec.Struct, frozen=True):
    """Everything but the weights: what engine and program use them, and where each tensor lies."""

    format_version: int
    engine: str
    program_key: str
    program: dict[str, str]
    layout_hash: str
    nbytes: int
    tensors: tuple[TensorEntry, ...]
    config: ModelConfig
    piece_digests: tuple[int, ...] = ()


_DECODER = msgspec.msgpack.Decoder(ImageHeader)

TensorFacts = tuple[
    str,
    Literal["parameter", "buffer"],
    bool,
    str,
    tuple[int, ...],
    tuple[int, ...],
    int,
    str | None,
]


def _up(nbytes: int, boundary: int) -> int:
    return -(-nbytes // boundary) * boundary


def lay_out(tensors: Sequence[TensorFacts]) -> tuple[tuple[TensorEntry, ...], int]:
    """Place tensors one after another; return the table and the payload's bytes.

    A tensor is (name, role, persistent, dtype, shape, stride, nbytes, alias_of); an alias takes no
    room and gets the offset of the tensor that it names, which must come before it.
    """
    offsets: dict[str, int] = {}
    entries = []
    end = 0
    for name, role, persistent, dtype, shape, stride, nbytes, alias_of in tensors:
        if alias_of is None:
            offsets[name] = _up(end, TENSOR_ALIGN_BYTES)
            end = offsets[name] + nbytes
        else:
            offsets[name] = offsets[alias_of]
        entries.append(
            TensorEntry(
                name, role, persistent, dtype, shape, stride, offsets[name], nbytes, alias_of
            )
        )
    return tuple(entries), max(PAGE_BYTES, _up(end, PAGE_BYTES))


def layout_hash(entries: Sequence[TensorEntry]) -> str:
    """Name a layout: equal tables, equal names."""
    return hashlib.blake2b(_ENCODER.encode(tuple(entries)), digest_size=16).hexdigest()


class _PayloadWriter:
    """Writes the payload in order and computes the digest of each piece on the way."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._piece_crc = 0
        self.position = 0
        self.digests: list[int] = []

    def write(self, data: memoryview) -> None:
        while data:
            room = READ_BYTES - self.position % READ_BYTES
            part = data[:room]
            written = os.write(self._fd, part)
            self._piece_crc = zlib.crc32(part[:written], self._piece_crc)
            self.position += written
            data = data[written:]
            if self.position % READ_BYTES == 0:
                self._end_piece()

    def pad_to(self, position: int) -> None:
        zeros = memoryview(bytes(1 << 16))
        while self.position < position:
            self.write(zeros[: min(len(zeros), position - self.position)])

    def finish(self) -> None:
        if self.position % READ_BYTES:
            self._end_piece()

    def _end_piece(self) -> None:
        self.digests.append(self._piece_crc)
        self._piece_crc = 0


def write_image(
    path: str | Path,
    header: ImageHeader,
    tensors: Iterable[tuple[TensorEntry, memoryview]],
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageHeader:
    """Write an image; return its header with the digests filled in.

    `tensors` gives the bytes of every entry that is no alias, in the table's order.  The file
    appears under `path` complete or not at all.  Raises ImageError when the bytes do not fit the
    table, OSError from the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = -(-header.nbytes // READ_BYTES)
    # Digests are fixed-size on the wire only if they are large: reserve with the largest crc.
    reserved = msgspec.structs.replace(header, piece_digests=(0xFFFFFFFF,) * pieces)
    start = _up(_PREFIX.size + len(_ENCODER.encode(reserved)), IMAGE_ALIGN_BYTES)
    fd, temporary = tempfile.mkstemp(prefix=".packing-", dir=path.parent)
    try:
        os.lseek(fd, start, os.SEEK_SET)
        writer = _PayloadWriter(fd)
        for entry, data in tensors:
            if len(data) != entry.nbytes or writer.position > entry.offset:
                raise ImageError(
                    f"tensor '{entry.name}' has {len(data)} bytes, its entry says {entry.nbytes}"
                )
            writer.pad_to(entry.offset)
            writer.write(data)
            if on_progress is not None:
                on_progress(writer.position, header.nbytes)
        if writer.position > header.nbytes:
            raise ImageError(f"the tensors are longer than the payload of {header.nbytes} bytes")
        writer.pad_to(header.nbytes)
        writer.finish()
        done = msgspec.structs.replace(header, piece_digests=tuple(writer.digests))
        encoded = _ENCODER.encode(done)
        prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(encoded), zlib.crc32(encoded))
        os.pwrite(fd, prefix + encoded, 0)
        os.fchmod(fd, 0o644)
        os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    _sync_folder(path.parent)
    return done


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_header(path: str | Path) -> tuple[ImageHeader, int]:
    """Read an image's header; also return where the payload starts in the file.

    Raises ImageError when the file is no image, is torn, or is of another format version.
    """
    try:
        with open(path, "rb") as file:
            prefix = file.read(_PREFIX.size)
            if len(prefix) < _PREFIX.size:
                raise ImageError(f"{path} is too short for an image; delete it to pack it again")
            magic, version, length, crc = _PREFIX.unpack(prefix)
            if magic != MAGIC:
                raise ImageError(f"{path} is no image; delete it to pack it again")
            if version != FORMAT_VERSION:
                raise ImageError(
                    f"{path} has image format {version}, this server reads {FORMAT_VERSION}; "
                    f"delete it to pack it again"
                )
            encoded = file.read(length) if length <= HEADER_BYTES_MAX else b""
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    if len(encoded) != length or zlib.crc32(encoded) != crc:
        raise ImageError(f"the header of {path} is damaged; delete it to pack it again")
    try:
        header = _DECODER.decode(encoded)
    except msgspec.DecodeError as error:
        raise ImageError(f"the header of {path} cannot be decoded: {error}") from error
    pieces = -(-header.nbytes // READ_BYTES)
    reserved = msgspec.structs.replace(header, piece_digests=(0xFFFFFFFF,) * pieces)
    start = _up(_PREFIX.size + len(_ENCODER.encode(reserved)), IMAGE_ALIGN_BYTES)
    if size < start + header.nbytes:
        raise ImageError(f"{path} is cut off; delete it to pack it again")
    return header, start
