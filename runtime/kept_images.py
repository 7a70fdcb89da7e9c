"""Images that are there from earlier: whether one can be used as it is, and one made of another.

Called by the packer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from overcommit.runtime.errors import ImageError
from overcommit.runtime.image import (
    ImageHeader,
    is_there,
    read_header,
    read_payload,
    write_image,
)
from overcommit.runtime.image_cache import Needed, renew

log = logging.getLogger("overcommit.packer")


def reusable(path: Path) -> ImageHeader | None:
    """Return the header of an image that is there with all that it needs; None: make it again.

    All of it is needed from now on.
    """
    if not path.exists():
        return None
    try:
        header, _ = read_header(path)
    except ImageError as error:
        log.warning("%s is made again: %s", path, error.message)
        return None
    cache_dir = str(path.parent.parent)
    renew(cache_dir, [Needed(str(path), header.program_key, header.parts)])
    if not Path(header.program.get("file", "/")).exists():
        log.warning("%s is made again: its program is gone", path)
        return None
    if not all(is_there(path, part) for part in header.parts):
        log.warning("%s is made again: a part of it is gone", path)
        return None
    return header


def rewrite(
    source: Path, path: Path, on_progress: Callable[[int, int], None], *, packs: bool
) -> ImageHeader:
    """Write an image that is there once more, in its packed or in its raw form."""
    header, payload = read_payload(source)
    view = memoryview(payload).toreadonly()
    tensors = (
        (entry, view[entry.offset : entry.offset + entry.nbytes])
        for entry in header.tensors
        if entry.alias_of is None
    )
    return write_image(path, header, tensors, on_progress, packs=packs)
