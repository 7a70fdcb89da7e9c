"""Tensors in a client's shared memory: which pieces there are, and copies from and to them.

A client on the same machine registers a file of `/dev/shm` as a region and names it in place of a
tensor's bytes.  The supervisor keeps the list (`runtime/client_books.py`); each front end opens a region
when it is used first.  Bytes are copied with pread and pwrite and the memory is never mapped: a client may
shrink its file at any time, which would end a process that had mapped it (SIGBUS).

A request names a region once, when it is checked, and holds what the name meant then until it is answered or
abandoned.  So an answer cannot go into memory that was registered under the name meanwhile.

A region may be leased (`leases.py`): its owner holds a lock on its file, and when the lock is gone so is the
region.  `overcommit.Client` registers such ones.

Invariants
 1. Nothing outside of /dev/shm is opened, no symlink is followed, and only a regular file is taken.
 2. No byte outside of the registered region is read or written, and no file is made longer.
 3. Without `--client-shared-memory` nothing is registered and nothing is opened.
 4. Before a name is looked up, what the supervisor has said is read: another front end may have been told
    of it, or of its end, a moment ago.
 5. A leased region is forgotten only when nobody holds its lock.
 6. A region's file is closed when its name is gone and the last request that holds it has ended.

Called by both protocols: `register`, `unregister` and `listed` by their methods, `hold` by what checks
requests, `Held` by that and by the answers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from overcommit.runtime.config import BLOCK_BYTES_MAX, NAME_CHARS_MAX
from overcommit.runtime.errors import BadRequest, Forbidden, NotFound, PayloadTooLarge
from overcommit.runtime.front_end_messages import Region, RegionsChanged
from overcommit.server import leases
from overcommit.server.codec import Parameters, whole
from overcommit.server.questions import ask_value

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

_KEY_BYTES_MAX: Final = 255
_OFFSET_MAX: Final = (1 << 63) - 1
_STRING: Final = msgspec.json.Decoder(str)
_OFF: Final = "clients may not use shared memory with this server; --client-shared-memory allows it"


@dataclass(slots=True, frozen=True)
class Window:
    """Part of a region, as a request names it."""

    region: str
    offset: int
    nbytes: int


def window_of(parameters: Parameters | None) -> Window | None:
    """Read the parameters of a tensor; None when its bytes are not in shared memory.

    Raises BadRequest.
    """
    if not parameters or (raw := parameters.get("shared_memory_region")) is None:
        return None
    try:
        name = _STRING.decode(raw)
    except msgspec.DecodeError as error:
        raise BadRequest("parameter 'shared_memory_region' must be a string") from error
    nbytes = whole(parameters, "shared_memory_byte_size")
    if nbytes is None:
        raise BadRequest(
            f"a tensor in the shared memory region '{name}' needs 'shared_memory_byte_size'"
        )
    return Window(name, whole(parameters, "shared_memory_offset") or 0, nbytes)


class _File:
    """An open file, closed with the last reference to it: that of its region's name, or a request's.

    Counting these by hand would need a line in every way in which a request can end.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(slots=True, frozen=True, eq=False)
class Held:
    """A window of a region, for as long as somebody refers to it."""

    window: Window
    at: int  # where in the file it begins
    _file: _File

    def read(self) -> bytes:
        """Copy a tensor out.  Raises BadRequest."""
        data = os.pread(self._file.number, self.window.nbytes, self.at)
        if len(data) != self.window.nbytes:
            raise self._shorter()
        return data

    def read_into(self, space: list[memoryview]) -> None:
        """Copy tensors that lie one behind the other to where they go.  Raises BadRequest."""
        if os.preadv(self._file.number, space, self.at) != self.window.nbytes:
            raise self._shorter()

    def write(self, output: str, data: bytes | memoryview) -> None:
        """Copy an output in.  Raises BadRequest."""
        if len(data) > self.window.nbytes:
            raise BadRequest(
                f"shared memory size specified with the request for output '{output}' "
                f"({self.window.nbytes} bytes) should be at least {len(data)} bytes to hold the results"
            )
        self.write_all([data], len(data))

    def write_all(self, data: Sequence[bytes | memoryview], nbytes: int) -> None:
        """Copy pieces of together `nbytes` in, one behind the other.  Raises BadRequest."""
        assert nbytes <= self.window.nbytes
        if os.fstat(self._file.number).st_size < self.at + nbytes:
            raise self._shorter()
        if os.pwritev(self._file.number, data, self.at) != nbytes:
            raise BadRequest(f"shared memory region '{self.window.region}' takes no more bytes")

    def _shorter(self) -> BadRequest:
        return BadRequest(
            f"shared memory region '{self.window.region}' has become shorter than it was registered"
        )


class Regions:
    """The regions that this front end has heard of, and the files that it has opened."""

    def __init__(self, *, is_allowed: bool = False, folder: str = leases.FOLDER) -> None:
        self.is_allowed = is_allowed
        self.look: Callable[[], None] = lambda: None  # read what the supervisor has said
        self._folder = folder
        self._regions: dict[str, Region] = {}
        self._files: dict[str, _File] = {}

    def apply(self, message: RegionsChanged) -> None:
        """Take over what the supervisor says."""
        for region in message.upsert:
            self._files.pop(region.name, None)
            self._regions[region.name] = region
        for name in message.removed:
            self._files.pop(name, None)
            self._regions.pop(name, None)

    def listed(self, name: str = "") -> list[Region]:
        """Return all regions, or the one of this name.  Raises NotFound."""
        self.look()
        if not name:
            return list(self._regions.values())
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        return [region]

    def check(self, region: Region) -> None:
        """See that a region is one before it is registered.  Raises BadRequest, Forbidden."""
        if not self.is_allowed:
            raise Forbidden(_OFF)
        if not 0 < len(region.name) <= NAME_CHARS_MAX:
            raise BadRequest(
                f"the name of a shared memory region has 1 to {NAME_CHARS_MAX} characters"
            )
        file = self._open(region.key)
        size = os.fstat(file.number).st_size
        offset, nbytes = region.offset, region.byte_size
        if not (0 <= offset <= _OFFSET_MAX and 0 < nbytes <= _OFFSET_MAX):
            raise BadRequest(
                f"Invalid shared memory region: '{region.key}': offset {offset}, byte_size {nbytes}"
            )
        if offset + nbytes > size:
            raise BadRequest(
                f"Invalid shared memory region: '{region.key}' has {size} bytes, offset {offset} "
                f"and byte_size {nbytes} need more"
            )

    def prove(self, region: Region) -> str:
        """See that a region's owner holds its lock; return what proves that we see the same file.

        Raises BadRequest.
        """
        file = self._open(region.key)
        if region.byte_size < leases.NONCE_BYTES or not leases.is_held(file.number):
            raise BadRequest(
                f"shared memory region '{region.name}' cannot be leased: its owner must hold a "
                f"lock (F_OFD_SETLK) on '{region.key}' of at least {leases.NONCE_BYTES} bytes"
            )
        return leases.proof_of(os.pread(file.number, leases.NONCE_BYTES, region.offset))

    def abandoned(self) -> list[str]:
        """Names of leased regions whose owner is gone; their files lose their names here."""
        found = []
        for region in [each for each in self._regions.values() if each.leased]:
            try:
                file = self._files.get(region.name) or self._open(region.key)
            except BadRequest:  # the owner removed it
                found.append(region.name)
                continue
            if not leases.is_held(file.number):
                leases.remove(file.number, region.key.removeprefix("/"), self._folder)
                found.append(region.name)
        return found

    def hold(self, window: Window) -> Held:
        """Return what this window means now.  Raises NotFound, BadRequest, Forbidden, PayloadTooLarge."""
        if not self.is_allowed:
            raise Forbidden(_OFF)
        self.look()
        region = self._regions.get(window.region)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{window.region}'")
        if window.nbytes > BLOCK_BYTES_MAX:
            raise PayloadTooLarge(
                f"a tensor of {window.nbytes} bytes in shared memory region '{window.region}': the "
                f"limit is {BLOCK_BYTES_MAX}"
            )
        if window.offset + window.nbytes > region.byte_size:
            raise BadRequest(
                f"Invalid offset + byte size for shared memory region: '{window.region}' of "
                f"{region.byte_size} bytes"
            )
        file = self._files.get(region.name)
        if file is None:
            file = self._files[region.name] = self._open(region.key)
        return Held(window, region.offset + window.offset, file)

    def _open(self, key: str) -> _File:
        name = key.removeprefix("/")
        if (
            not 0 < len(os.fsencode(name)) <= _KEY_BYTES_MAX
            or name in (".", "..")
            or "/" in name
            or "\0" in name
        ):
            raise BadRequest(
                f"Unable to open shared memory region: '{key}': a key names a file in {leases.FOLDER}, "
                f"without any further '/'"
            )
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = _File(os.open(f"{self._folder}/{name}", flags))
        except OSError as error:
            raise BadRequest(
                f"Unable to open shared memory region: '{key}': {error.strerror}"
            ) from error
        if not stat.S_ISREG(os.fstat(file.number).st_mode):
            raise BadRequest(f"Unable to open shared memory region: '{key}' is no regular file")
        return file


async def register(front: FrontEnd, region: Region) -> str:
    """Register a region with all front ends; return the proof of a leased one, "" of another.

    Raises BadRequest, Forbidden.
    """
    front.regions.check(region)
    proof = front.regions.prove(region) if region.leased else ""
    await ask_value(
        front,
        "region_add",
        name=region.name,
        key=region.key,
        offset=region.offset,
        byte_size=region.byte_size,
        leased=region.leased,
    )
    return proof


async def unregister(front: FrontEnd, name: str) -> None:
    """Forget a region; all of them, where the name is empty.  One that is not there is no error."""
    await ask_value(front, "region_remove", name=name)
