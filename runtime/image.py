"""The image file: a model version's weights exactly as they lie in an arena.

    prefix          magic, format version, payload offset, header length, crc32 of these and the header
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

import functools
import hashlib
import importlib.metadata
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from overcommit import __version__
from overcommit.runtime.config import (
    IMAGE_ALIGN_BYTES,
    PAGE_BYTES,
    READ_BYTES,
    TENSOR_ALIGN_BYTES,
    ModelConfig,
)
from overcommit.runtime.errors import ImageError

MAGIC: Final = b"OVERCOMMITIMAGE\0"
FORMAT_VERSION: Final = 2
PACKER_VERSION: Final = 2  # a packer that makes other images of the same files says so here
HEADER_BYTES_MAX: Final = 64 << 20
# The payload's offset is stored, not computed from the header: it must survive a new header field.
_FIELDS: Final = struct.Struct("<16sIQQ")
_CRC: Final = struct.Struct("<I")
_PREFIX_BYTES: Final = _FIELDS.size + _CRC.size
_REMEDY: Final = "delete it to pack it again"
_ENCODER = msgspec.msgpack.Encoder()


@functools.cache
def made_by() -> tuple[str, ...]:
    """Name the software that decides what image a folder becomes; torch is not imported for it."""
    versions = [f"overcommit {__version__}", f"packer {PACKER_VERSION}", f"image {FORMAT_VERSION}"]
    for package in ("torch", "transformers"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} -")
    return tuple(versions)


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
    # The payload is written first and its digests are not known yet: leave room for the largest.
    reserved = msgspec.structs.replace(header, piece_digests=(0xFFFFFFFF,) * pieces)
    start = _up(_PREFIX_BYTES + len(_ENCODER.encode(reserved)), IMAGE_ALIGN_BYTES)
    fd, temporary = tempfile.mkstemp(prefix=".packing-", dir=path.parent)
    try:
        os.lseek(fd, start, os.SEEK_SET)
        digests = _write_payload(fd, header, tensors, on_progress)
        done = msgspec.structs.replace(header, piece_digests=digests)
        _write_header(fd, start, _ENCODER.encode(done))
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


def _write_payload(
    fd: int,
    header: ImageHeader,
    tensors: Iterable[tuple[TensorEntry, memoryview]],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[int, ...]:
    """Write every tensor to its place; return the digests.  A missing one must not become zeros."""
    writer = _PayloadWriter(fd)
    wanted = (entry for entry in header.tensors if entry.alias_of is None)
    for entry, data in tensors:
        if entry != next(wanted, None):
            raise ImageError(f"tensor '{entry.name}' is not the next one of the table")
        if data.nbytes != entry.nbytes or writer.position > entry.offset:
            raise ImageError(
                f"tensor '{entry.name}' has {data.nbytes} bytes, its entry says {entry.nbytes}"
            )
        writer.pad_to(entry.offset)
        writer.write(data)
        if on_progress is not None:
            on_progress(writer.position, header.nbytes)
    if (missing := next(wanted, None)) is not None:
        raise ImageError(f"tensor '{missing.name}' was not given")
    if writer.position > header.nbytes:
        raise ImageError(f"the tensors are longer than the payload of {header.nbytes} bytes")
    writer.pad_to(header.nbytes)
    writer.finish()
    return tuple(writer.digests)


def _write_header(fd: int, payload_offset: int, encoded: bytes) -> None:
    fields = _FIELDS.pack(MAGIC, FORMAT_VERSION, payload_offset, len(encoded))
    head = memoryview(fields + _CRC.pack(zlib.crc32(fields + encoded)) + encoded)
    assert len(head) <= payload_offset
    done = 0
    while done < len(head):
        done += os.pwrite(fd, head[done:], done)


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
            head = file.read(_PREFIX_BYTES)
            _, length = _read_prefix(path, head)
            head += file.read(length)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    return parse_header(path, memoryview(head), size)


def parse_header(path: str | Path, head: memoryview, size: int) -> tuple[ImageHeader, int]:
    """Return the header that a file of `size` bytes begins with, and where its payload starts.

    `head` may be longer than the header.  Raises ImageError as `read_header`.
    """
    start, encoded = check_head(path, head)
    try:
        header = _DECODER.decode(encoded)
    except msgspec.DecodeError as error:
        raise ImageError(f"the header of {path} cannot be decoded: {error}; {_REMEDY}") from error
    if (
        header.nbytes <= 0
        or header.nbytes % PAGE_BYTES
        or start % IMAGE_ALIGN_BYTES
        or len(header.piece_digests) != -(-header.nbytes // READ_BYTES)
    ):
        raise ImageError(f"the header of {path} contradicts itself; {_REMEDY}")
    if size < start + header.nbytes:
        raise ImageError(
            f"{path} is cut off: {size} bytes of {start + header.nbytes} are there; {_REMEDY}"
        )
    return header, start


def check_head(path: str | Path, head: memoryview) -> tuple[int, memoryview]:
    """Check a header against its own digest; return where the payload starts, and the header.

    Raises ImageError when these are not the first bytes of an image.
    """
    start, length = _read_prefix(path, head)
    encoded = head[_PREFIX_BYTES : _PREFIX_BYTES + length]
    (crc,) = _CRC.unpack_from(head, _FIELDS.size)
    if len(encoded) != length or zlib.crc32(encoded, zlib.crc32(head[: _FIELDS.size])) != crc:
        raise ImageError(f"the header of {path} is damaged; {_REMEDY}")
    return start, encoded


def _read_prefix(path: str | Path, prefix: bytes | memoryview) -> tuple[int, int]:
    """Return where the payload starts and how long the header is."""
    if len(prefix) < _PREFIX_BYTES:
        raise ImageError(f"{path} is too short for an image; {_REMEDY}")
    magic, version, start, length = _FIELDS.unpack_from(prefix)
    if magic != MAGIC:
        raise ImageError(f"{path} is no image; {_REMEDY}")
    if version != FORMAT_VERSION:
        raise ImageError(
            f"{path} has image format {version}, this server reads {FORMAT_VERSION}; {_REMEDY}"
        )
    if length > min(HEADER_BYTES_MAX, start):
        raise ImageError(f"the header of {path} is damaged; {_REMEDY}")
    return start, length
