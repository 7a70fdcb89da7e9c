"""More requests than a worker has places for: held back in order, handed over as places come free."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from front_end_rig import HEAD, ROUTE, Client, Peer, Rig, answers, body, in_loop, numbers

from overcommit.runtime import _shm
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.lanes import LEVEL_SHIFT

OTHER = msgspec.structs.replace(ROUTE, slot=4, name="other")
SLOTS = 16  # 8 places for requests: 4 of one model, if nobody else is there


class Routes(Rig):
    """A front end that knows several models."""

    def __init__(self, *routes: Route) -> None:
        super().__init__(routes[0])
        self._routes = {route.name: route for route in routes}

    def find(self, name: str, version: str | None) -> Route:
        return self._routes[name]

    def ask(self, value: float, name: str = "m", **parameters: Any) -> Client:
        content = body(value)
        if parameters:
            said = msgspec.json.decode(content) | {"parameters": parameters}
            content = msgspec.json.encode(said)
        client = self.connect()
        head = HEAD.replace(b"/m/", b"/%s/" % name.encode())
        client.send(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        return client


def slots_of(taken: list[Any]) -> list[int]:
    return [each[8] for each in taken]


def test_a_burst_is_held_in_order_and_refused_by_nobody() -> None:
    def test() -> None:
        rig = Routes(ROUTE)
        peer = Peer(rig, 0, 1, slots=SLOTS)
        clients = [rig.ask(float(number)) for number in range(30)]
        assert len(rig.dispatch.pending) == 30
        while peer.answer_all():
            done = [bool(client.written) for client in clients]
            assert done == sorted(done, reverse=True), "who came first is answered first"
        expected = [[2.0 * number] for number in range(30)]
        assert [numbers(answers(client.written)[0]) for client in clients] == expected
        assert rig.is_empty()

    in_loop(test)


def test_who_comes_later_does_not_overtake() -> None:
    def test() -> None:
        rig = Routes(ROUTE)
        peer = Peer(rig, 0, 1, slots=SLOTS)
        clients = [rig.ask(float(number)) for number in range(6)]
        for submission in peer.take():
            peer.answer(submission)
        rig.dispatch.drain()
        clients += [rig.ask(float(number)) for number in (6, 7, 8)]
        order = []
        while peer.answer_all():
            order += [each for each in clients if each.written and each not in order]
        assert order == clients

    in_loop(test)


def test_a_flood_leaves_places_to_other_models() -> None:
    def test() -> None:
        third = msgspec.structs.replace(ROUTE, slot=5, name="third")
        rig = Routes(ROUTE, OTHER, third)
        peer = Peer(rig, 0, 1, slots=SLOTS)
        for _ in range(20):
            rig.ask(1.0)
        for _ in range(20):
            rig.ask(1.0, "other")
        rig.ask(1.0, "third")
        assert slots_of(peer.take()) == [3] * 4 + [4] * 2 + [5]

    in_loop(test)


def test_models_that_are_held_have_turns() -> None:
    def test() -> None:
        rig = Routes(ROUTE, OTHER)
        peer = Peer(rig, 0, 1, slots=4)  # two places
        for name in ("m", "m", "m", "other", "other", "other"):
            rig.ask(1.0, name)
        seen = []
        while taken := peer.take():
            seen += slots_of(taken)
            for submission in taken:
                peer.answer(submission)
            rig.dispatch.drain()
        assert sorted(seen) == [3] * 3 + [4] * 3
        assert seen.index(4) < 3, "one flood does not wait for the end of the other"
        assert rig.is_empty()

    in_loop(test)


def test_beyond_max_queue_size_the_refusal_names_model_limit_and_remedy() -> None:
    def test() -> None:
        rig = Routes(msgspec.structs.replace(ROUTE, max_queue_size=6))
        peer = Peer(rig, 0, 1, slots=SLOTS)
        clients = [rig.ask(1.0) for _ in range(7)]
        ((status, content),) = answers(clients[-1].written)
        assert status == 503
        assert b"retry-after: 1" in clients[-1].written.lower()
        for word in ("model 'm'", "6 requests", "max_queue_size", "add workers"):
            assert word in content["error"]
        assert not any(client.written for client in clients[:-1])
        while peer.answer_all():
            pass
        assert numbers(answers(clients[5].written)[0]) == [2.0]
        assert rig.is_empty()

    in_loop(test)


def test_what_is_held_ends_with_its_time_or_its_client() -> None:
    def test() -> None:
        rig = Routes(ROUTE)
        Peer(rig, 0, 1, slots=SLOTS)
        clients = [rig.ask(1.0) for _ in range(8)]
        clients[7].lose()
        assert len(rig.dispatch.pending) == 7
        rig.dispatch.expire(time.monotonic_ns() + 61_000_000_000)
        assert {answers(client.written)[0][0] for client in clients[:7]} == {504}
        assert len(rig.dispatch.pending) == 4, "what is lent comes back with its completion"

    in_loop(test)


def test_what_is_held_moves_on_when_its_worker_dies() -> None:
    def test() -> None:
        rig = Routes(ROUTE)
        Peer(rig, 0, 1, slots=SLOTS)
        clients = [rig.ask(float(number)) for number in range(12)]
        rig.dispatch.link_down(0, 1)
        second = Peer(rig, 0, 2, slots=SLOTS)
        while second.answer_all():
            pass
        assert all(answers(client.written)[0][0] == 200 for client in clients)
        assert rig.is_empty()

    in_loop(test)


def test_the_most_urgent_of_those_that_are_held_goes_first() -> None:
    def test() -> None:
        rig = Routes(msgspec.structs.replace(ROUTE, priority_levels=3))
        peer = Peer(rig, 0, 1, slots=SLOTS)
        for level in (0, 0, 0, 0, 0, 3, 2, 1, 1):
            rig.ask(1.0, **({"priority": level} if level else {}))
        first = peer.take()
        for submission in first:
            peer.answer(submission)
        rig.dispatch.drain()
        assert [each[9] >> LEVEL_SHIFT for each in peer.take()] == [1, 1, 2, 0]

    in_loop(test)


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_of_a_sequence_stay_in_order(workers: int) -> None:
    def test() -> None:
        rig = Routes(msgspec.structs.replace(ROUTE, sequence=True))
        rig.dispatch.tracks._seats = workers
        peers = [Peer(rig, seat, 1, slots=SLOTS) for seat in range(workers)]
        clients = {
            key: [
                rig.ask(float(n), sequence_id=key, sequence_start=n == 0, sequence_end=False)
                for n in range(5)
            ]
            for key in range(1, 9)
        }
        while sum(peer.answer_all() for peer in peers):
            for mine in clients.values():
                done = [bool(client.written) for client in mine]
                assert done == sorted(done, reverse=True)
        assert all(numbers(answers(c.written)[0]) for mine in clients.values() for c in mine[1:])
        assert rig.is_empty()

    in_loop(test)


def test_a_ring_full_of_cancels_refuses_nobody() -> None:
    def test() -> None:
        rig = Routes(ROUTE)
        peer = Peer(rig, 0, 1, slots=SLOTS)
        link = next(iter(rig.dispatch.links.values()))
        while link.submissions.push(1, 0, 0, 0, 0, 0, _shm.CANCEL, 3, 0):
            pass
        client = rig.ask(1.0)
        assert not client.written
        assert not peer.take()
        rig.dispatch.expire(time.monotonic_ns())
        assert peer.answer_all() == 1
        assert numbers(answers(client.written)[0]) == [2.0]
        assert rig.is_empty()

    in_loop(test)


def test_a_full_lane_is_refused_with_the_time_of_its_batches() -> None:
    def test() -> None:
        rig = Routes(msgspec.structs.replace(ROUTE, max_queue_size=6))
        peer = Peer(rig, 0, 1, slots=SLOTS)
        client = rig.ask(1.0)
        (submission,) = peer.take()
        peer.completions.push(submission[0], 1, 2, 3, 0, _shm.OVERLOADED, 1, 2500)
        rig.dispatch.drain()
        ((status, content),) = answers(client.written)
        assert status == 503
        assert b"retry-after-ms: 2500" in client.written.lower()
        assert "model 'm': 6 requests for it wait, its max_queue_size" in content["error"]

    in_loop(test)
