"""What the `model.toml` of each version said when it was read last, kept across starts of the server.

Reading and parsing 20,000 of these files takes longer than everything else that a start does.  So what
was parsed is kept, by folder and fingerprint (which has the file's size and time in it), and in a file of
the cache folder.  Equal configurations are one object, whatever folders they come from.

Invariants
 1. What is found for a folder and fingerprint was parsed from files of these very sizes and times, by
    this release's rules.
 2. A torn, foreign or older file is no file: everything is parsed again.
 3. Broken files are not kept: their reason is found again at each look.

Called by the scanner.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from overcommit import __version__
from overcommit.runtime import model_files
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.model_keys import rules
from overcommit.runtime.model_toml import significant

log = logging.getLogger("overcommit.scanner")

FILE_NAME: Final = "repository.msgpack"
FORMAT: Final = 2
PARSED_MAX: Final = 256
_CRC_BYTES: Final = 4


class _File(msgspec.Struct, frozen=True, array_like=True):
    format: int
    made_by: str
    configs: list[ModelConfig]
    versions: dict[str, tuple[str, int]]  # folder -> fingerprint, number of its config


def _made_by() -> str:
    digest = hashlib.blake2b(rules().encode(), digest_size=8).hexdigest()
    return f"overcommit {__version__} {digest}"


class KnownConfigs:
    """Configurations by folder and fingerprint; `path` None: not kept across starts."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._encoder = msgspec.msgpack.Encoder()
        # Of thousands of folders most have files that some program wrote: equal but for comments.
        self._parsed: dict[tuple[tuple[str, bytes], ...], tuple[ModelConfig, list[str]]] = {}
        self._shared: dict[bytes, ModelConfig] = {}
        # Only what a start needs: afterwards each source has its own config.
        self._versions: dict[str, tuple[str, ModelConfig]] = {}
        if path is not None:
            self._load(path)

    def __len__(self) -> int:
        return len(self._versions)

    def find(self, folder: str, fingerprint: str) -> ModelConfig | None:
        """Return what the files of a folder in this state say; None: not known."""
        known = self._versions.get(folder)
        return known[1] if known is not None and known[0] == fingerprint else None

    def share(self, config: ModelConfig) -> ModelConfig:
        """Return the one object that is equal to `config`."""
        return self._shared.setdefault(self._encoder.encode(config), config)

    def parse(self, files: Sequence[tuple[str, bytes]]) -> ModelConfig:
        """Return what these files say, as `model_files.read`.  Raises RepositoryError."""
        return self.read(files)[0]

    def read(self, files: Sequence[tuple[str, bytes]]) -> tuple[ModelConfig, list[str]]:
        """Return what these files say, and what of it is ignored.  Raises RepositoryError."""
        key = tuple((name, significant(content)) for name, content in files)
        known = self._parsed.get(key)
        if known is None:
            config, notes = model_files.read(files)
            known = (self.share(config), notes)
            if len(self._parsed) >= PARSED_MAX:
                self._parsed.clear()
            self._parsed[key] = known
        return known

    def forget(self) -> None:
        """The first scan is over."""
        self._versions.clear()

    # --- the file -------------------------------------------------------------------------------
    def save(self, versions: Iterable[tuple[str, str, ModelConfig]]) -> None:
        """Write (folder, fingerprint, config) of every version that is served.

        A file that cannot be written costs only the next start's time, so it is logged and no more.
        """
        if self._path is None:
            return
        numbers: dict[int, int] = {}
        configs: list[ModelConfig] = []
        table: dict[str, tuple[str, int]] = {}
        for folder, fingerprint, config in versions:
            config = self.share(config)
            if id(config) not in numbers:
                numbers[id(config)] = len(configs)
                configs.append(config)
            table[folder] = (fingerprint, numbers[id(config)])
        body = self._encoder.encode(_File(FORMAT, _made_by(), configs, table))
        temporary = self._path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Not synced: after a power cut it is at worst torn, and its checksum says so.
            temporary.write_bytes(zlib.crc32(body).to_bytes(_CRC_BYTES, "little") + body)
            temporary.replace(self._path)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error)
            return
        crc, body = content[:_CRC_BYTES], content[_CRC_BYTES:]
        if zlib.crc32(body).to_bytes(_CRC_BYTES, "little") != crc:
            log.warning("%s is torn: every model.toml is read again", path)
            return
        try:
            file = msgspec.msgpack.decode(body, type=_File)
            if (file.format, file.made_by) != (FORMAT, _made_by()):
                return
            configs = [self.share(config) for config in file.configs]
            self._versions = {
                folder: (fingerprint, configs[number])
                for folder, (fingerprint, number) in file.versions.items()
            }
        except (msgspec.MsgspecError, UnicodeDecodeError, IndexError) as error:
            log.warning("%s is of no use: %s", path, error)
