"""The pack index: which image belongs to which version, kept across starts of the server.

A file of records in the cache folder, only ever appended to, so that packing 20,000 versions
writes each fact once.  Record: length (u32), CRC-32 (u32), MessagePack.  The first record names the
format.

Invariants
 1. A fact is used only if folder, fingerprint, config and the packing software are the same as
    when it was learnt and the image file is still there; so a start with an unchanged repository
    packs nothing and reads no image.
 2. A torn or foreign file loses facts, never invents one: reading stops at the first bad record.
    What is lost is learnt again by packing.
 3. A fact is here or with who took it, not in both places: 20,000 of them are 5 MB.  Of those that nobody
    takes, of versions that were replaced or removed, the last SPARE_FACTS_MAX stay in memory.
 4. Several processes may append (a server, `overcommit pack`): each record is one `write` under a
    file lock, and the file is replaced by rename under the same lock.

Called by the registry.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from overcommit.runtime.config import MIB, VERSIONS_MAX, ModelConfig
from overcommit.runtime.image import made_by
from overcommit.runtime.packer_messages import PackDone
from overcommit.runtime.parts import PartInfo, path_of, private_bytes

log = logging.getLogger("overcommit.pack_index")

FILE_NAME: Final = "index.msgpack"
FORMAT: Final = 1
RECORD_BYTES_MAX: Final = 1 * MIB
RECORDS_MAX: Final = 4 * VERSIONS_MAX  # after that the file is written anew with what is in use
SPARE_FACTS_MAX: Final = VERSIONS_MAX // 8
ENCODINGS_MAX: Final = 1024
_HEAD: Final = struct.Struct("<II")


class _Opening(msgspec.Struct, frozen=True, array_like=True):
    magic: str = "overcommit-index"
    format: int = FORMAT


class Fact(msgspec.Struct, frozen=True, array_like=True):
    """What packing found out about one version."""

    key: bytes
    image_path: str
    content_key: str
    program_key: str
    nbytes: int
    engine: str
    config: ModelConfig  # inputs and outputs filled in
    parts: tuple[PartInfo, ...] = ()
    packed_bytes: int = 0


class PackIndex:
    """The facts of one cache folder.

    `packs`: of images whose weights are packed; both kinds may share a folder.
    """

    def __init__(self, cache_dir: str | os.PathLike[str], *, packs: bool = False) -> None:
        self._path = Path(cache_dir) / FILE_NAME
        self._encoder = msgspec.msgpack.Encoder()
        # Another release or another torch may make another image of the same files.  Two of them
        # may share a cache folder: each finds its own facts.
        self._made_by = "\0".join((*made_by(), *(("packed",) if packs else ()))).encode()
        self._facts: dict[bytes, Fact] = {}
        # Most versions of a big repository have the same config: keep one of each.
        self._configs: dict[bytes, ModelConfig] = {}
        self._parts: dict[PartInfo, PartInfo] = {}  # one of each, too
        self._records = 0
        self._encodings: dict[int, tuple[ModelConfig, bytes]] = {}  # by the object's identity
        self._load()

    def __len__(self) -> int:
        return len(self._facts)

    def key(self, folder: str, fingerprint: str, config: ModelConfig) -> bytes:
        """Name a version in a state."""
        digest = hashlib.blake2b(self._made_by, digest_size=16)
        for part in (os.fsencode(folder), fingerprint.encode(), self._encoded(config)):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(part)
        return digest.digest()

    def _encoded(self, config: ModelConfig) -> bytes:
        """Encode it; thousands of versions have the same object."""
        known = self._encodings.get(id(config))
        if known is not None and known[0] is config:
            return known[1]
        if len(self._encodings) >= ENCODINGS_MAX:
            self._encodings.clear()
        encoded = self._encoder.encode(config)
        self._encodings[id(config)] = config, encoded
        return encoded

    def take(self, folder: str, fingerprint: str, config: ModelConfig) -> PackDone | None:
        """Return what packing would answer, but for the key, if it is known and the image is still there.

        Whoever takes a fact keeps it; here it is forgotten until it is put back.
        """
        fact = self._facts.pop(self.key(folder, fingerprint, config), None)
        if fact is None:
            return None
        try:
            private = fact.packed_bytes or private_bytes(fact.nbytes, fact.parts)
            if os.stat(fact.image_path).st_size < private:
                return None
            for part in fact.parts:
                is_packed = bool(part.packed_bytes)
                file = path_of(fact.image_path, part.digest, is_packed=is_packed)
                if os.stat(file).st_size < (part.packed_bytes or part.nbytes):
                    return None
        except OSError:
            return None
        return PackDone(
            job=0,
            ok=True,
            image_path=fact.image_path,
            program_key=fact.program_key,
            nbytes=fact.nbytes,
            engine=fact.engine,
            config=fact.config,
            parts=fact.parts,
            packed_bytes=fact.packed_bytes,
        )

    def trim(self) -> None:
        """Who is there has taken what he needs: forget, but not in the file, what was known longest."""
        for key in list(self._facts)[: max(0, len(self._facts) - SPARE_FACTS_MAX)]:
            del self._facts[key]

    def put_back(
        self, folder: str, fingerprint: str, config: ModelConfig, done: PackDone
    ) -> PackDone:
        """Know a success until it is taken; return it with what many say alike as one object."""
        fact = self._lean(self._to_fact(folder, fingerprint, config, done))
        self._facts[fact.key] = fact
        return msgspec.structs.replace(
            done,
            program_key=fact.program_key,
            engine=fact.engine,
            config=fact.config,
            parts=fact.parts,
        )

    def add(self, folder: str, fingerprint: str, config: ModelConfig, done: PackDone) -> PackDone:
        """Write a success down; return it as `put_back` does, but as if it was taken at once.

        A file that cannot be written costs only the next start's time, so it is logged and no more.
        """
        fact = self._to_fact(folder, fingerprint, config, done)
        try:
            self._append(fact)
        except OSError as error:
            log.warning("the pack index %s cannot be written: %s", self._path, error)
        shared = self.put_back(folder, fingerprint, config, done)
        del self._facts[fact.key]
        return shared

    def _to_fact(self, folder: str, fingerprint: str, config: ModelConfig, done: PackDone) -> Fact:
        return Fact(
            key=self.key(folder, fingerprint, config),
            image_path=done.image_path,
            content_key=Path(done.image_path).stem,
            program_key=done.program_key,
            nbytes=done.nbytes,
            engine=done.engine,
            config=done.config,
            parts=done.parts,
            packed_bytes=done.packed_bytes,
        )

    # --- the file -------------------------------------------------------------------------------
    def _load(self) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("the pack index %s cannot be read: %s", self._path, error)
            return
        good = 0
        for fact, end in _read_records(content):
            good = end
            if fact is not None:
                self._records += 1
                self._facts[fact.key] = self._lean(fact)
        if good < len(content):
            log.warning("the pack index %s is torn at byte %d: the rest is lost", self._path, good)
        if good < len(content) or self._records > RECORDS_MAX:
            with contextlib.suppress(OSError):
                self._rewrite()

    def _append(self, fact: Fact) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as fd:
            record = b"" if os.fstat(fd).st_size else _record(self._encoder.encode(_Opening()))
            os.write(fd, record + _record(self._encoder.encode(fact)))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file of now for appending, locked against other processes."""
        while True:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                # While we waited for the lock its holder may have put another file in place.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                        yield fd
                        return
            finally:
                os.close(fd)

    def _rewrite(self) -> None:
        """Keep only facts whose image exists; atomic."""
        temporary = self._path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
        with self._locked():
            # Another process may have added to the file, or mended it, since we read it.
            for fact, _ in _read_records(self._path.read_bytes()):
                if fact is not None:
                    self._facts[fact.key] = fact
            facts = [fact for fact in self._facts.values() if os.path.exists(fact.image_path)]
            records = [_record(self._encoder.encode(part)) for part in (_Opening(), *facts)]
            with temporary.open("wb") as file:
                file.write(b"".join(records))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        self._records = len(facts)

    def _lean(self, fact: Fact) -> Fact:
        """What many facts say alike is one object; the content key is in the image's name."""
        return msgspec.structs.replace(
            fact,
            content_key="",
            program_key=sys.intern(fact.program_key),
            engine=sys.intern(fact.engine),
            config=self._share(fact.config),
            parts=self._share_parts(fact.parts),
        )

    def _share(self, config: ModelConfig) -> ModelConfig:
        return self._configs.setdefault(self._encoder.encode(config), config)

    def _share_parts(self, parts: tuple[PartInfo, ...]) -> tuple[PartInfo, ...]:
        return tuple(self._parts.setdefault(part, part) for part in parts)


def _record(content: bytes) -> bytes:
    return _HEAD.pack(len(content), zlib.crc32(content)) + content


def _read_records(content: bytes) -> Iterator[tuple[Fact | None, int]]:
    """Yield each good record (None: the opening) and the offset behind it."""
    opening = msgspec.msgpack.Decoder(_Opening)
    facts = msgspec.msgpack.Decoder(Fact)
    offset = 0
    while offset + _HEAD.size <= len(content):
        nbytes, checksum = _HEAD.unpack_from(content, offset)
        start = offset + _HEAD.size
        body = content[start : start + nbytes]
        if nbytes > RECORD_BYTES_MAX or len(body) < nbytes or zlib.crc32(body) != checksum:
            return
        try:
            if offset == 0:
                if opening.decode(body) != _Opening():
                    return
                fact = None
            else:
                fact = facts.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return
        offset = start + nbytes
        yield fact, offset
