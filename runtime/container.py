"""A container: a file with a header and a payload, as images and parts are kept.

    prefix          magic, format version, payload offset, header length, crc32 of these and the header
    then            header, MessagePack, zero padding to 4096
    then            payload, a multiple of 4096, perhaps nothing

A payload is raw, or in the packed form of `packed`; then the header says how long each piece is.

Invariants
 1. A file under its final name is complete: it is written elsewhere, synced, then renamed.
 2. `piece_digests[i]` is the crc32 of payload piece i (READ_BYTES each, or packed), so that a loader
    can check what it reads while the next piece is on its way.

Whatever else a header says, a loader needs `Stored` alone.  Called by `image` and `image_file`.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from overcommit.runtime.config import IMAGE_ALIGN_BYTES, PAGE_BYTES, READ_BYTES
from overcommit.runtime.errors import ImageError
from overcommit.runtime.parts import round_up

MAGIC: Final = b"OVERCOMMITIMAGE\0"
FORMAT_VERSION: Final = 3
HEADER_BYTES_MAX: Final = 64 << 20
TEMPORARY_PREFIX: Final = ".packing-"
REMEDY: Final = "delete it to pack it again"
# The payload's offset is stored, not computed from the header: it must survive a new header field.
_FIELDS: Final = struct.Struct("<16sIQQ")
_CRC: Final = struct.Struct("<I")
_PREFIX_BYTES: Final = _FIELDS.size + _CRC.size

Digests = tuple[int, ...]
Sizes = tuple[int, ...]
_U32_MAX: Final = 0xFFFFFFFF


class Stored(msgspec.Struct, frozen=True):
    """What a header says of the payload in its file."""

    stored_bytes: int
    piece_digests: Digests = ()
    piece_bytes: Sizes = ()  # of each packed piece; none: the payload is raw


class TooLong(Exception):
    """Packed pieces take more than was allowed."""


_DECODER = msgspec.msgpack.Decoder(Stored)
_ENCODER = msgspec.msgpack.Encoder()


# --- writing ------------------------------------------------------------------------------------
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

    def finish(self) -> Digests:
        if self.position % READ_BYTES:
            self._end_piece()
        return tuple(self.digests)

    def _end_piece(self) -> None:
        self.digests.append(self._piece_crc)
        self._piece_crc = 0


def write_container(
    path: Path,
    header_with: Callable[[Digests], msgspec.Struct],
    stored_bytes: int,
    payload: Iterable[memoryview],
) -> Digests:
    """Write a file whose payload is these bytes; return the digests of its pieces.

    It appears under `path` complete or not at all.  Raises OSError from the disk, and what `payload`
    raises.
    """
    # The payload is written first and its digests are not known yet: leave room for the largest.
    reserved = header_with((_U32_MAX,) * -(-stored_bytes // READ_BYTES))
    with _new_file(path, reserved) as (fd, start):
        writer = _PayloadWriter(fd)
        for data in payload:
            writer.write(data)
        digests = writer.finish()
        assert writer.position == stored_bytes
        _write_header(fd, start, _ENCODER.encode(header_with(digests)))
        os.ftruncate(fd, start + stored_bytes)  # a header alone is padded too
    return digests


def write_packed_container(
    path: Path,
    header_with: Callable[[Digests, Sizes], msgspec.Struct],
    count: int,
    bytes_max: int,
    pieces: Iterable[bytearray],
) -> tuple[Digests, Sizes]:
    """Write a file whose payload is `count` packed pieces; return their digests and lengths.

    It appears under `path` complete or not at all.  Raises OSError from the disk, TooLong for pieces of
    more than `bytes_max` in all.
    """
    reserved = header_with((_U32_MAX,) * count, (_U32_MAX,) * count)
    digests: list[int] = []
    sizes: list[int] = []
    with _new_file(path, reserved) as (fd, start):
        for piece in pieces:
            digests.append(zlib.crc32(piece))
            sizes.append(len(piece))
            if sum(sizes) > bytes_max:
                raise TooLong
            left = memoryview(piece)
            while left:
                left = left[os.write(fd, left) :]
        assert len(sizes) == count
        _write_header(fd, start, _ENCODER.encode(header_with(tuple(digests), tuple(sizes))))
        os.ftruncate(fd, start + sum(sizes))
    return tuple(digests), tuple(sizes)


@contextlib.contextmanager
def _new_file(path: Path, reserved: msgspec.Struct) -> Iterator[tuple[int, int]]:
    """Yield a file to write a payload to, at the place where it starts, and that place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = round_up(_PREFIX_BYTES + len(_ENCODER.encode(reserved)), IMAGE_ALIGN_BYTES)
    fd, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    try:
        os.lseek(fd, start, os.SEEK_SET)
        yield fd, start
        os.fchmod(fd, 0o644)
        os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    # The name is not synced: after a power cut the whole file is there or is made again, and who wrote
    # down its name looks whether it is there.  With many small files it was a quarter of the time.


def sync_folder(folder: Path) -> None:
    """Make sure that the names of files in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_header(fd: int, payload_offset: int, encoded: bytes) -> None:
    fields = _FIELDS.pack(MAGIC, FORMAT_VERSION, payload_offset, len(encoded))
    head = memoryview(fields + _CRC.pack(zlib.crc32(fields + encoded)) + encoded)
    assert len(head) <= payload_offset
    done = 0
    while done < len(head):
        done += os.pwrite(fd, head[done:], done)


# --- reading ------------------------------------------------------------------------------------
def read_head(path: str | Path) -> tuple[bytes, int]:
    """Read prefix and header; also return the file's size.

    Raises ImageError when the file is no container or is of another format version.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_PREFIX_BYTES)
            _, length = _read_prefix(path, head)
            return head + file.read(length), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ImageError(unreadable(path, error)) from error


def unreadable(path: str | Path, error: OSError) -> str:
    """Say that a file of the cache cannot be read, and what becomes of one that is gone."""
    if isinstance(error, FileNotFoundError):
        return f"{path} is gone from the cache; a server that misses it makes it again: ask once more soon"
    return f"{path} cannot be read: {error.strerror}"


def read_stored(path: str | Path) -> tuple[Stored, int]:
    """Return what a file stores, and where that starts in it.  Raises ImageError."""
    head, size = read_head(path)
    return parse_stored(path, memoryview(head), size)


def parse_stored(path: str | Path, head: memoryview, size: int) -> tuple[Stored, int]:
    """Return what a file of `size` bytes that begins so stores, and where that starts.

    `head` may be longer than the header.  Raises ImageError when the file is no container, is torn,
    or is of another format version.
    """
    start, encoded = check_head(path, head)
    try:
        stored = _DECODER.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ImageError(f"the header of {path} cannot be decoded: {error}; {REMEDY}") from error
    if (
        stored.stored_bytes < 0
        or stored.stored_bytes % PAGE_BYTES
        or start % IMAGE_ALIGN_BYTES
        or len(stored.piece_digests) != _count_of_pieces(stored)
        or any(size <= 0 or size % PAGE_BYTES for size in stored.piece_bytes)
    ):
        raise ImageError(f"the header of {path} contradicts itself; {REMEDY}")
    if size < start + stored.stored_bytes:
        raise ImageError(
            f"{path} is cut off: {size} bytes of {start + stored.stored_bytes} are there; {REMEDY}"
        )
    return stored, start


def _count_of_pieces(stored: Stored) -> int:
    if not stored.piece_bytes:
        return -(-stored.stored_bytes // READ_BYTES)
    return len(stored.piece_bytes) if sum(stored.piece_bytes) == stored.stored_bytes else -1


def check_head(path: str | Path, head: memoryview) -> tuple[int, memoryview]:
    """Check a header against its own digest; return where the payload starts, and the header.

    Raises ImageError when these are not the first bytes of an image.
    """
    start, length = _read_prefix(path, head)
    encoded = head[_PREFIX_BYTES : _PREFIX_BYTES + length]
    (crc,) = _CRC.unpack_from(head, _FIELDS.size)
    if len(encoded) != length or zlib.crc32(encoded, zlib.crc32(head[: _FIELDS.size])) != crc:
        raise ImageError(f"the header of {path} is damaged; {REMEDY}")
    return start, encoded


def _read_prefix(path: str | Path, prefix: bytes | memoryview) -> tuple[int, int]:
    """Return where the payload starts and how long the header is."""
    if len(prefix) < _PREFIX_BYTES:
        raise ImageError(f"{path} is too short for an image; {REMEDY}")
    magic, version, start, length = _FIELDS.unpack_from(prefix)
    if magic != MAGIC:
        raise ImageError(f"{path} is no image; {REMEDY}")
    if version != FORMAT_VERSION:
        raise ImageError(
            f"{path} has image format {version}, this server reads {FORMAT_VERSION}; {REMEDY}"
        )
    if length > min(HEADER_BYTES_MAX, start):
        raise ImageError(f"the header of {path} is damaged; {REMEDY}")
    return start, length
