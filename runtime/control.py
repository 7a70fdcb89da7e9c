"""The control socket: typed messages with file descriptors over AF_UNIX SEQPACKET.

SEQPACKET keeps message boundaries in the kernel, so there is no framing to get wrong.  One
datagram is one MessagePack message (`messages.py`); descriptors ride along as SCM_RIGHTS.  A message
longer than a datagram (where a large model lies in a fragmented DEVICE) lies in a memfd, whose
descriptor comes first, and the datagram is `Enclosed`.

Invariants
 1. A message arrives whole, once, in order, with all of its descriptors, or not at all.
 2. A descriptor that was received belongs to the receiver; one that is not named by the message,
    or that belongs to a message that cannot be decoded, is closed here.
 3. A message has at most CONTROL_ENCLOSED_BYTES_MAX, and CONTROL_FDS_MAX descriptors.  What is read from a
    memfd is no longer than that, and no other file is read from.
 4. The supervisor's side never blocks: what the socket does not take waits in a bounded backlog.

Used by every process: children block in `receive` or poll `fileno`; the supervisor uses
`post` and `flush`.
"""

from __future__ import annotations

import array
import collections
import contextlib
import fcntl
import os
import select
import socket
from collections.abc import Sequence
from typing import Final

import msgspec

from overcommit.runtime.config import (
    CONTROL_BACKLOG_MAX,
    CONTROL_ENCLOSED_BYTES_MAX,
    CONTROL_FDS_MAX,
    CONTROL_MESSAGE_BYTES_MAX,
)
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.front_end_messages import FrontEndMessage
from overcommit.runtime.messages import Enclosed, Message, ProcessMessage
from overcommit.runtime.mover_messages import MoverMessage
from overcommit.runtime.packer_messages import PackerMessage
from overcommit.runtime.worker_messages import WorkerMessage

AnyMessage = ProcessMessage | WorkerMessage | FrontEndMessage | MoverMessage | PackerMessage

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE((1 + CONTROL_FDS_MAX) * array.array("i").itemsize)

Received = tuple[AnyMessage, dict[str, int]]


def socket_pair() -> tuple[int, int]:
    """Make a connected pair of SEQPACKET descriptors, close-on-exec, for supervisor and child."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours.detach(), theirs.detach()


def encoded_bytes(message: Message) -> int:
    """Size of the message on the wire; what splits long tables compares this with the limit."""
    return len(_ENCODER.encode(message))


def echo(message: Message) -> None:
    """Encode and decode a message: whoever does so before one like it comes has the code in its cache."""
    _DECODER.decode(_ENCODER.encode(message))


def _encode(message: Message, fds: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
    """Return the datagram and its descriptors; what encloses the message is to be closed.

    Raises ProtocolError for a message over the limits, OSError where a memfd cannot be made.
    """
    data = _ENCODER.encode(message)
    if len(data) > CONTROL_ENCLOSED_BYTES_MAX or len(fds) > CONTROL_FDS_MAX:
        raise ProtocolError(
            f"{type(message).__name__} has {len(data)} bytes and {len(fds)} descriptors, the "
            f"limits are {CONTROL_ENCLOSED_BYTES_MAX} and {CONTROL_FDS_MAX}"
        )
    if len(data) <= CONTROL_MESSAGE_BYTES_MAX:
        return data, tuple(fds)
    memory = os.memfd_create("overcommit-message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(memory, data)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(memory)
        raise
    return _ENCODER.encode(Enclosed(nbytes=len(data))), (memory, *fds)


def _close_enclosed(attached: Sequence[int], fds: Sequence[int]) -> None:
    """Close what `_encode` has made."""
    if len(attached) > len(fds):
        os.close(attached[0])


def _duplicates(fds: Sequence[int]) -> tuple[int, ...]:
    """Duplicate all of them, or none.  Raises OSError when there are too many."""
    with contextlib.ExitStack() as undo:
        duplicates: list[int] = []
        for fd in fds:
            duplicates.append(os.dup(fd))
            undo.callback(os.close, duplicates[-1])
        undo.pop_all()
        return tuple(duplicates)


def _take_enclosed(nbytes: int, fds: list[int]) -> bytes:
    """Read a message from the first of these descriptors, and close it; the others are the message's.

    Raises ProtocolError unless it is a sealed memfd of that size: reading from one never waits.
    """
    if not fds or not 0 < nbytes <= CONTROL_ENCLOSED_BYTES_MAX:
        raise ProtocolError(f"a message of {nbytes} bytes with {len(fds)} descriptors is none")
    memory = fds.pop(0)
    try:
        if fcntl.fcntl(memory, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ProtocolError("a message lies where it can be changed")
        if os.fstat(memory).st_size != nbytes:
            raise ProtocolError(f"a message is not of {nbytes} bytes, as was said")
        return os.pread(memory, nbytes, 0)
    except OSError as error:
        raise ProtocolError(f"a message cannot be read: {error}") from error
    finally:
        os.close(memory)


class ControlSocket:
    """One end of a control connection.  Owns `fd`."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        # One for all messages: an allocation of this size is a mapping that comes and goes, and in a
        # process with threads each time the other cores are interrupted.
        self._buffer = memoryview(bytearray(CONTROL_MESSAGE_BYTES_MAX))
        self._backlog: collections.deque[tuple[bytes, tuple[int, ...]]] = collections.deque()

    def fileno(self) -> int:
        """Return the descriptor, for select and for the event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket and every descriptor that still waits to be sent."""
        for _, fds in self._backlog:
            for fd in fds:
                os.close(fd)
        self._backlog.clear()
        self._socket.close()

    # --- sending --------------------------------------------------------------------------------
    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send, waiting for room.  Children only: their peer, the supervisor, always reads.

        Raises ProtocolError for a message over the limit, OSError when the peer is gone.
        """
        data, attached = _encode(message, fds)
        try:
            while not self._try_send(data, attached):
                select.select((), (self._socket,), ())
        finally:
            _close_enclosed(attached, fds)

    def post(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Send or queue; never blocks.  False: the backlog is full, the peer counts as hung.

        Descriptors are duplicated while they wait, so the caller keeps its own.
        """
        data, attached = _encode(message, fds)
        try:
            if not self._backlog and self._try_send(data, attached):
                return True
            if len(self._backlog) >= CONTROL_BACKLOG_MAX:
                return False
            self._backlog.append((data, _duplicates(attached)))
            return True
        finally:
            _close_enclosed(attached, fds)

    def flush(self) -> bool:
        """Send what waits; True when nothing is left."""
        while self._backlog:
            data, fds = self._backlog[0]
            if not self._try_send(data, fds):
                return False
            self._backlog.popleft()
            for fd in fds:
                os.close(fd)
        return True

    @property
    def has_backlog(self) -> bool:
        """Whether messages wait for room."""
        return bool(self._backlog)

    def _try_send(self, data: bytes, fds: tuple[int, ...]) -> bool:
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.send(data)
        except BlockingIOError:
            return False
        return True

    # --- receiving ------------------------------------------------------------------------------
    def try_receive(self) -> Received | None:
        """Take one message; None when nothing is there.

        Raises EOFError when the peer is gone, ProtocolError when it sent nonsense.
        """
        try:
            nbytes, ancillary, flags, _ = self._socket.recvmsg_into(
                (self._buffer,), _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise EOFError("the control peer is gone") from error
        fds: list[int] = []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                fds.extend(received)
        if not nbytes and not fds:
            raise EOFError("the control peer is gone")
        return self._decode(self._buffer[:nbytes], fds, flags)

    def receive(self, timeout_s: float | None = None) -> Received | None:
        """Wait for one message; None when the time is over.  Raises as `try_receive`."""
        while True:
            received = self.try_receive()
            if received is not None:
                return received
            if not select.select((self._socket,), (), (), timeout_s)[0]:
                return None

    @staticmethod
    def _decode(data: memoryview, fds: list[int], flags: int) -> Received:
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("a control message was cut off")
            message = _DECODER.decode(data)
            if isinstance(message, Enclosed):
                message = _DECODER.decode(_take_enclosed(message.nbytes, fds))
            names: tuple[str, ...] = getattr(message, "fds", ())
            if len(names) != len(fds):
                raise ProtocolError(
                    f"{type(message).__name__} names {len(names)} descriptors, {len(fds)} came"
                )
        except (ProtocolError, msgspec.DecodeError, UnicodeDecodeError) as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, ProtocolError):
                raise
            raise ProtocolError(f"a control message cannot be decoded: {error}") from error
        return message, dict(zip(names, fds, strict=True))
