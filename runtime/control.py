"""The control socket: typed messages with file descriptors over AF_UNIX SEQPACKET.

SEQPACKET keeps message boundaries in the kernel, so there is no framing to get wrong.  One
datagram is one MessagePack message (`messages.py`); descriptors ride along as SCM_RIGHTS.

Invariants
 1. A message arrives whole, once, in order, with all of its descriptors, or not at all.
 2. A descriptor that was received belongs to the receiver; one that is not named by the message,
    or that belongs to a message that cannot be decoded, is closed here.
 3. The supervisor's side never blocks: what the socket does not take waits in a bounded backlog.

Used by every process: children block in `receive` or poll `fileno`; the supervisor uses
`post` and `flush`.
"""

from __future__ import annotations

import array
import collections
import os
import select
import socket
from collections.abc import Sequence
from typing import Final

import msgspec

from overcommit.runtime.config import (
    CONTROL_BACKLOG_MAX,
    CONTROL_FDS_MAX,
    CONTROL_MESSAGE_BYTES_MAX,
)
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.front_end_messages import FrontEndMessage
from overcommit.runtime.messages import Message, ProcessMessage
from overcommit.runtime.mover_messages import MoverMessage
from overcommit.runtime.packer_messages import PackerMessage
from overcommit.runtime.worker_messages import WorkerMessage

AnyMessage = ProcessMessage | WorkerMessage | FrontEndMessage | MoverMessage | PackerMessage

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)

_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(CONTROL_FDS_MAX * array.array("i").itemsize)

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
        data = self._encode(message, fds)
        while not self._try_send(data, tuple(fds)):
            select.select((), (self._socket,), ())

    def post(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Send or queue; never blocks.  False: the backlog is full, the peer counts as hung.

        Descriptors are duplicated while they wait, so the caller keeps its own.
        """
        data = self._encode(message, fds)
        if not self._backlog and self._try_send(data, tuple(fds)):
            return True
        if len(self._backlog) >= CONTROL_BACKLOG_MAX:
            return False
        self._backlog.append((data, tuple(os.dup(fd) for fd in fds)))
        return True

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

    def _encode(self, message: Message, fds: Sequence[int]) -> bytes:
        data = _ENCODER.encode(message)
        if len(data) > CONTROL_MESSAGE_BYTES_MAX or len(fds) > CONTROL_FDS_MAX:
            raise ProtocolError(
                f"{type(message).__name__} has {len(data)} bytes and {len(fds)} descriptors, the "
                f"limits are {CONTROL_MESSAGE_BYTES_MAX} and {CONTROL_FDS_MAX}"
            )
        return data

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
