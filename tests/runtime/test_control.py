"""The control socket: whole messages, with their descriptors, or none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from overcommit.runtime.config import CONTROL_BACKLOG_MAX, CONTROL_MESSAGE_BYTES_MAX
from overcommit.runtime.control import ControlSocket, socket_pair
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.front_end_messages import AdminReply, Route, Routes
from overcommit.runtime.messages import Drain, LinkUp, Ready


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
        left.send(AdminReply(id=1, status=200, body=b"x" * CONTROL_MESSAGE_BYTES_MAX))
    assert right.try_receive() is None


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
