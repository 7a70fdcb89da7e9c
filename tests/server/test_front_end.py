"""The front end over real rings: ways in, dispatch, workers that die, clients that are slow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from front_end_rig import (
    ARENA_BYTES,
    HEAD,
    ROUTE,
    Client,
    Peer,
    Rig,
    answers,
    body,
    in_loop,
    numbers,
    request,
)
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import _shm
from overcommit.runtime.config import PIPELINE_MAX
from overcommit.runtime.front_end_messages import Region, RegionsChanged
from overcommit.runtime.lanes import LEVEL_SHIFT, RUN_ALONE
from overcommit.server.limits import (
    BODY_TIMEOUT_S,
    BULK_BYTES_MIN,
    HEAD_TIMEOUT_S,
    SMALL_BODY_BYTES,
    WRITE_TIMEOUT_S,
)
from overcommit.server.plans import Plans
from overcommit.server.regions import Regions
from overcommit.server.routing import CANARY
from overcommit.server.shared_body import MEDIA_TYPE


def binary_request(values: np.ndarray[Any, Any], *headers: bytes) -> bytes:
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": [1, values.size],
        "parameters": {"binary_data_size": values.nbytes},
    }
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    length = b"Inference-Header-Content-Length: %d" % len(text)
    return request(text + values.tobytes(), length, *headers)


def ask(client: Client, peer: Peer, *requests: bytes) -> None:
    """Send one after the other, each when the one before has its answer."""
    for each in requests:
        client.send(each)
        peer.answer_all()


# --- ways in ------------------------------------------------------------------------------------
@given(
    cuts=st.lists(st.integers(0, 1200), max_size=8),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=6),
)
def test_how_the_bytes_are_cut_changes_nothing(cuts: list[int], counts: list[int]) -> None:
    stream = b"".join(
        request(body(*range(number, number + count), id=str(number)))
        for number, count in enumerate(counts)
    )
    # A connection before it has made some of the heads known, and not all.
    known = request(body(5.0, id="0"))

    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        rig.connect().send(known)
        peer.answer_all()
        client = rig.connect()
        at = 0
        for cut in sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)}):
            client.send(stream[at:cut])
            at = cut
            peer.answer_all()
        while peer.answer_all():
            pass
        found = answers(client.written)
        assert [numbers(each) for each in found] == [
            [2.0 * value for value in range(number, number + count)]
            for number, count in enumerate(counts)
        ]
        assert [each[1]["id"] for each in found] == [str(number) for number in range(len(counts))]
        assert rig.is_empty()

    in_loop(test)


def test_a_head_is_parsed_once() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        ask(client, peer, *[request(body(1.0))] * 3)
        assert (len(rig.heads.targets), len(rig.heads.fields)) == (1, 1)
        # And the parser has not seen the other two.
        assert client.protocol._raw_head == b""
        assert [numbers(each) for each in answers(client.written)] == [[2.0]] * 3

    in_loop(test)


@pytest.mark.parametrize(
    "raw",
    [
        request(body(1.0), b"Connection: close"),
        request(body(1.0), b"Expect: 100-continue"),
        request(body(1.0), b"Content-Encoding: gzip"),
        request(body(1.0), b"X-Long: " + b"x" * 2000),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        request(b"x" * (SMALL_BODY_BYTES + 1)),
        request(body(1.0)).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_a_head_that_means_more_is_not_remembered(raw: bytes) -> None:
    def test() -> None:
        rig = Rig()
        Peer(rig, 0, 1)
        rig.connect().send(raw)
        assert not rig.heads.targets
        assert not rig.heads.fields

    in_loop(test)


def test_ids_of_requests_come_back_with_answers_and_errors() -> None:
    def test() -> None:
        rig = Rig()
        peer, client = Peer(rig, 0, 1), rig.connect()
        for number in range(3):
            line = b"X-Request-Id: r-%d" % number
            client.send(request(body(1.0), line, b"seldon-puid: p"))
            peer.answer_all()
            head = client.written.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")[0]
            assert b"x-request-id: r-%d\r\nseldon-puid: p" % number in head
        assert not rig.heads.fields, "each of them would take a place"
        client.send(request(b"{", b"x-request-id: bad"))
        assert b"x-request-id: bad" in client.written
        before = len(client.written)
        client.send(request(body(1.0), b"x-request-id: " + b"x" * 2000))
        client.send(request(body(1.0), b"x-request-id: a\xffb"))
        peer.answer_all()
        assert b"x-request-id" not in client.written[before:]

    in_loop(test)


def test_a_head_that_ends_with_bare_line_feeds_is_not_remembered() -> None:
    def test() -> None:
        rig = Rig()
        Peer(rig, 0, 1)
        content = body(1.0)
        raw = HEAD.replace(b"\r\n", b"\n") + b"Content-Length: %d\n\n" % len(content)
        rig.connect().send(raw + content + b"\r\n\r\n")
        assert not rig.heads.targets
        assert not rig.heads.fields

    in_loop(test)


def test_the_parts_of_heads_mean_the_same_in_any_combination() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        longer = body(1.25)
        to_other = request(body(1.0)).replace(b"/infer", b"/versions/1/infer", 1)
        ask(client, peer, request(longer), to_other)
        assert (len(rig.heads.targets), len(rig.heads.fields)) == (2, 2)
        client.protocol._feed = lambda _: pytest.fail("the parser is asked")  # type: ignore[method-assign]
        longer_to_other = request(longer).replace(b"/infer", b"/versions/1/infer", 1)
        ask(client, peer, longer_to_other, request(body(1.0)))
        found = answers(client.written)
        assert [numbers(each) for each in found] == [[2.5], [2.0], [2.5], [2.0]]

    in_loop(test)


def test_a_version_asked_by_a_header_is_not_taken_for_the_lines() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        canary = b"X-Overcommit-Canary: always"
        named = request(body(1.0), canary).replace(b"/infer", b"/versions/1/infer", 1)
        ask(client, peer, *[named, request(body(1.0), canary), request(body(1.0))] * 2)
        asked = {line: target.version for line, target in rig.heads.targets.items()}
        assert sorted(asked.values(), key=str) == ["1", None]
        assert {fields.asks for fields in rig.heads.fields.values()} == {CANARY, None}
        assert ("m", CANARY) in rig.plans.serving

    in_loop(test)


def test_what_a_line_means_is_asked_again_when_routes_have_changed() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        ask(client, peer, *[request(body(1.0))] * 3)
        (target,) = rig.heads.targets.values()
        former = target.plans
        assert former is not None
        rig.plans.forget_names()
        rig.plans._routes.clear()
        ask(client, peer, request(body(1.0)))
        (now,) = rig.plans.serving.values()
        assert now is not former
        ask(client, peer, request(body(1.0)))
        assert target.plans is now

    in_loop(test)


def test_requests_whose_heads_are_known_wait_for_their_turn_and_are_limited() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1, slots=256)
        client = rig.connect()
        client.send(request(body(0.0)))
        peer.answer_all()
        client.transport.written.clear()
        client.send(b"".join(request(body(float(i))) for i in range(10)))
        assert len(peer.take()) == 1, "the others wait for the first"
        peer.answer(peer.taken[-1])
        rig.dispatch.drain()
        while peer.answer_all():
            pass
        assert [numbers(each) for each in answers(client.written)] == [[2.0 * i] for i in range(10)]
        client.send(request(body(1.0)) * (PIPELINE_MAX + 2))
        while peer.answer_all():
            pass
        assert rig.is_empty()

    in_loop(test)


# --- long bodies --------------------------------------------------------------------------------
VALUES = np.arange(2 * BULK_BYTES_MIN // 4, dtype=np.float32)


@pytest.mark.parametrize("cut", [1, 60, 250, 5000, 200_000, 10_000_000])
def test_a_long_binary_body_is_received_in_place(cut: int) -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        raw = binary_request(VALUES)
        for start in range(0, len(raw), cut) if cut >= 5000 else (0, cut):
            end = start + cut if cut >= 5000 or start == 0 else len(raw)
            client.send(raw[start:end])
        assert client.transport.protocol is client.protocol
        assert not client.transport.is_paused
        client.send(request(body(1.0)))  # the next request is parsed as ever
        while peer.answer_all():
            pass
        first, second = answers(client.written)
        np.testing.assert_array_equal(np.frombuffer(first[1], np.float32), 2 * VALUES)
        assert numbers(second) == [2.0]
        assert rig.is_empty()

    in_loop(test)


def test_a_long_body_whose_sizes_do_not_add_up_is_a_400() -> None:
    def test() -> None:
        rig = Rig()
        Peer(rig, 0, 1)
        client = rig.connect()
        raw = binary_request(VALUES)
        wrong = raw.replace(b'"shape": [1, %d]' % VALUES.size, b'"shape": [1, %d]' % 65537)
        client.send(wrong)
        ((status, content),) = answers(client.written)
        assert status == 400
        assert "its shape [1, 65537] needs 65537" in content["error"]
        assert rig.is_empty()

    in_loop(test)


def test_a_client_that_leaves_in_the_middle_of_a_long_body_gives_its_blocks_back() -> None:
    def test() -> None:
        rig = Rig()
        Peer(rig, 0, 1)
        client = rig.connect()
        client.send(binary_request(VALUES)[: BULK_BYTES_MIN // 2])
        assert client.transport.protocol is not client.protocol
        assert rig.dispatch.parcels.ingress.blocks_used == 1
        client.lose()
        assert rig.is_empty()

    in_loop(test)


def test_bodies_that_are_gathered_are_limited_together() -> None:
    def test() -> None:
        rig = Rig()
        client = rig.connect()
        client.send(request(b"x" * 100_000)[:90_000])
        assert rig.bodies_bytes > 80_000
        client.lose()
        assert rig.is_empty()

    in_loop(test)


# --- time ---------------------------------------------------------------------------------------
def test_slow_and_idle_connections_are_closed() -> None:
    def test() -> None:
        rig = Rig(keep_alive_s=75)
        Peer(rig, 0, 1)
        idle, slow_head, slow_body, slow_reader, busy = (rig.connect() for _ in range(5))
        slow_head.send(HEAD)
        slow_body.send(request(body(1.0))[:-5])
        slow_reader.protocol.pause_writing()
        busy.send(request(body(1.0)))

        def closed_at(seconds: float) -> list[Client]:
            everyone = (idle, slow_head, slow_body, slow_reader, busy)
            for each in everyone:
                if not each.transport.is_closed and not each.written:
                    each.protocol.check_times(rig.clock_s + seconds)
            return [each for each in everyone if each.transport.is_closed or each.written]

        assert closed_at(HEAD_TIMEOUT_S - 1) == []
        assert closed_at(HEAD_TIMEOUT_S + 1) == [slow_head]
        assert answers(slow_head.written)[0][0] == 408
        assert closed_at(WRITE_TIMEOUT_S + 1) == [slow_head, slow_reader]
        assert closed_at(76) == [idle, slow_head, slow_reader]
        assert closed_at(BODY_TIMEOUT_S + 1) == [idle, slow_head, slow_body, slow_reader]
        assert busy.transport.is_closed is False, "its answer is our business"

    in_loop(test)


# --- workers ------------------------------------------------------------------------------------
def test_how_urgent_a_request_is_travels_with_it_where_its_version_has_levels() -> None:
    def test() -> None:
        for levels, priority, level in ((3, 2, 2), (3, 4, 0), (3, None, 0), (0, 2, 0)):
            rig = Rig(msgspec.structs.replace(ROUTE, priority_levels=levels))
            peer, client = Peer(rig, 0, 1), rig.connect()
            asked = json.loads(body(1.0))
            if priority is not None:
                asked["parameters"] = {"priority": priority}
            for _ in range(4):  # by a template, from the third one on
                client.send(request(json.dumps(asked).encode()))
                (submission,) = peer.take()
                assert submission[9] >> LEVEL_SHIFT == level
                peer.answer(submission)
                rig.dispatch.drain()

    in_loop(test)


@pytest.mark.parametrize("kind", ["body", "region"])
def test_how_urgent_a_long_request_is_travels_with_it_too(kind: str, tmp_path: Path) -> None:
    def test() -> None:
        rig = Rig(msgspec.structs.replace(ROUTE, priority_levels=3))
        (tmp_path / "key").write_bytes(VALUES.tobytes())
        rig.plans = Plans(Regions(is_allowed=True, folder=str(tmp_path)))
        region = Region(name="r", key="/key", offset=0, byte_size=VALUES.nbytes)
        rig.plans._regions.apply(RegionsChanged(upsert=(region,)))
        peer, client = Peer(rig, 0, 1), rig.connect()
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, VALUES.size]}
        asked: dict[str, Any] = {
            "inputs": [{**tensor, "parameters": {"binary_data_size": VALUES.nbytes}}],
            "parameters": {"priority": 2, "binary_data_output": True},
        }
        if kind == "region":
            asked["parameters"] |= {"shared_memory_region": "r"}
            asked["parameters"] |= {"shared_memory_byte_size": VALUES.nbytes}
            text = json.dumps(asked).encode()
            client.send(request(text, b"Content-Type: " + MEDIA_TYPE))
        else:
            text = json.dumps(asked).encode()
            length = b"Inference-Header-Content-Length: %d" % len(text)
            client.send(request(text + VALUES.tobytes(), length))
        (submission,) = peer.take()
        assert submission[9] >> LEVEL_SHIFT == 2
        peer.answer(submission)
        rig.dispatch.drain()
        assert rig.is_empty()

    in_loop(test)


def test_what_a_dead_worker_had_queued_moves_on_and_what_it_ran_is_retried_alone() -> None:
    def test() -> None:
        rig = Rig()
        first = Peer(rig, 0, 1)
        clients = [rig.connect() for _ in range(3)]
        for number, client in enumerate(clients):
            client.send(request(body(float(number))))
        taken = first.submissions.pop(2)  # the third stays in the ring
        first.status.begin(3, _shm.PHASE_COMPUTE, time.monotonic_ns(), [taken[0][0]])
        rig.dispatch.link_down(0, 1)
        assert all(not client.written for client in clients)
        second = Peer(rig, 0, 2)
        moved = second.take()
        assert [bool(each[9] & RUN_ALONE) for each in moved] == [True, False, False]
        for submission in moved:
            second.answer(submission)
        rig.dispatch.drain()
        assert [numbers(answers(client.written)[0]) for client in clients] == [[0.0], [2.0], [4.0]]
        assert rig.is_empty()

    in_loop(test)


def test_a_request_that_kills_two_workers_is_a_502() -> None:
    def test() -> None:
        rig = Rig()
        client = rig.connect()
        client.send(request(body(1.0)))
        assert rig.dispatch.pending, "held until a worker comes"
        for epoch in (1, 2):
            peer = Peer(rig, 0, epoch)
            (submission,) = peer.take()
            peer.status.begin(3, _shm.PHASE_COMPUTE, time.monotonic_ns(), [submission[0]])
            rig.dispatch.link_down(0, epoch)
        ((status, content),) = answers(client.written)
        assert status == 502
        assert "model 'm'" in content["error"]
        assert rig.is_empty()

    in_loop(test)


def test_an_answer_that_comes_late_is_dropped_and_its_blocks_come_back_then() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        late, gone = rig.connect(), rig.connect()
        late.send(request(body(1.0)))
        gone.send(request(body(2.0)))
        rig.dispatch.expire(time.monotonic_ns() + 61_000_000_000)
        assert answers(late.written)[0][0] == 504
        gone.lose()
        assert rig.dispatch.parcels.ingress.blocks_used == 2, "the worker may still write to them"
        peer.answer_all()
        assert len(answers(late.written)) == 1
        assert rig.dispatch.late == 2
        assert rig.is_empty()

    in_loop(test)


def test_a_worker_that_lies_about_its_answer_gets_no_more_requests() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        client.send(request(body(1.0)))
        (submission,) = peer.take()
        peer.answer(submission, length=ARENA_BYTES)
        rig.dispatch.drain()
        assert answers(client.written)[0][0] == 500
        client = rig.connect()
        client.send(request(body(1.0)))
        assert not peer.take()
        Peer(rig, 1, 2).answer_all()
        assert numbers(answers(client.written)[0]) == [2.0]

    in_loop(test)


def test_an_answer_that_is_no_payload_is_a_500() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        client.send(request(body(1.0)))
        (submission,) = peer.take()
        out = submission[4]
        rig.egress[out : out + 64] = b"\xff" * 64
        peer.completions.push(submission[0], 1, 2, 3, 64, _shm.OK, 1, 0)
        rig.dispatch.drain()
        assert answers(client.written)[0][0] == 500
        assert rig.is_empty()

    in_loop(test)


def test_full_memory_is_a_503_and_nothing_leaks() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1, slots=8)
        clients = [rig.connect() for _ in range(5)]
        for client in clients:
            client.send(request(body(1.0)))
        assert not any(client.written for client in clients), "who finds no place is held"
        while peer.answer_all():
            pass
        assert rig.is_empty()
        block, count = rig.dispatch.parcels.ingress.try_reserve(ARENA_BYTES // 2), 0
        while block is not None:
            block, count = rig.dispatch.parcels.ingress.try_reserve(1), count + 1
        client = rig.connect()
        client.send(request(body(*[1.0] * 1000)))  # too large for the idle pairs
        ((status, content),) = answers(client.written)
        assert status == 503
        assert "--payload-memory" in content["error"]
        assert not rig.dispatch.pending

    in_loop(test)
