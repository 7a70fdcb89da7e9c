"""One connection: answers in the order of the requests, refusals too; offers, odd targets, codings."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from front_end_rig import HEAD, Client, Peer, Rig, answers, body, in_loop, numbers, request
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.config import PIPELINE_MAX
from overcommit.server.limits import BODIES_BYTES_MAX, BODY_TIMEOUT_S, SMALL_BODY_BYTES

OFFER = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def statuses(client: Client) -> list[int]:
    return [status for status, _ in answers(client.written)]


def with_peer(test: Callable[[Rig, Peer, Client], None], **settings: int) -> None:
    def run() -> None:
        rig = Rig(**settings)
        test(rig, Peer(rig, 0, 1), rig.connect())

    in_loop(run)


# --- offers -------------------------------------------------------------------------------------
@given(cuts=st.lists(st.integers(1, 600), max_size=6))
def test_an_offer_to_speak_another_protocol_changes_nothing(cuts: list[int]) -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        stream = request(body(1.0), *OFFER) + request(body(2.0)) + request(body(3.0), *OFFER)
        chunk = body(4.0)
        offered = b"".join(line + b"\r\n" for line in OFFER)
        stream += CHUNKED.replace(b"\r\n\r\n", b"\r\n" + offered + b"\r\n")
        stream += b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunk), chunk)
        ends = sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)})
        for start, end in zip([0, *ends], ends, strict=False):
            client.send(stream[start:end])
        while peer.answer_all():
            pass
        assert [numbers(each) for each in answers(client.written)] == [[2.0], [4.0], [6.0], [8.0]]
        assert rig.is_empty()

    with_peer(test)


def test_a_body_behind_an_offer_is_never_read_as_a_request() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        hidden = request(body(1.0))
        client.send(request(hidden, *OFFER)[: -len(hidden)])
        client.send(hidden)
        assert not peer.answer_all()
        assert statuses(client) == [400]
        client.send(request(body(2.0)))
        peer.answer_all()
        assert statuses(client) == [400, 200]

    with_peer(test)


def test_a_head_with_an_offer_is_not_remembered() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        client.send(request(body(1.0), *OFFER))
        assert not rig.heads.fields

    with_peer(test)


def test_connect_is_refused() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        client.send(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\nand more")
        assert statuses(client) == [400]

    with_peer(test)


# --- targets and codings --------------------------------------------------------------------------
def test_a_target_may_be_a_whole_url() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        for _ in range(2):
            client.send(request(body(3.0)).replace(b"POST /v2", b"POST http://h:80/v2"))
            peer.answer_all()
        assert [numbers(each) for each in answers(client.written)] == [[6.0]] * 2

    with_peer(test)


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"identity"])
def test_a_transfer_coding_that_is_not_known_is_refused(coding: bytes) -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        client.send(CHUNKED.replace(b"chunked", coding) + b"0\r\n\r\n")
        assert statuses(client)[0] in (400, 501)
        assert not peer.take()

    with_peer(test)


# --- refusals wait for their turn -----------------------------------------------------------------
def refused_in_turn(rig: Rig, peer: Peer, client: Client, status: int) -> None:
    """The first request is with the worker, the second was refused."""
    assert client.written == b"", "the first comes first"
    peer.answer_all()
    assert statuses(client) == [200, status]
    client.send(request(body(3.0)))
    assert not peer.answer_all(), "what comes after a refusal is thrown away"
    assert statuses(client) == [200, status]
    assert rig.is_empty()


def test_a_chunked_body_over_the_limit_is_refused_in_turn() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        client.send(request(body(1.0)) + CHUNKED + b"%x\r\n%b\r\n" % (3000, b" " * 3000))
        refused_in_turn(rig, peer, client, 413)

    with_peer(test, body_bytes_max=2000)


def test_a_head_over_the_limit_is_refused_in_turn() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        lines = [b"X-%d: %b" % (number, b"y" * 1000) for number in range(100)]
        client.send(request(body(1.0)) + request(body(2.0), *lines))
        refused_in_turn(rig, peer, client, 431)

    with_peer(test)


def test_a_full_budget_of_bodies_refuses_in_turn() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        rig.bodies_bytes = BODIES_BYTES_MAX
        client.send(request(body(1.0)) + request(b" " * (SMALL_BODY_BYTES + 1)))
        rig.bodies_bytes -= BODIES_BYTES_MAX
        refused_in_turn(rig, peer, client, 503)

    with_peer(test)


def test_requests_over_the_bound_of_a_pipeline_are_refused_in_turn() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        client.send(request(body(1.0)) * (2 * PIPELINE_MAX))
        while peer.answer_all():
            pass
        assert statuses(client) == [200] * (PIPELINE_MAX + 1) + [503]
        assert rig.is_empty()

    with_peer(test)


def test_a_body_that_we_do_not_read_is_not_late() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        second = request(body(2.0))
        client.send(request(body(1.0)) + second[:-3])
        assert client.transport.is_paused
        rig.clock_s += BODY_TIMEOUT_S + 1
        client.protocol.check_times(rig.clock_s)
        assert client.written == b""
        peer.answer_all()
        assert not client.transport.is_paused
        rig.clock_s += BODY_TIMEOUT_S - 1
        client.protocol.check_times(rig.clock_s)
        client.send(second[-3:])
        peer.answer_all()
        assert [numbers(each) for each in answers(client.written)] == [[2.0], [4.0]]

    with_peer(test)


# --- the budget of bodies -------------------------------------------------------------------------
def test_a_body_that_decompresses_to_nothing_gives_its_budget_back() -> None:
    def test(rig: Rig, peer: Peer, client: Client) -> None:
        blocks = b"\x00\x00\x00\xff\xff" * SMALL_BODY_BYTES  # stored blocks without bytes
        nothing = b"\x78\x9c" + blocks + b"\x01\x00\x00\xff\xff" + b"\x00\x00\x00\x01"
        assert zlib.decompress(nothing) == b""
        client.send(request(nothing, b"Content-Encoding: deflate"))
        assert statuses(client) == [400]
        assert rig.is_empty()

    with_peer(test)
