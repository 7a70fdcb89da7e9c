"""Workers that break the rules of their rings: what they cost is their own requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_rig
import msgspec
import numpy as np
from front_end_rig import HEAD, Client, Peer, Rig, answers, body, in_loop, request
from serving import Server, is_alive

from overcommit.runtime import _shm, payload
from overcommit.server.worker_link import incarnation_of, link_key

TOO_MUCH = 1 << 20


def asked(rig: Rig, peer: Peer, count: int) -> tuple[list[Client], list[Any]]:
    """Clients that have asked, each once, and what the worker has got of them."""
    clients = [rig.connect() for _ in range(count)]
    for client in clients:
        client.send(request(body(1.0)))
    return clients, peer.take()


def given_to_next(rig: Rig, clients: list[Client]) -> list[int]:
    """What the clients get when the next worker has answered what is left."""
    assert not rig.dispatch.links
    after = Peer(rig, 0, 2)
    while after.answer_all():
        pass
    assert rig.is_empty()
    return [answers(client.written)[0][0] for client in clients]


def test_who_lies_is_reported_once_and_its_ring_is_not_looked_at_any_more() -> None:
    def test() -> None:
        rig = Rig()
        broken: list[int] = []
        rig.dispatch.on_broken = broken.append
        peer = Peer(rig, 3, 7)
        _, (first, second, _) = asked(rig, peer, 3)
        peer.answer(first, length=TOO_MUCH)
        rig.dispatch.drain()
        peer.answer(second)
        rig.dispatch.drain()
        assert [incarnation_of(key) for key in broken] == [(3, 7)]
        assert _shm.arm(rig.dispatch.rings()), "nothing is left that anybody would read"

    in_loop(test)


def test_what_a_liar_had_goes_to_the_next_worker_when_it_is_dead() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        clients, (first, second, third) = asked(rig, peer, 3)
        peer.answer(first, length=TOO_MUCH)
        peer.answer(second)
        rig.dispatch.drain()
        peer.answer(third, length=TOO_MUCH)
        rig.dispatch.link_down(0, 1)
        assert given_to_next(rig, clients) == [500, 200, 200]

    in_loop(test)


def test_a_last_lie_of_a_dead_worker_does_no_harm() -> None:
    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        clients, (first, _) = asked(rig, peer, 2)
        peer.answer(first, length=TOO_MUCH)
        rig.dispatch.link_down(0, 1)
        assert given_to_next(rig, clients) == [500, 200]

    in_loop(test)


def test_an_answer_that_cannot_be_read_is_its_clients_trouble() -> None:
    def test() -> None:
        rig = Rig()
        peer, client = Peer(rig, 0, 1), rig.connect()
        x = np.float32([[1, 2]])
        tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.tobytes()}
        content = msgspec.msgpack.encode({"inputs": [tensor]})
        head = HEAD + b"Content-Type: application/msgpack\r\n"
        client.send(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        request_id, _, _, _, out_offset, *_ = peer.take()[0]
        places, total = payload.plan([(5, "FP32", 8, (1, 2))])  # the model has one output
        payload.encode(rig.egress[out_offset : out_offset + total], places)
        peer.completions.push(request_id, 1, 2, 3, total, _shm.OK, 1, 0)
        rig.dispatch.drain()
        assert client.written.startswith(b"HTTP/1.1 500 ")
        assert rig.is_empty()

    in_loop(test)


def test_the_name_of_an_incarnation_says_whose_it_is() -> None:
    assert incarnation_of(link_key(200, 65_535)) == (200, 65_535)


SCRIBBLER = """
import ctypes, threading, time, torch

def scribble(seconds):
    # What a stray pointer of native code may do: write over the ring by which answers leave.
    until = time.monotonic() + seconds
    maps = [line.split() for line in open("/proc/self/maps") if "memfd:overcommit-link" in line]
    tails = []
    for line in maps:
        start, end = (int(each, 16) for each in line[0].split("-"))
        second = ctypes.string_at(start, end - start).find(ctypes.string_at(start, 4), 4)
        tails.append(start + second + 128)
    while time.monotonic() < until:
        for tail in tails:
            ctypes.memset(tail, 0xEE, 8)

class Scribbler(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x):
        if (x > 100).any():
            threading.Thread(target=scribble, args=(20,), daemon=True).start()
            time.sleep(0.1)
        return {"y": x}
"""


def test_a_worker_whose_ring_is_written_over_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / "models"
    model_rig.add_model(root, "scribbler", SCRIBBLER, {"x": "FP32"})
    model_rig.add_model(root, "echo", model_rig.ECHO, {"x": "FP32"})
    with Server(root, cache=tmp_path / "cache", flags=("--allow-code",)) as server:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}
        (liar,) = server.pids("worker")
        server.post("/v2/models/scribbler/infer", {"inputs": [{**tensor, "data": [500.0]}]})

        def is_found() -> bool:
            # What is written over at times is right again at others: it takes some answers.
            server.post("/v2/models/echo/infer", {"inputs": [tensor]})
            return any("broke the rules of its ring: killed" in line for line in server.log)

        server.wait_until(is_found)
        server.wait_until(lambda: not is_alive(liar))
        server.wait_until(
            lambda: server.post("/v2/models/echo/infer", {"inputs": [tensor]}).status == 200
        )
