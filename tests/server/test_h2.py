"""HTTP/2 rules: windows, frames in pieces, what costs a client its connection."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from front_end_rig import Peer, Rig
from h2_rig import H2Client, frame, framed, in_loop, request, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overcommit.server import h2
from overcommit.server.h2 import Code
from overcommit.server.limits import (
    BODIES_BYTES_MAX,
    BODY_TIMEOUT_S,
    H2_BLOCK_BYTES_MAX,
    H2_HEADERS_BYTES_MAX,
    H2_IDLE_FRAMES_MAX,
    H2_IDLE_S,
    H2_PING_TIMEOUT_S,
    H2_STREAMS_MAX,
    H2_WINDOW_BYTES,
    HEAD_TIMEOUT_S,
)

LONG = [[float(number) for number in range(50_000)]]  # 200 kB of answer


def run(test: Callable[[H2Client, Peer], Any], **settings_: Any) -> None:
    async def go() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = H2Client(rig, **settings_)
        outcome = test(client, peer)
        if outcome is not None:
            await outcome
        if not client.transport.is_closed:
            client.lose()
        peer.answer_all()
        assert rig.is_empty()

    in_loop(go)


def goaway(client: H2Client) -> Code:
    (last,) = [each for each in client.read() if each.kind == h2.GOAWAY]
    return Code(struct.unpack(">II", last.payload[:8])[1])


def test_a_greeting_is_answered() -> None:
    def test(client: H2Client, peer: Peer) -> None:
        kinds = [(each.kind, each.flags) for each in client.frames]
        assert kinds == [(h2.SETTINGS, 0), (h2.WINDOW_UPDATE, 0), (h2.SETTINGS, h2.ACK)]
        client.send(h2.frame(h2.PING, 0, 0, b"12345678"))
        (pong,) = client.read()
        assert (pong.kind, pong.flags, pong.payload) == (h2.PING, h2.ACK, b"12345678")

    run(test)


@pytest.mark.parametrize("size", [1, 2, 9, 100, 5000])
def test_frames_may_come_in_any_pieces(size: int) -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        sent: list[bytes] = []
        client.send = sent.append  # type: ignore[method-assign]
        numbers = [client.call(request([1.0 * n] * 300)) for n in range(4)]
        data = b"".join(sent)
        for at in range(0, len(data), size):
            client.connection.data_received(data[at : at + size])
        peer.answer_all()
        await client.settle()
        for n, number in enumerate(numbers):
            assert values(client.answer(number)[1][0]) == [2.0 * n] * 300

    run(test)


def test_headers_may_be_continued_and_padded() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        block = client.headers()
        message = framed(request([1.0]))
        padded = bytes((3,)) + block[:10] + b"\0\0\0"
        client.send(h2.frame(h2.HEADERS, h2.PADDED, 1, padded))
        client.send(h2.frame(h2.CONTINUATION, 0, 1, block[10:20]))
        client.send(h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, block[20:]))
        data = bytes((7,)) + message + b"\0" * 7
        client.send(h2.frame(h2.DATA, h2.PADDED | h2.END_STREAM, 1, data))
        peer.answer_all()
        await client.settle()
        assert values(client.answer(1)[1][0]) == [2.0]

    run(test)


def block_frames(block: bytes, step: int) -> bytes:
    """Stream 3's header block in frames of so many bytes."""
    pieces = [block[at : at + step] for at in range(0, len(block), step)]
    kinds = [h2.HEADERS] + [h2.CONTINUATION] * (len(pieces) - 1)
    flags = [0] * (len(pieces) - 1) + [h2.END_HEADERS]
    return b"".join(map(frame, kinds, flags, [3] * len(pieces), pieces))


@pytest.mark.parametrize(
    ("nbytes", "step"), [(17_000, 1 << 20), (300_000, 1 << 20), (300_000, 16_384)]
)
def test_headers_that_are_too_long_cost_their_own_call_alone(nbytes: int, step: int) -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        before = client.call(request([1.0]))
        block = client.headers(authorization="v" * nbytes) + b"\x40\x01a\x01b"
        data = block_frames(block, step)
        for at in range(0, len(data), 10_000):
            client.send(data[at : at + 10_000])
        client.data(3, framed(request([2.0])), end=True)
        # The table is as the client thinks.
        client.send(h2.frame(h2.HEADERS, h2.END_HEADERS, 5, client.headers() + b"\xbe"))
        client.data(5, framed(request([3.0])), end=True)
        peer.answer_all()
        await client.settle()
        assert client.status(3) == 8
        message = client.answer(3)[2]["grpc-message"]
        assert f"over {H2_HEADERS_BYTES_MAX} bytes" in message
        assert values(client.answer(before)[1][0]) == [2.0]
        assert values(client.answer(5)[1][0]) == [6.0]
        assert not client.transport.is_closed
        assert not client.rig.bodies_bytes

    run(test)


def test_long_headers_count_against_the_budget_of_bodies() -> None:
    def test(client: H2Client, peer: Peer) -> None:
        data = block_frames(client.headers(authorization="v" * 100_000), 1 << 20)
        client.send(data[:50_000])
        assert client.rig.bodies_bytes == len(data)
        client.rig.bodies_bytes = BODIES_BYTES_MAX
        client.send(data[50_000:-1])
        other = H2Client(client.rig)
        other.send(data[:50_000])
        assert goaway(other) is Code.ENHANCE_YOUR_CALM
        other.lose()
        assert client.rig.bodies_bytes == BODIES_BYTES_MAX
        client.rig.bodies_bytes = len(data)
        client.lose()
        assert not client.rig.bodies_bytes

    run(test)


def test_headers_that_do_not_come_to_an_end_are_not_waited_for() -> None:
    def test(client: H2Client, peer: Peer) -> None:
        start_s = client.rig.clock_s
        data = block_frames(client.headers(authorization="v" * 100_000), 1 << 20)
        client.send(data[:50_000])
        client.rig.clock_s = start_s + HEAD_TIMEOUT_S
        client.send(data[50_000:60_000])
        client.connection.check_times(start_s + HEAD_TIMEOUT_S)
        assert not client.transport.is_closed
        client.connection.check_times(start_s + HEAD_TIMEOUT_S + 1)
        assert client.transport.is_closed
        client.lose()

    run(test)


def test_trailers_of_a_client_end_its_call() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.open()
        client.data(number, framed(request([3.0])))
        end = h2.END_HEADERS | h2.END_STREAM
        client.send(h2.frame(h2.HEADERS, end, number, b"\x00\x01a\x01b"))
        peer.answer_all()
        await client.settle()
        assert values(client.answer(number)[1][0]) == [6.0]

    run(test)


def test_an_answer_waits_for_the_streams_window() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.call(request(*LONG))
        peer.answer_all()
        first = await client.settle()
        got = sum(len(each.payload) for each in first if each.kind == h2.DATA)
        assert got == 1000
        assert max(len(each.payload) for each in first if each.kind == h2.DATA) <= h2.FRAME_BYTES
        client.send(h2.window_update(number, 100))
        (piece,) = await client.settle()
        assert len(piece.payload) == 100
        client.send(h2.window_update(number, 1 << 20))
        await client.settle()
        # The connection's own window is the one that holds now.
        sent = sum(len(each.payload) for each in client.frames if each.kind == h2.DATA)
        assert sent == h2.WINDOW_BYTES
        client.send(h2.window_update(0, 1 << 20))
        await client.settle()
        assert values(client.answer(number)[1][0]) == [2 * each for each in LONG[0]]
        assert client.status(number) == 0

    run(test, settings={h2.INITIAL_WINDOW_SIZE: 1000})


def test_settings_change_the_windows_of_open_streams() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.call(request([1.0]))
        peer.answer_all()
        assert not [each for each in await client.settle() if each.kind == h2.DATA]
        client.send(h2.settings({h2.INITIAL_WINDOW_SIZE: 500}))
        await client.settle()
        assert values(client.answer(number)[1][0]) == [2.0]

    run(test, settings={h2.INITIAL_WINDOW_SIZE: 0})


def test_nothing_is_sent_while_the_transport_is_full() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        client.send(h2.window_update(0, 1 << 24))
        client.connection.pause_writing()
        number = client.call(request(*LONG))
        peer.answer_all()
        assert not [each for each in await client.settle() if each.kind == h2.DATA]
        assert client.transport.is_paused
        client.connection.resume_writing()
        await client.settle()
        assert values(client.answer(number)[1][0]) == [2 * each for each in LONG[0]]

    run(test, settings={h2.INITIAL_WINDOW_SIZE: 1 << 24})


def test_a_long_message_gets_more_window_as_it_comes() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.open()
        step = h2.FRAME_BYTES * 16
        data = framed(request([1.0] * (H2_WINDOW_BYTES // 3)))  # 4/3 of the window
        for at in range(0, len(data), step):
            client.data(number, data[at : at + step], end=at + step >= len(data))
        updates = [each for each in await client.settle() if each.kind == h2.WINDOW_UPDATE]
        assert updates
        assert all(each.stream == number for each in updates)
        assert client.status(number) == 14  # the rig's payload memory is smaller than that
        assert not client.rig.bodies_bytes

    run(test)


def test_a_reset_call_is_cancelled_and_the_connection_goes_on() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        first, second = client.call(request([1.0])), client.call(request([2.0]))
        client.send(h2.reset(first, Code.CANCEL))
        assert client.rig.dispatch.pending
        peer.answer_all()
        await client.settle()
        assert values(client.answer(second)[1][0]) == [4.0]
        assert not [each for each in client.frames if each.stream == first]
        assert not client.rig.dispatch.pending
        assert client.rig.dispatch.late == 1

    run(test)


def test_more_calls_than_allowed_are_refused() -> None:
    def test(client: H2Client, peer: Peer) -> None:
        for _ in range(H2_STREAMS_MAX):
            client.open()
        assert not client.read()
        number = client.open()
        (refusal,) = client.read()
        assert (refusal.kind, refusal.stream) == (h2.RST_STREAM, number)
        assert struct.unpack(">I", refusal.payload)[0] == Code.REFUSED_STREAM

    run(test)


def _flood(kind: int, payload: bytes, stream: int = 0) -> bytes:
    return h2.frame(kind, 0, stream, payload) * (H2_IDLE_FRAMES_MAX + 2)


HEAD = b"\x00\x01a\x01b"
BROKEN = {
    "no preface": (b"GET / HTTP/1.1\r\n\r\n" * 2, Code.PROTOCOL_ERROR, False),
    "frame too long": (h2.HEAD.pack(0x20, 0, h2.DATA, 0, 1), Code.FRAME_SIZE_ERROR, True),
    "control frame too long": (
        h2.HEAD.pack(0, 20_000, h2.SETTINGS, 0, 0),
        Code.ENHANCE_YOUR_CALM,
        True,
    ),
    "data for nobody": (frame(h2.DATA, 0, 5, b"x"), Code.PROTOCOL_ERROR, True),
    "even stream": (frame(h2.HEADERS, 4, 2, HEAD), Code.PROTOCOL_ERROR, True),
    "broken headers": (frame(h2.HEADERS, 4, 1, b"\x80"), Code.COMPRESSION_ERROR, True),
    "push": (frame(h2.PUSH_PROMISE, 4, 1, b"\0\0\0\2"), Code.PROTOCOL_ERROR, True),
    "short ping": (frame(h2.PING, 0, 0, b"x"), Code.FRAME_SIZE_ERROR, True),
    "odd settings": (frame(h2.SETTINGS, 0, 0, b"x"), Code.FRAME_SIZE_ERROR, True),
    "huge window": (
        h2.settings({h2.INITIAL_WINDOW_SIZE: 1 << 31}),
        Code.FLOW_CONTROL_ERROR,
        True,
    ),
    "tiny frames": (h2.settings({h2.MAX_FRAME_SIZE: 1}), Code.PROTOCOL_ERROR, True),
    "window overflow": (h2.window_update(0, (1 << 31) - 1), Code.FLOW_CONTROL_ERROR, True),
    "continuation of nothing": (frame(h2.CONTINUATION, 4, 1, HEAD), Code.PROTOCOL_ERROR, True),
    "not continued": (
        frame(h2.HEADERS, 0, 1, HEAD) + frame(h2.PING, 0, 0, b"12345678"),
        Code.PROTOCOL_ERROR,
        True,
    ),
    "endless headers": (
        frame(h2.HEADERS, 0, 1, HEAD)
        + frame(h2.CONTINUATION, 0, 1, b"x" * 16_000) * (H2_BLOCK_BYTES_MAX // 16_000 + 1),
        Code.ENHANCE_YOUR_CALM,
        True,
    ),
    "endless headers in one frame": (
        frame(h2.HEADERS, 4, 1, HEAD + b"x" * H2_BLOCK_BYTES_MAX)[:50_000],
        Code.ENHANCE_YOUR_CALM,
        True,
    ),
    "reset of nobody": (h2.reset(9, Code.CANCEL), Code.PROTOCOL_ERROR, True),
    "padding": (frame(h2.HEADERS, 4 | h2.PADDED, 1, b"\x09a"), Code.PROTOCOL_ERROR, True),
    "ping flood": (_flood(h2.PING, b"12345678"), Code.ENHANCE_YOUR_CALM, True),
    "settings flood": (_flood(h2.SETTINGS, b""), Code.ENHANCE_YOUR_CALM, True),
    "priority flood": (_flood(h2.PRIORITY, b"\0" * 5, 1), Code.ENHANCE_YOUR_CALM, True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_client_that_breaks_the_rules_is_told_and_closed(name: str) -> None:
    data, code, greet = BROKEN[name]

    def test(client: H2Client, peer: Peer) -> None:
        client.send(data)
        assert goaway(client) is code
        assert client.transport.is_closed
        client.lose()

    run(test, greet=greet)


def test_data_beyond_the_window_closes_the_connection() -> None:
    def test(client: H2Client, peer: Peer) -> None:
        number = client.open("/inference.GRPCInferenceService/ModelStreamInfer")
        client.rig.dispatch.open = None  # type: ignore[assignment,method-assign]
        # One message that never ends is topped up; whole messages that wait are not.
        client.connection.streams[number].room = 100
        client.data(number, b"\0" * 101)
        assert goaway(client) is Code.FLOW_CONTROL_ERROR
        client.lose()

    run(test)


def test_calls_that_are_reset_at_once_cost_the_connection() -> None:
    def test(client: H2Client, peer: Peer) -> None:
        for _ in range(H2_IDLE_FRAMES_MAX + 1):
            client.send(h2.reset(client.open(), Code.CANCEL))
        assert goaway(client) is Code.ENHANCE_YOUR_CALM
        client.lose()

    run(test)


def test_a_silent_client_is_asked_and_then_closed() -> None:
    def test(client: H2Client, peer: Peer) -> None:
        start_s = client.rig.clock_s
        client.connection.check_times(start_s + H2_IDLE_S - 1)
        assert not client.read()
        client.connection.check_times(start_s + H2_IDLE_S + 1)
        (ping,) = client.read()
        assert ping.kind == h2.PING
        client.send(h2.frame(h2.PING, h2.ACK, 0, ping.payload))
        client.connection.check_times(start_s + H2_IDLE_S - 1)
        assert not client.transport.is_closed
        client.connection.check_times(start_s + 2 * H2_IDLE_S + 1)
        client.connection.check_times(start_s + 2 * H2_IDLE_S + 2 + H2_PING_TIMEOUT_S)
        assert client.transport.is_closed
        client.lose()

    run(test)


def test_a_connection_without_a_greeting_is_closed() -> None:
    def test(client: H2Client, peer: Peer) -> None:
        client.connection.check_times(client.rig.clock_s + HEAD_TIMEOUT_S + 1)
        assert client.transport.is_closed
        client.lose()

    run(test, greet=False)


def test_a_message_that_does_not_come_to_an_end_is_refused() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.open()
        client.data(number, framed(request([1.0]))[:20])
        client.connection.check_times(client.rig.clock_s + BODY_TIMEOUT_S + 1)
        await client.settle()
        assert client.status(number) == 4

    run(test)


def test_a_draining_server_sends_clients_away_and_answers_what_came_before() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.call(request([1.0]))
        client.connection.leave(now=False)
        on_its_way = client.call(request([2.0]))
        client.connection.leave(now=True)
        too_late = client.call(request([3.0]))
        peer.answer_all()
        await client.settle()
        assert values(client.answer(number)[1][0]) == [2.0]
        assert values(client.answer(on_its_way)[1][0]) == [4.0]
        first, second = (each for each in client.frames if each.kind == h2.GOAWAY)
        assert struct.unpack(">I", first.payload[:4])[0] == h2.STREAM_MAX
        assert struct.unpack(">I", second.payload[:4])[0] == on_its_way
        (refusal,) = [each for each in client.frames if each.stream == too_late]
        assert refusal.kind == h2.RST_STREAM
        assert client.transport.is_closed
        client.lose()

    run(test)


FRAMES = st.builds(
    frame,
    st.integers(0, 10),
    st.sampled_from([0, 1, 4, 5, 8, 9, 0x25, 0x2D]),
    st.sampled_from([0, 1, 3, 5, 7, 2]),
    st.one_of(
        st.binary(max_size=40),
        st.just(framed(request([1.0, 2.0]))),
        st.just(framed(request([1.0, 2.0], id="a"))[:-1]),
        st.sampled_from([b"\0\0\0\1", b"\x7f\xff\xff\xff", b"\0" * 8]),
        st.just(H2Client.headers(None)),  # type: ignore[arg-type]
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FRAMES, max_size=12), st.integers(1, 60))
def test_whatever_comes_every_block_comes_back(frames: list[bytes], size: int) -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        data = b"".join(frames)
        for at in range(0, len(data), size):
            client.send(data[at : at + size])
        peer.answer_all()
        await client.settle()
        client.lose()

    run(test)
