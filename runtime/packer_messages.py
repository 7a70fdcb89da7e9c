"""Control messages between the supervisor and the packer: each Pack is answered by one PackDone."""

from __future__ import annotations

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.messages import Message
from overcommit.runtime.parts import PartInfo


class Pack(Message, frozen=True):
    """Packer: make the image of one model version."""

    job: int
    name: str
    version: str
    folder: str
    config: ModelConfig
    cache_dir: str
    allow_code: bool
    packs: bool = False  # write weights in their packed form, where that is smaller


class PackProgress(Message, frozen=True):
    """How far the job is, in bytes of image; total 0: nothing is written yet, but it gets on."""

    job: int
    done: int
    total: int


class PackDone(Message, frozen=True):
    """The image exists, or why it does not."""

    job: int
    ok: bool
    message: str = ""
    may_pass: bool = False  # it failed for a reason that lies outside of the model
    is_full: bool = False  # there was no room left on the disk of `cache_dir`
    image_path: str = ""
    content_key: str = ""
    program_key: str = ""
    nbytes: int = 0
    parts: tuple[PartInfo, ...] = ()  # of these bytes, what other images may share
    packed_bytes: int = 0  # what the others take on disk and in HOST; 0: they are not packed
    engine: str = ""
    config: ModelConfig = ModelConfig()


PackerMessage = Pack | PackProgress | PackDone
