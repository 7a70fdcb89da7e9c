"""Files of shared memory that belong to whoever holds a lock on them: made, proved, looked at.

A client that was killed cannot say that it has no use for its regions any more; its locks say it, since
the kernel takes them back with the last descriptor.  The client locks its file before the file has a
name, and the server drops a leased region once nobody holds the lock.  The locks are those of open file
descriptions (`F_OFD_SETLK`, Linux): they mean the same in every container that sees the file, whatever its
process numbers, and asking (`F_OFD_GETLK`) takes nothing.

That client and server see the same memory is proved, not guessed from addresses: the client writes a nonce
that it tells nobody, and the server says its digest.

Invariants
 1. A file with KEY_PREFIX has a lock from the moment on in which it has its name.
 2. Asking whether a lock is held changes nothing.

Called by the clients and by the front ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import struct
from typing import Final

FOLDER: Final = "/dev/shm"
KEY_PREFIX: Final = "overcommit-client-"
NONCE_BYTES: Final = 32  # at the start of a leased region, when it is registered
LEFTOVERS_MAX: Final = 1024  # that one look removes
MODE: Final = 0o600  # what others of the machine may not read

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
_WHOLE_FILE: Final = (os.SEEK_SET, 0, 0, 0)


def create(nbytes: int, folder: str = FOLDER) -> tuple[int, str]:
    """Make a file of this size, locked, and return its descriptor and its name.

    Its pages are there before this returns: a full /dev/shm is an error here and no signal later.
    Raises OSError, also where the system has no such files or locks.
    """
    if not hasattr(fcntl, "F_OFD_SETLK") or not hasattr(os, "O_TMPFILE"):
        raise OSError("this system has no locks of open file descriptions")
    file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, MODE)
    try:
        os.posix_fallocate(file, 0, nbytes)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, *_WHOLE_FILE))
        key = KEY_PREFIX + secrets.token_hex(16)
        # With a descriptor, though the path is absolute: else Python calls link(), which does not follow.
        source = f"/proc/self/fd/{file}"
        os.link(source, f"{folder}/{key}", src_dir_fd=file, follow_symlinks=True)
    except BaseException:
        os.close(file)
        raise
    return file, key


def is_held(file: int) -> bool:
    """Whether somebody else has locked this file.  Raises OSError."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, *_WHOLE_FILE)
    found = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
    return int(found[0]) != fcntl.F_UNLCK


def proof_of(nonce: bytes | memoryview) -> str:
    """What the server says of the first bytes of a leased region, and the client expects."""
    return hashlib.sha256(b"overcommit leased region\0" + nonce).hexdigest()


def remove(file: int, key: str, folder: str = FOLDER) -> None:
    """Take the name away from this file, if the name still means it and is one of ours."""
    if not key.startswith(KEY_PREFIX) or "/" in key:
        return
    path = f"{folder}/{key}"
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(file), os.lstat(path)):
            os.unlink(path)


def remove_leftovers(folder: str = FOLDER) -> int:
    """Remove the files of clients that are gone; return how many.  Those of other users stay."""
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if removed >= LEFTOVERS_MAX:
                break
            if not entry.name.startswith(KEY_PREFIX):
                continue
            with contextlib.suppress(OSError):
                flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = os.open(entry.path, flags)
                try:
                    if os.fstat(file).st_uid == os.geteuid() and not is_held(file):
                        remove(file, entry.name, folder)
                        removed += 1
                finally:
                    os.close(file)
    return removed
