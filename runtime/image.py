"""The image: a model version's weights exactly as they lie in its range of addresses.

An image is a container (see there) whose header is an `ImageHeader`, and whose payload is what of the
weights no other version can share.  The rest is in parts, each a container of its own, named by its
content, in a folder beside; a part that is there is not written again.  Where the cuts are, `parts`
says.  A tensor's offset counts from the start of the range, whatever part it lies in.

Invariants
 1. An image's parts are there before it is: its file is written last.
 2. Equal tensor tables give equal layouts: `layout_hash` names the layout.
 3. Equal stretches of weights give equal parts, whatever else the images hold.

Written by the packer, read by the mover (payload) and by workers (header).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from overcommit import __version__
from overcommit.runtime.config import PAGE_BYTES, READ_BYTES, SMALL_CHUNK_BYTES, ModelConfig
from overcommit.runtime.container import (
    FORMAT_VERSION,
    REMEDY,
    Digests,
    Sizes,
    Stored,
    TooLong,
    check_head,
    parse_stored,
    read_head,
    read_stored,
    sync_folder,
    write_container,
    write_packed_container,
)
from overcommit.runtime.errors import ImageError
from overcommit.runtime.image_cache import touch
from overcommit.runtime.image_payload import Payload
from overcommit.runtime.packed import is_worth, pieces_of, unpack_payload, worth_bytes
from overcommit.runtime.parts import PartInfo, path_of, plan, private_bytes, round_up

__all__ = [
    "FORMAT_VERSION",
    "ImageHeader",
    "TensorEntry",
    "TensorFacts",
    "is_there",
    "lay_out",
    "layout_hash",
    "made_by",
    "read_header",
    "read_payload",
    "write_image",
]

PACKER_VERSION: Final = 4  # a packer that makes other images of the same files says so here
_ENCODER = msgspec.msgpack.Encoder()


@functools.cache
def made_by() -> tuple[str, ...]:
    """Name the software that decides what image a folder becomes; torch is not imported for it."""
    versions = [f"overcommit {__version__}", f"packer {PACKER_VERSION}", f"image {FORMAT_VERSION}"]
    for package in ("torch", "transformers", "onnxruntime"):
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
    nbytes: int  # of the range: parts, gaps and what is private
    tensors: tuple[TensorEntry, ...]
    config: ModelConfig
    parts: tuple[PartInfo, ...] = ()  # in order; what is private follows
    stored_bytes: int = 0  # private, in this file
    piece_digests: Digests = ()
    piece_bytes: Sizes = ()  # if that is packed, of each piece
    # `kernels.digest` of the whole range as it lies in DEVICE, gaps as zeros; None: it was not taken.
    content_digest: int | None = None

    @property
    def packed_bytes(self) -> int:
        """What is private, packed; 0: it is not."""
        return self.stored_bytes if self.piece_bytes else 0


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


def lay_out(tensors: Sequence[TensorFacts]) -> tuple[tuple[TensorEntry, ...], int]:
    """Place tensors one after another; return the table and the payload's bytes.

    A tensor is (name, role, persistent, dtype, shape, stride, nbytes, alias_of); an alias takes no
    room and gets the offset of the tensor that it names, which must come before it.  `parts.plan`
    says where the others lie: with a gap before the head, if there is one.
    """
    kept = [(name, nbytes) for name, *_, nbytes, alias_of in tensors if alias_of is None]
    layout = plan(kept)
    offsets = dict(zip((name for name, _ in kept), layout.offsets, strict=True))
    entries = tuple(
        TensorEntry(
            *(name, role, persistent, dtype, shape, stride),
            *(offsets[alias_of or name], nbytes, alias_of),
        )
        for name, role, persistent, dtype, shape, stride, nbytes, alias_of in tensors
    )
    return entries, layout.nbytes


def layout_hash(entries: Sequence[TensorEntry]) -> str:
    """Name a layout: equal tables, equal names."""
    return hashlib.blake2b(_ENCODER.encode(tuple(entries)), digest_size=16).hexdigest()


def write_image(
    path: str | Path,
    header: ImageHeader,
    tensors: Iterable[tuple[TensorEntry, memoryview]],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    packs: bool = False,
) -> ImageHeader:
    """Write an image and those of its parts that are not there; return its header, filled in.

    `packs`: what gets small enough by it is written in its packed form.

    `tensors` gives the bytes of every entry that is no alias, in the table's order.  The file
    appears under `path` complete or not at all, after its parts.  Raises ImageError when the bytes do
    not fit the table, OSError from the disk.
    """
    path = Path(path)
    payload = Payload(header, tensors, on_progress)
    infos = []
    for start, nbytes in payload.plan.parts:
        infos.append(_write_part(path, payload, start, nbytes, packs))
        payload.tell(start + nbytes)
    if infos:
        sync_folder(path_of(path, infos[0].digest).parent)  # an image never outlives its parts
    private = payload.plan.private_bytes
    start = header.nbytes - private
    header = msgspec.structs.replace(
        header,
        parts=tuple(infos),
        stored_bytes=private,
        content_digest=payload.content_digest(),
    )

    def with_pieces(digests: Digests, sizes: Sizes = ()) -> ImageHeader:
        stored = sum(sizes) if sizes else private
        return msgspec.structs.replace(
            header, stored_bytes=stored, piece_digests=digests, piece_bytes=sizes
        )

    done = _try_packed(path, with_pieces, payload, start, private) if packs else None
    if done is None:
        done = write_container(path, with_pieces, private, payload.told(start, private)), ()
    payload.tell(header.nbytes)
    return with_pieces(*done)


def _write_part(path: Path, payload: Payload, start: int, nbytes: int, packs: bool) -> PartInfo:
    """Write a part that is not there, packed if that makes it small enough."""
    digest = payload.digest(start, nbytes)
    if packs:
        file = path_of(path, digest, is_packed=True)
        touch(file)
        if (there := _packed_there(path, digest, nbytes)) is not None:
            return there
        done = _try_packed(
            file,
            lambda digests, sizes: Stored(sum(sizes), digests, sizes),
            *(payload, start, nbytes),
        )
        if done is not None:
            return PartInfo(digest, nbytes, sum(done[1]))
    info = PartInfo(digest, nbytes)
    touch(path_of(path, digest))
    if not is_there(path, info):
        with_digests = functools.partial(Stored, nbytes)
        write_container(path_of(path, digest), with_digests, nbytes, payload.told(start, nbytes))
    return info


def _packed_there(path: Path, digest: str, nbytes: int) -> PartInfo | None:
    """Return the part if its packed form is there and whole, however well it was packed."""
    try:
        stored, _ = read_stored(path_of(path, digest, is_packed=True))
    except ImageError:
        return None
    if len(stored.piece_bytes) != -(-nbytes // READ_BYTES):
        return None
    return PartInfo(digest, nbytes, stored.stored_bytes)


def _try_packed(
    file: Path,
    header_with: Callable[[Digests, Sizes], msgspec.Struct],
    payload: Payload,
    start: int,
    nbytes: int,
) -> tuple[Digests, Sizes] | None:
    """Write bytes of the payload packed; None, and nothing is written, if that is not worth it."""

    def read(at: int, count: int) -> Iterator[memoryview]:
        return payload.pieces(start + at, count)

    if not nbytes or not is_worth(nbytes, read):
        return None
    count, most = -(-nbytes // READ_BYTES), worth_bytes(nbytes)
    try:
        pieces = pieces_of(payload.told(start, nbytes))
        return write_packed_container(file, header_with, count, most, pieces)
    except TooLong:
        return None


def is_there(image_path: str | Path, part: PartInfo) -> bool:
    """Whether a part's file is there and whole; what it holds is checked when it is read."""
    try:
        stored, _ = read_stored(path_of(image_path, part.digest, is_packed=bool(part.packed_bytes)))
    except ImageError:
        return False
    return stored.stored_bytes == (part.packed_bytes or part.nbytes)


# --- reading ------------------------------------------------------------------------------------
def read_header(path: str | Path) -> tuple[ImageHeader, int]:
    """Read an image's header; also return where the payload starts in the file.

    Raises ImageError when the file is no image, is torn, or is of another format version.
    """
    head, size = read_head(path)
    _, start = parse_stored(path, memoryview(head), size)
    _, encoded = check_head(path, memoryview(head))
    try:
        header = _DECODER.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ImageError(f"the header of {path} cannot be decoded: {error}; {REMEDY}") from error
    if header.nbytes <= 0 or header.nbytes % PAGE_BYTES or not _is_private_part(header):
        raise ImageError(f"the header of {path} contradicts itself; {REMEDY}")
    return header, start


def _is_private_part(header: ImageHeader) -> bool:
    """Whether what the file stores can be what no part has."""
    private = private_bytes(header.nbytes, header.parts)
    if not header.piece_bytes:
        return header.stored_bytes == private
    return 0 < header.stored_bytes < private and len(header.piece_bytes) == -(
        -private // READ_BYTES
    )


def read_payload(path: str | Path) -> tuple[ImageHeader, bytearray]:
    """Read an image with its parts, as it lies in a version's range.  Raises ImageError, OSError."""
    header, _ = read_header(path)
    payload = bytearray(header.nbytes)
    private = private_bytes(header.nbytes, header.parts)
    files = [
        (path_of(path, part.digest, is_packed=bool(part.packed_bytes)), part.nbytes)
        for part in header.parts
    ]
    at = 0
    for file, nbytes in [*files, (Path(path), private)]:
        stored, start = read_stored(file)
        with open(file, "rb") as source:
            source.seek(start)
            data = source.read(stored.stored_bytes)
        raw = unpack_payload(data, stored.piece_bytes, nbytes) if stored.piece_bytes else data
        if len(raw) != nbytes:
            raise ImageError(f"{file} holds {len(raw)} bytes, not {nbytes}; {REMEDY}")
        payload[at : at + nbytes] = raw
        at += round_up(nbytes, SMALL_CHUNK_BYTES)
    return header, payload
