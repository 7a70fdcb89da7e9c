"""What a place elsewhere says of a file, and whether what has come is that file.

S3, Google's storage, the Hugging Face hub and web servers each call size, content and digest differently.

Invariants
 1. Two descriptions of one path are equal only if the place says that their content is the same.
 2. A digest is checked only where it is one of the file's bytes: not the tag of an object that was uploaded
    in parts or encrypted with a customer's key, nor the hub's name of a pointer to a large file.

Called by `fetching`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from overcommit.runtime.config import MIB
from overcommit.server.mirror import RemoteFile

READ_BYTES: Final = 8 * MIB
_MD5: Final = re.compile(r'"?([0-9a-f]{32})"?')
_SHA1: Final = re.compile(r"[0-9a-f]{40}")
_TIMES: Final = ("mtime", "LastModified", "last_modified", "updated", "created")


def describe(info: dict[str, Any]) -> RemoteFile:
    """Turn what fsspec tells of a file (`size` among it) into size, mark and digests."""
    if "blob_id" in info:
        return _of_hub(info)
    if "md5Hash" in info or "crc32c" in info:
        return _of_google(info)
    tag = _first(info, ("ETag", "etag"))
    md5 = _MD5.fullmatch(tag)
    is_digest = "SSEKMSKeyId" not in info and "ServerSideEncryption" not in info
    return RemoteFile(
        size=int(info["size"]),
        mark=tag or _first(info, _TIMES),
        md5=md5[1] if md5 is not None and is_digest else "",
    )


def _of_hub(info: dict[str, Any]) -> RemoteFile:
    """https://huggingface.co/docs/hub/api, `tree`: git's name of the blob; SHA-256 of large files."""
    lfs = info.get("lfs")
    sha256 = lfs.get("sha256", "") if isinstance(lfs, dict) else getattr(lfs, "sha256", "") or ""
    blob = str(info["blob_id"])
    # Of a large file, git has but a pointer, and the blob's name is the pointer's.
    is_small = not lfs and not info.get("xet_hash") and _SHA1.fullmatch(blob) is not None
    return RemoteFile(
        size=int(info["size"]), mark=blob, sha256=str(sha256), git_sha1=blob if is_small else ""
    )


def _of_google(info: dict[str, Any]) -> RemoteFile:
    """https://cloud.google.com/storage/docs/json_api/v1/objects; composed objects have no MD5."""
    return RemoteFile(
        size=int(info["size"]),
        mark=_first(info, ("generation", "etag", *_TIMES)),
        md5=_hex(str(info.get("md5Hash") or "")),
        crc32c=_hex(str(info.get("crc32c") or "")),
    )


def _first(info: dict[str, Any], keys: tuple[str, ...]) -> str:
    return next((str(info[key]) for key in keys if info.get(key)), "")


def _hex(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).hex()
    except (binascii.Error, ValueError):
        return ""


def find_problem(part: Path, file: RemoteFile) -> str | None:
    """Say what is wrong with a file that has come; None if nothing is.  Raises OSError."""
    size = part.stat().st_size
    if size != file.size:
        return f"has {size} bytes, {file.size} were said"
    for name, expected in (
        *(("sha256", file.sha256), ("md5", file.md5)),
        *(("git_sha1", file.git_sha1), ("crc32c", file.crc32c)),
    ):
        found = _digest(part, name, size) if expected else None
        if found is not None and found != expected:
            return f"has the {name} {found}, {expected} was said"
    return None


def _digest(part: Path, name: str, size: int) -> str | None:
    """Return a file's digest in hexadecimal; None where the package for it is missing."""
    digest: Any
    if name == "crc32c":
        try:
            from google_crc32c import Checksum
        except ImportError:
            return None
        digest = Checksum()
    elif name == "git_sha1":
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    else:
        digest = hashlib.new(name, usedforsecurity=False)
    for piece in _pieces(part):
        digest.update(piece)
    return str(digest.digest().hex())


def _pieces(part: Path) -> Iterator[bytes]:
    with part.open("rb") as content:
        while piece := content.read(READ_BYTES):
            yield piece
