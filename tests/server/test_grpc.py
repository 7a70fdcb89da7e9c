"""gRPC calls on a front end without a server: messages, deadlines, order, what is given back."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from front_end_rig import ROUTE, Peer, Rig
from h2_rig import STREAM, H2Client, framed, in_loop, request, values
from hypothesis import given, settings
from hypothesis import strategies as st

from overcommit.runtime import _shm
from overcommit.runtime.errors import BadRequest
from overcommit.server import h2
from overcommit.server.grpc_requests import Requests
from overcommit.server.h2 import Code
from overcommit.server.limits import (
    BODIES_BYTES_MAX,
    GRPC_STREAM_REQUESTS_MAX,
    H2_WINDOW_BYTES,
)
from overcommit.server.plans import RoutePlans
from overcommit.server.proto import messages
from overcommit.server.routing import CANARY, STABLE

INVALID, DEADLINE, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 3, 4, 8, 12, 13, 14


def run(test: Callable[[H2Client, Peer], Any], **options: Any) -> None:
    """Run a test; afterwards every block is back."""

    async def go() -> None:
        rig = Rig(**options)
        peer = Peer(rig, 0, 1, slots=1024)
        client = H2Client(rig)
        await test(client, peer)
        client.lose()
        peer.answer_all()
        assert rig.is_empty()

    in_loop(go)


# --- unary --------------------------------------------------------------------------------------
def test_an_answer_has_headers_a_message_and_a_status() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.call(request([1.0, 2.0], id="seven"))
        peer.answer_all()
        await client.settle()
        headers, (message,), trailers = client.answer(number)
        assert (headers[":status"], headers["content-type"]) == ("200", "application/grpc")
        assert trailers == {"grpc-status": "0"}
        answer = messages.ModelInferResponse.FromString(message)
        assert (answer.model_name, answer.model_version, answer.id) == ("m", "1", "seven")
        (output,) = answer.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("y", "FP32", [1, 2])
        assert not output.HasField("contents")
        assert values(message) == [2.0, 4.0]

    run(test)


def test_requests_that_differ_in_numbers_and_id_are_not_mixed_up() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        sent = {}
        for n in range(30):
            row = [float(n)] * (1 + n % 3)
            sent[client.call(request(row, id=str(n) if n % 2 else ""))] = (str(n), row)
        for submission in reversed(peer.take()):
            peer.answer(submission)
        client.rig.dispatch.drain()
        await client.settle()
        for number, (text, row) in sent.items():
            message = client.answer(number)[1][0]
            assert values(message) == [2 * each for each in row]
            got = messages.ModelInferResponse.FromString(message).id
            assert got == (text if int(text) % 2 else "")

    run(test)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_messages_are_answered_likewise(encoding: str) -> None:
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress}[encoding]

    async def test(client: H2Client, peer: Peer) -> None:
        data = framed(pack(request([4.0])), compressed=True)
        accepted = {"grpc_encoding": encoding, "grpc_accept_encoding": f"identity, {encoding}"}
        number = client.open(**accepted)
        client.data(number, data, end=True)
        plain = client.open(grpc_encoding=encoding)
        client.data(plain, data, end=True)
        peer.answer_all()
        await client.settle()
        headers, (message,), _ = client.answer(number)
        assert headers["grpc-encoding"] == encoding
        assert values(unpack(message)) == [8.0]
        headers, (message,), _ = client.answer(plain)  # it did not say that it reads that
        assert "grpc-encoding" not in headers
        assert values(message) == [8.0]

    run(test)


def test_what_is_no_call_is_refused_in_words() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        bomb = framed(gzip.compress(b"\0" * (1 << 21)), compressed=True)
        faults = {
            client.call(b"", "/inference.GRPCInferenceService/Dance"): (UNIMPLEMENTED, "Dance"),
            client.call(b"", "/"): (UNIMPLEMENTED, "no method"),
            client.call(request([1.0]), grpc_encoding="br"): (UNIMPLEMENTED, "gzip"),
            client.call(request([1.0]), grpc_timeout="1x"): (INVALID, "grpc-timeout"),
            client.call(b"\xff\xff"): (INVALID, "no ModelInferRequest"),
            client.call(request([1.0])[:-1]): (INVALID, "truncated"),
            client.call(b""): (INVALID, "missing"),
            client.call(request([1.0], name="z")): (INVALID, "unknown input 'z'"),
            client.call(request(*[[1.0]] * 65)): (INVALID, "max_batch_size"),
        }
        for data, expected in (
            (framed(request([1.0])) * 2, (UNIMPLEMENTED, "one message")),
            (b"", (INTERNAL, "none came")),
            (b"\2\0\0\0\0", (INTERNAL, "flags")),
            (framed(b"x", compressed=True), (INTERNAL, "without grpc-encoding")),
            (framed(b"x" * ((1 << 20) + 1)), (EXHAUSTED, "the limit is 1048576")),
        ):
            number = client.open()
            client.data(number, data, end=True)
            faults[number] = expected
        for data, expected in (
            (bomb, (EXHAUSTED, "the limit")),
            (framed(b"x", compressed=True), (INVALID, "gzip")),
        ):
            number = client.open(grpc_encoding="gzip")
            client.data(number, data, end=True)
            faults[number] = expected
        await client.settle()
        for number, (status, text) in faults.items():
            headers, found, trailers = client.answer(number)
            assert headers[":status"] == "200"
            assert not found
            assert int(trailers["grpc-status"]) == status, trailers
            assert text in trailers["grpc-message"], trailers
        assert not client.transport.is_closed

    run(test, body_bytes_max=1 << 20)


def test_a_workers_refusal_keeps_its_code_and_its_text() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.call(request([1.0]))
        (submission,) = peer.take()
        text = "caf\u00e9 100%\n".encode()
        client.rig.egress[submission[4] : submission[4] + len(text)] = text
        peer.completions.push(submission[0], 1, 2, 3, len(text), _shm.MODEL_ERROR, 1, 0)
        client.rig.dispatch.drain()
        await client.settle()
        trailers = client.answer(number)[2]
        assert int(trailers["grpc-status"]) == INTERNAL
        assert trailers["grpc-message"] == "model 'm': caf%C3%A9 100%25%0A"

    run(test)


def test_refusals_that_will_pass_say_when_to_come_back() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.call(request([1.0]))
        (submission,) = peer.take()
        peer.answer(submission, _shm.OVERLOADED, length=0)
        client.rig.dispatch.drain()
        await client.settle()
        trailers = client.answer(number)[2]
        assert int(trailers["grpc-status"]) == UNAVAILABLE
        assert trailers["grpc-retry-pushback-ms"] == "1000"

    run(test)


def test_the_calls_deadline_is_the_requests() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.call(request([1.0]), grpc_timeout="250m")
        (submission,) = peer.take()
        (pending,) = client.rig.dispatch.pending.values()
        assert submission[1] == pending.deadline_ns
        assert pending.deadline_ns - pending.began_ns <= 250_000_000
        client.rig.dispatch.expire(pending.deadline_ns)
        await client.settle()
        assert client.status(number) == DEADLINE
        peer.answer(submission)
        client.rig.dispatch.drain()
        without = client.call(request([1.0]))
        (pending,) = client.rig.dispatch.pending.values()
        assert pending.deadline_ns - pending.began_ns >= 1_000_000_000
        peer.answer_all()
        await client.settle()
        assert client.status(without) == 0

    run(test)


def test_long_messages_count_against_the_budget_until_they_are_submitted() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        client.send(h2.window_update(0, 1 << 20) + h2.settings({h2.INITIAL_WINDOW_SIZE: 1 << 20}))
        data = framed(request([1.0] * 50_000))
        number = client.open()
        client.data(number, data[:1000])
        assert client.rig.bodies_bytes == len(data) - 5
        gone = client.open()
        client.data(gone, data[:1000])
        client.send(h2.reset(gone, Code.CANCEL))
        assert client.rig.bodies_bytes == len(data) - 5
        client.data(number, data[1000:], end=True)
        assert not client.rig.bodies_bytes
        peer.answer_all()
        await client.settle()
        assert client.status(number) == 0
        waiting = client.open()
        client.data(waiting, framed(request([1.0])))  # whole, but the client has not ended
        assert client.rig.bodies_bytes == len(request([1.0]))
        client.data(waiting, b"", end=True)
        assert not client.rig.bodies_bytes
        peer.answer_all()
        client.rig.bodies_bytes = BODIES_BYTES_MAX
        refused = client.open()
        client.data(refused, data[:1000])
        await client.settle()
        assert client.status(refused) == UNAVAILABLE
        client.rig.bodies_bytes -= BODIES_BYTES_MAX

    run(test)


# --- streams ------------------------------------------------------------------------------------
def answers_of(client: H2Client, number: int) -> list[messages.ModelStreamInferResponse]:
    found = client.answer(number)[1]
    return [messages.ModelStreamInferResponse.FromString(each) for each in found]


def test_a_stream_is_answered_in_the_order_of_its_requests() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.open(STREAM)
        for n in range(5):
            client.data(number, framed(request([float(n)], id=str(n))))
        client.data(number, framed(request([0.0], name="z", id="bad")), end=True)
        for submission in reversed(peer.take()):
            peer.answer(submission)
            client.rig.dispatch.drain()
        await client.settle()
        found = answers_of(client, number)
        assert [each.infer_response.id for each in found] == ["0", "1", "2", "3", "4", "bad"]
        for n, each in enumerate(found[:5]):
            assert not each.error_message
            assert values(each.infer_response.SerializeToString()) == [2.0 * n]
            assert each.infer_response.parameters["triton_final_response"].bool_param
        assert "unknown input 'z'" in found[5].error_message
        assert client.status(number) == 0

    run(test)


def test_messages_that_come_with_the_end_of_a_stream_are_all_answered() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.open(STREAM)
        refused = framed(request([0.0], name="z", id="first"))
        client.data(number, refused + framed(request([1.0], id="second")) + refused, end=True)
        peer.answer_all()
        await client.settle()
        found = [each.infer_response.id for each in answers_of(client, number)]
        assert found == ["first", "second", "first"]
        assert client.status(number) == 0

    run(test)


def test_a_stream_that_asks_for_it_ends_with_its_first_error() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.open(STREAM, triton_grpc_error="true")
        client.data(number, framed(request([1.0])))
        client.data(number, framed(request([0.0], name="z")))
        await client.settle()
        assert client.status(number) == INVALID

    run(test)


def test_a_stream_that_is_faster_than_its_answers_waits() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        client.send(h2.window_update(0, 1 << 28))
        number = client.open(STREAM)
        message = framed(request([1.0] * 1000))
        count = H2_WINDOW_BYTES // len(message)
        got = 0
        for at in range(0, count, 4):
            client.data(number, message * min(4, count - at))
            peer.take()
        assert len(client.rig.dispatch.pending) == GRPC_STREAM_REQUESTS_MAX
        kept = (count - GRPC_STREAM_REQUESTS_MAX) * (len(message) - 5)
        assert client.rig.bodies_bytes == kept
        assert not [each for each in client.read() if each.kind == h2.WINDOW_UPDATE]
        peer_taken, peer.taken = peer.taken, []
        while peer_taken:
            for submission in peer_taken:
                peer.answer(submission)
                got += 1
                if got % 32 == 0:
                    client.rig.dispatch.drain()
            client.rig.dispatch.drain()
            client.send(h2.window_update(number, 1 << 20))
            await client.settle()
            peer_taken = peer.take()
        assert got == count
        assert not client.rig.bodies_bytes
        assert [each for each in client.frames if each.kind == h2.WINDOW_UPDATE and each.stream]
        client.data(number, b"", end=True)
        await client.settle()
        assert len(answers_of(client, number)) == count
        assert client.status(number) == 0

    run(test)


def test_a_cancelled_stream_gives_everything_back() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        number = client.open(STREAM)
        for n in range(10):
            client.data(number, framed(request([float(n)])))
        client.send(h2.reset(number, Code.CANCEL))
        assert peer.answer_all() == 10
        assert client.rig.dispatch.late == 10
        await client.settle()
        assert not [each for each in client.frames if each.stream == number]

    run(test)


# --- the short way ------------------------------------------------------------------------------
PLANS = RoutePlans(ROUTE)


@st.composite
def infer_messages(draw: st.DrawFn) -> bytes:
    """Requests for y = 2x, right and wrong, of few shapes so that they meet again."""
    rows, columns = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    message = messages.ModelInferRequest(
        model_name=draw(st.sampled_from(["m", "other"])),
        model_version=draw(st.sampled_from(["", "1"])),
        id=draw(st.sampled_from(["", "a", "b" * 200])),
    )
    for _ in range(draw(st.sampled_from([1, 1, 1, 0, 2]))):
        given_ = message.inputs.add(name="x", datatype="FP32", shape=[rows, columns])
        if draw(st.booleans()) and not draw(st.booleans()):
            given_.contents.fp32_contents.extend([1.0] * (rows * columns))
    if draw(st.booleans()):
        message.outputs.add(name=draw(st.sampled_from(["y", "z"])))
    if draw(st.booleans()):
        message.parameters["timeout"].int64_param = draw(st.sampled_from([5, 7]))
    for _ in range(draw(st.sampled_from([1, 1, 1, 0, 2]))):
        size = 4 * rows * columns + draw(st.sampled_from([0, 0, 0, 4, -1]))
        message.raw_input_contents.append(
            draw(st.binary(min_size=max(size, 0), max_size=max(size, 0)))
        )
    data = message.SerializeToString()
    cut = draw(st.sampled_from([0, 0, 0, 1, 3]))
    return data[: len(data) - cut] if cut else data


def outcome(requests: Requests, data: bytes) -> Any:
    try:
        asked = requests.read(data)
        prepared, tensors = requests.prepare(PLANS, asked)
    except BadRequest as error:
        return error.message
    return (
        *(asked.id, asked.name, asked.version, prepared.selection, prepared.timeout_us),
        *(prepared.plan.places, [bytes(each) for each in tensors]),
    )


@settings(deadline=None)
@given(st.lists(infer_messages(), max_size=6))
def test_the_short_way_says_what_the_long_way_says(sent: list[bytes]) -> None:
    shared = Requests()
    for data in [*sent, *sent]:
        assert outcome(shared, data) == outcome(Requests(), data)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_are_refused(data: bytes) -> None:
    outcome(Requests(), data)
    outcome(Requests(), request([1.0]) + data)
    outcome(Requests(), data + request([1.0]))


def test_fields_in_another_order_mean_the_same() -> None:
    whole = request([1.0, 2.0], id="q")
    at = whole.index(b"\x3a\x08")
    swapped = whole[at:] + whole[:at]
    assert outcome(Requests(), swapped) == outcome(Requests(), whole)
    assert np.frombuffer(outcome(Requests(), whole)[-1][0], np.float32).tolist() == [1.0, 2.0]


def test_metadata_may_ask_for_the_version_with_a_share_or_for_the_others() -> None:
    async def test(client: H2Client, peer: Peer) -> None:
        rig = client.rig
        found: list[str | None] = []

        def find(name: str, version: str | None) -> Any:
            found.append(version)
            return rig.route

        rig.find = find  # type: ignore[method-assign]
        always, never = {"x-overcommit-canary": "always"}, {"x-overcommit-canary": "never"}
        client.call(request([1.0]), **always)
        client.call(request([1.0]), **never)
        client.call(request([1.0]))
        client.call(request([1.0], model_version="1"), **always)
        assert found == [CANARY, STABLE, None, "1"]
        stream = client.open(STREAM, **always)
        rig.plans.serving.clear()
        client.data(stream, framed(request([1.0])))
        assert found[-1] == CANARY

    run(test)
