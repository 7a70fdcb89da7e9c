"""The control socket: whole messages, with their descriptors, or none."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from overcommit.runtime.config import (
    CONTROL_BACKLOG_MAX,
    CONTROL_ENCLOSED_BYTES_MAX,
    CONTROL_MESSAGE_BYTES_MAX,
)
from overcommit.runtime.control import _SEALS, ControlSocket, encoded_bytes, socket_pair
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.front_end_messages import AdminReply, Route, Routes
from overcommit.runtime.messages import Chunks, Drain, Enclosed, LinkUp, Ready
from overcommit.runtime.worker_messages import Placed


@pytest.fixture
def pair() -> Iterator[tuple[ControlSocket, ControlSocket]]:
    ours, theirs = socket_pair()
    left, right = ControlSocket(ours), ControlSocket(theirs)
    yield left, right
    left.close()
    right.close()


def link_up(*names: str) -> LinkUp:
    return LinkUp(seat=1, epoch=2, slot_count=4, completion_offset=4096, fds=names)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_arrive_whole_and_in_order(pair: tuple[ControlSocket, ControlSocket]) -> None:
    left, right = pair
    sent = [Ready(pid=1), Drain(timeout_s=2.5), AdminReply(id=3, status=200, body=b"x" * 60_000)]
    for message in sent:
        left.send(message)
    assert [right.receive(5.0) for _ in sent] == [(message, {}) for message in sent]
    assert right.try_receive() is None


def test_descriptors_arrive_under_their_names(pair: tuple[ControlSocket, ControlSocket]) -> None:
    left, right = pair
    read, write = os.pipe()
    left.send(link_up("link", "bell"), (read, write))
    received = right.receive(5.0)
    assert received is not None
    fds = received[1]
    os.write(fds["bell"], b"hello")
    assert os.read(fds["link"], 5) == b"hello"
    for fd in (read, write, *fds.values()):
        os.close(fd)


def test_descriptors_that_are_not_named_are_closed_and_refused(
    pair: tuple[ControlSocket, ControlSocket],
) -> None:
    left, right = pair
    before = open_fds()
    left.send(link_up("one"), (0, 1))
    with pytest.raises(ProtocolError, match="names 1 descriptors, 2 came"):
        right.try_receive()
    assert open_fds() == before


def test_nonsense_is_refused_and_the_socket_goes_on(
    pair: tuple[ControlSocket, ControlSocket],
) -> None:
    left, right = pair
    raw = socket.socket(fileno=os.dup(left.fileno()))
    raw.send(b"\xc1nonsense")
    raw.close()
    left.send(Ready(pid=7))
    with pytest.raises(ProtocolError, match="cannot be decoded"):
        right.try_receive()
    assert right.try_receive() == (Ready(pid=7), {})


def test_a_closed_peer_is_an_eof(pair: tuple[ControlSocket, ControlSocket]) -> None:
    left, right = pair
    left.send(Ready(pid=7))
    left.close()
    assert right.try_receive() == (Ready(pid=7), {})
    with pytest.raises(EOFError):
        right.try_receive()


def test_a_message_over_the_limit_is_not_sent(pair: tuple[ControlSocket, ControlSocket]) -> None:
    left, right = pair
    with pytest.raises(ProtocolError, match="the limits are"):
        left.send(AdminReply(id=1, status=200, body=b"x" * CONTROL_ENCLOSED_BYTES_MAX))
    assert right.try_receive() is None


def test_a_message_longer_than_a_datagram_arrives_whole_with_its_descriptors_and_in_order(
    pair: tuple[ControlSocket, ControlSocket],
) -> None:
    left, right = pair
    before = open_fds()
    extents = tuple((offset << 21, 2 << 20) for offset in range(0, 200_000, 2))
    placed = Placed(slot=1, generation=2, extents=extents, shared=(0, 99_999))
    assert encoded_bytes(placed) > 10 * CONTROL_MESSAGE_BYTES_MAX
    long = Chunks(first=0, fds=tuple("x" * 200_000 + str(number) for number in range(2)))
    for message, fds in ((placed, ()), (long, (0, 1)), (Ready(pid=3), ())):
        left.send(message, fds)
    assert right.try_receive() == (placed, {})
    received = right.try_receive()
    assert received is not None
    assert received[0] == long
    assert list(received[1]) == list(long.fds)
    for fd in received[1].values():
        os.close(fd)
    assert right.try_receive() == (Ready(pid=3), {})
    assert open_fds() == before


def test_long_messages_wait_in_the_backlog_like_any_other(
    pair: tuple[ControlSocket, ControlSocket],
) -> None:
    left, right = pair
    before = open_fds()
    count = 600
    for number in range(count):
        assert left.post(
            AdminReply(id=number, status=200, body=bytes([number % 256]) * 140_000)
            if number % 50 == 0
            else Ready(pid=number)
        )
    assert left.has_backlog
    for number in range(count):
        left.flush()
        received = right.try_receive()
        assert received is not None
        message = received[0]
        if isinstance(message, AdminReply):
            assert message.id == number
            assert message.body == bytes([number % 256]) * 140_000
        else:
            assert message == Ready(pid=number)
    assert left.flush()
    assert open_fds() == before


@pytest.mark.parametrize("kind", ["none", "pipe", "file", "unsealed", "short", "endless"])
def test_what_is_not_a_sealed_memfd_of_that_size_is_not_read(
    kind: str, pair: tuple[ControlSocket, ControlSocket], tmp_path: Path
) -> None:
    left, right = pair
    before = open_fds()
    nbytes, fds = 200_000, []
    if kind == "pipe":
        fds = list(os.pipe())[:1]
    elif kind == "file":
        (tmp_path / "file").write_bytes(bytes(nbytes))
        fds = [os.open(tmp_path / "file", os.O_RDONLY)]
    elif kind != "none":
        fds = [os.memfd_create("message", os.MFD_ALLOW_SEALING)]
        os.write(fds[0], bytes(nbytes - (kind == "short")))
        if kind != "unsealed":
            fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, _SEALS)
    if kind == "endless":
        nbytes = CONTROL_ENCLOSED_BYTES_MAX + 1
    left.send(Enclosed(nbytes=nbytes), fds)
    for fd in fds:
        os.close(fd)
    left.send(Ready(pid=7))
    with pytest.raises(ProtocolError):
        right.try_receive()
    assert right.try_receive() == (Ready(pid=7), {})
    if kind != "pipe":
        assert open_fds() == before


def test_post_never_blocks_and_keeps_order_and_descriptors(
    pair: tuple[ControlSocket, ControlSocket],
) -> None:
    left, right = pair
    read, write = os.pipe()
    count = 1500
    for number in range(count):
        assert left.post(
            link_up("pipe") if number % 500 == 0 else Ready(pid=number),
            ((write,) if number % 500 == 0 else ()),
        )
    assert left.has_backlog
    os.close(write)
    got = 0
    while got < count:
        left.flush()
        while (received := right.try_receive()) is not None:
            message, fds = received
            if got % 500 == 0:
                os.write(fds["pipe"], b"!")
                os.close(fds["pipe"])
            else:
                assert message == Ready(pid=got)
            got += 1
    assert not left.has_backlog
    assert os.read(read, 10) == b"!!!"
    assert os.read(read, 10) == b""  # every copy of the writing end is closed
    os.close(read)


def test_a_peer_that_does_not_read_is_reported(pair: tuple[ControlSocket, ControlSocket]) -> None:
    left, _ = pair
    posted = 0
    while left.post(Ready(pid=posted)):
        posted += 1
        assert posted < 10 * CONTROL_BACKLOG_MAX
    assert posted > CONTROL_BACKLOG_MAX


def test_an_optional_route_field_survives(pair: tuple[ControlSocket, ControlSocket]) -> None:
    left, right = pair
    message = Routes(upsert=(Route(slot=1, name="m", version="1", state="ready"),), removed=(2,))
    left.send(message)
    assert right.receive(5.0) == (message, {})
