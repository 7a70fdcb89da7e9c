"""Long JSON bodies: another thread reads them as the loop would, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from front_end_rig import ROUTE, Client, Peer, Rig, answers, body, request

from overcommit.runtime.errors import OvercommitError
from overcommit.server import inference, long_bodies
from overcommit.server.limits import DECODE_HERE_BYTES, DECODE_PIECE_BYTES
from overcommit.server.plans import Plans

COUNT = 70_000
NUMBERS = [1 / (number + 3) for number in range(COUNT)]  # about 20 characters each


def tensor(data: Any, datatype: str = "FP32", shape: list[int] | None = None, **more: Any) -> bytes:
    item = {"name": "x", "datatype": datatype, "shape": shape or [1, COUNT], "data": data}
    return json.dumps({"inputs": [item | more]}).encode()


BODIES = {
    "flat": tensor(NUMBERS),
    "nested": tensor([NUMBERS]),
    "two rows": tensor([NUMBERS[: COUNT // 2], NUMBERS[COUNT // 2 :]], shape=[2, COUNT // 2]),
    "short": tensor([1, 2], shape=[1, 2]),
    "wrong nesting": tensor([[number] for number in NUMBERS]),
    "too deep": tensor([[NUMBERS]]),
    "too few": tensor(NUMBERS[1:]),
    "a text at the end": tensor([*NUMBERS[1:], "a"]),
    "a list at the end": tensor([*NUMBERS[1:], [1, 2]]),
    "another datatype": tensor([1] * COUNT * 5, "INT32"),
    "no datatype": tensor([1] * COUNT * 5, "INT31"),
    "texts": tensor(["[,]"] * COUNT * 4, "BYTES"),
    "binary": tensor(NUMBERS, parameters={"binary_data_size": 4}),
    "another name": tensor(NUMBERS, name="y"),
    "no JSON": tensor(NUMBERS)[:-1],
    "no request": b"[%b]" % tensor(NUMBERS),
}


def outcome(prepare: Callable[..., Any], text: bytes) -> Any:
    try:
        prepared, data = prepare(Plans().of(ROUTE), text, None)
    except OvercommitError as error:
        return type(error), error.message.split(" - at")[0].split(": Expected")[0]
    return prepared.plan.places, [bytes(each) for each in data]


@pytest.mark.parametrize("name", BODIES)
def test_another_thread_reads_what_the_loop_would(name: str) -> None:
    text = BODIES[name]
    assert len(text) > DECODE_PIECE_BYTES * 3 or name == "short"
    expected = outcome(inference.prepare, text)
    if name == "a list at the end":  # cut in the middle of a list, it is no JSON
        assert outcome(long_bodies.Decoded(text).prepare, text)[0] is expected[0]
        return
    assert outcome(long_bodies.Decoded(text).prepare, text) == expected


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """The thread waits for this."""
    event = threading.Event()
    long_bodies.THREAD.submit(event.wait)
    yield event
    event.set()


def run(test: Callable[[Rig, Peer], Any]) -> None:
    async def go() -> None:
        rig = Rig()
        await test(rig, Peer(rig, 0, 1))
        assert rig.is_empty()

    asyncio.run(go())


async def decoded() -> None:
    """Wait until the thread has done what it was given, and the loop has heard of it."""
    await asyncio.get_running_loop().run_in_executor(long_bodies.THREAD, int)
    await asyncio.sleep(0)


def test_others_are_answered_while_a_long_body_is_decoded(held: threading.Event) -> None:
    async def test(rig: Rig, peer: Peer) -> None:
        first, second = rig.connect(), rig.connect()
        assert len(BODIES["flat"]) > DECODE_HERE_BYTES
        first.send(request(BODIES["flat"]) + request(body(7.0)))
        second.send(request(body(1.0)))
        peer.answer_all()
        assert len(answers(second.written)) == 1
        assert not first.written
        held.set()
        await decoded()
        peer.answer_all()
        peer.answer_all()
        long, short = answers(first.written)
        found = np.array(long[1]["outputs"][0]["data"], np.float32)
        assert (found == 2 * np.array(NUMBERS, np.float32)).all()
        assert short[1]["outputs"][0]["data"] == [14.0]

    run(test)


def test_a_client_that_leaves_while_its_body_is_decoded_leaves_nothing(
    held: threading.Event,
) -> None:
    async def test(rig: Rig, peer: Peer) -> None:
        client: Client = rig.connect()
        client.send(request(BODIES["flat"]))
        client.lose()
        held.set()
        await decoded()
        assert not rig.dispatch.pending

    run(test)


def test_what_is_wrong_with_a_long_body_is_said(held: threading.Event) -> None:
    async def test(rig: Rig, peer: Peer) -> None:
        client = rig.connect()
        client.send(request(BODIES["wrong nesting"]))
        held.set()
        await decoded()
        ((status, text),) = answers(client.written)
        assert status == 400
        assert "nested data does not have the shape" in text["error"]

    run(test)
