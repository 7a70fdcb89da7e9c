"""Pack a model in a test, and bind its image over a mapping of the file."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from overcommit.runtime import engines
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.engines.bound_module import BoundModule
from overcommit.runtime.image import ImageHeader, read_payload
from overcommit.runtime.packer import pack
from overcommit.runtime.packer_messages import Pack, PackDone


def try_pack(folder: Path, cache: Path, *, server_allows: bool = False, **config: Any) -> PackDone:
    """Pack a folder, with these keys in its configuration."""
    job = Pack(
        job=1,
        name="subject",
        version="1",
        folder=str(folder),
        config=ModelConfig(**config),
        cache_dir=str(cache),
        allow_code=server_allows,
    )
    return pack(job, lambda done, total: None)


def packed(folder: Path, cache: Path, *, server_allows: bool = False, **config: Any) -> PackDone:
    """Pack a folder that must work."""
    done = try_pack(folder, cache, server_allows=server_allows, **config)
    assert done.ok, done.message
    return done


def refused(folder: Path, cache: Path, *, server_allows: bool = False, **config: Any) -> str:
    """Pack a folder that must fail, and leave nothing behind; the message."""
    done = try_pack(folder, cache, server_allows=server_allows, **config)
    assert not done.ok
    assert not list(cache.glob("images/*"))
    assert "subject" in done.message
    return done.message


class Opened:
    """An image over anonymous memory, whose bytes a test may change."""

    def __init__(self, done: PackDone, *, allow_code: bool = False) -> None:
        self.header: ImageHeader
        self.header, self.payload = read_payload(done.image_path)
        self.memory = mmap.mmap(-1, self.header.nbytes)
        self.memory[:] = self.payload
        self.program = engines.load_program(self.header, allow_code=allow_code)
        self.model: BoundModule = self.program.bind(self.header, memoryview(self.memory))
