"""Requests at a worker that is occupied by one batch: others answer them, each once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from front_end_rig import HEAD, ROUTE, Client, Peer, Rig, answers, body, in_loop, numbers

from overcommit.runtime import _shm
from overcommit.runtime.front_end_messages import Occupied, Route, SeatNews
from overcommit.server import detours

HUNG = 3  # the slot of "m"
MODELS = 12


class World:
    """A front end with some models, and two workers; "m" hangs in the batch of `stuck`."""

    def __init__(self) -> None:
        self.rig = Many()
        self.peers = [Peer(self.rig, seat, 1) for seat in (0, 1)]
        self.hung = self.rig.ask("m", 1.0)
        taken = {peer.seat: peer.take() for peer in self.peers}
        self.stuck = next(peer for peer in self.peers if taken[peer.seat])
        self.free = next(peer for peer in self.peers if peer is not self.stuck)
        (self.submission,) = taken[self.stuck.seat]
        self.stuck.status.begin(HUNG, _shm.PHASE_COMPUTE, 1, [self.submission[0]])

    def hear(self, *peers: Peer, slot: int = HUNG) -> None:
        occupied = tuple(Occupied(peer.seat, peer.epoch, slot) for peer in peers)
        self.rig.dispatch.hear(SeatNews(occupied=occupied))

    def go_on(self) -> None:
        """The worker's batch has ended."""
        self.stuck.status.end()
        self.stuck.answer(self.submission)
        self.cancelled = self.stuck.submissions.pop(99)
        for each in self.cancelled:
            if each[7] == _shm.SUBMIT:
                self.stuck.answer(each)
        self.rig.dispatch.drain()

    def ask_all(self) -> list[Client]:
        """Ask every model but "m", each with its number."""
        return [self.rig.ask(f"other-{number}", float(number)) for number in range(MODELS)]


class Many(Rig):
    """A front end that knows several models."""

    def __init__(self) -> None:
        super().__init__()
        others = [
            msgspec.structs.replace(ROUTE, slot=10 + number, name=f"other-{number}")
            for number in range(MODELS)
        ]
        self._routes = {route.name: route for route in (ROUTE, *others)}

    def find(self, name: str, version: str | None) -> Route:
        return self._routes[name]

    def ask(self, name: str, value: float) -> Client:
        content = body(value)
        client = self.connect()
        head = HEAD.replace(b"/m/", b"/%s/" % name.encode())
        client.send(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        return client


def got(clients: list[Client]) -> list[list[list[float]]]:
    """What each client was answered, all of it."""
    return [[numbers(each) for each in answers(client.written)] for client in clients]


EACH_ONCE = [[[2.0 * number]] for number in range(MODELS)]


@contextlib.contextmanager
def a_world() -> Iterator[World]:
    world = World()
    yield world
    world.go_on()
    assert got([world.hung])[0][0] == [2.0]
    assert world.rig.is_empty()


def test_what_comes_while_a_worker_is_occupied_goes_to_the_other() -> None:
    def test() -> None:
        with a_world() as world:
            world.hear(world.stuck)
            clients = world.ask_all()
            assert world.free.answer_all() == MODELS
            assert got(clients) == EACH_ONCE
            world.hear()
            clients = world.ask_all()
            assert 0 < world.free.answer_all() < MODELS, "its own come back to it"
        assert got(clients) == EACH_ONCE

    in_loop(test)


def test_what_waits_there_already_is_answered_by_the_other_and_once() -> None:
    def test() -> None:
        with a_world() as world:
            clients = world.ask_all()
            before = world.free.answer_all()
            assert before < MODELS
            world.hear(world.stuck)
            assert world.free.answer_all() == MODELS - before
            assert got(clients) == EACH_ONCE
        kinds = [each[7] for each in world.cancelled]
        assert kinds.count(_shm.CANCEL) == kinds.count(_shm.SUBMIT) == MODELS - before
        assert got(clients) == EACH_ONCE, "the late answers are nobody's"
        assert world.rig.dispatch.late == MODELS - before

    in_loop(test)


def test_if_it_goes_on_before_the_other_has_answered_its_answer_is_late_all_the_same() -> None:
    def test() -> None:
        world = World()
        clients = world.ask_all()
        world.hear(world.stuck)
        world.go_on()
        assert [len(each) for each in got(clients)] == [0] * MODELS
        assert world.free.answer_all() == MODELS
        assert got(clients) == EACH_ONCE
        assert world.rig.is_empty()

    in_loop(test)


def test_what_is_for_the_version_of_its_batch_stays_and_keeps_going_there() -> None:
    def test() -> None:
        with a_world() as world:
            clients = [world.rig.ask("m", 7.0)]
            world.hear(world.stuck)
            clients += [world.rig.ask("m", 7.0) for _ in range(3)]
            assert world.free.answer_all() == 0
        assert got(clients) == [[[14.0]]] * 4

    in_loop(test)


def test_where_all_are_occupied_nothing_moves() -> None:
    def test() -> None:
        with a_world() as world:
            clients = world.ask_all()
            world.hear(world.stuck, world.free)
            there = world.free.answer_all()
            assert 0 < there < MODELS
        assert got(clients) == EACH_ONCE

    in_loop(test)


def test_a_request_makes_one_detour_and_no_more() -> None:
    def test() -> None:
        with a_world() as world:
            clients = world.ask_all()
            own = world.free.take()
            world.hear(world.stuck)
            came = world.free.take()
            assert len(own) + len(came) == MODELS
            world.free.status.begin(10, _shm.PHASE_COMPUTE, 1, [])
            world.hear(world.free, slot=10)
            goes = [each for each in own if each[8] != 10]
            there = [each for each in world.stuck.submissions.pop(99) if each[7] == _shm.SUBMIT]
            assert sorted(each[8] for each in there) == sorted(each[8] for each in came + goes)
            world.free.status.end()
            for peer, mine in ((world.stuck, there), (world.free, own + came)):
                for each in mine:
                    peer.answer(each)
            world.rig.dispatch.drain()
            assert got(clients) == EACH_ONCE

    in_loop(test)


def test_who_leaves_on_a_detour_is_cancelled_where_it_is() -> None:
    def test() -> None:
        with a_world() as world:
            clients = world.ask_all()
            world.free.answer_all()
            world.hear(world.stuck)
            came = {each[0] for each in world.free.take()}
            for client in clients:
                client.lose()
            cancels = world.free.submissions.pop(99)
            assert {each[0] for each in cancels if each[7] == _shm.CANCEL} == came
            for each in world.free.taken:
                if each[0] in came:
                    world.free.answer(each)

    in_loop(test)


def test_who_has_left_makes_none() -> None:
    def test() -> None:
        with a_world() as world:
            clients = world.ask_all()
            before = world.free.answer_all()
            for client in clients:
                client.lose()
            world.hear(world.stuck)
            assert before < MODELS
            assert world.free.answer_all() == 0

    in_loop(test)


@pytest.mark.parametrize("count", [0, 1])
def test_what_is_beyond_the_limit_of_bytes_waits_where_it_is(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def test() -> None:
        with a_world() as world:
            nbytes = world.submission[5]
            monkeypatch.setattr(detours, "DETOUR_BYTES_MAX", count * nbytes + nbytes // 2)
            clients = world.ask_all()
            assert world.free.answer_all() < MODELS - count
            world.hear(world.stuck)
            assert world.free.answer_all() == count
        assert got(clients) == EACH_ONCE

    in_loop(test)


def test_where_memory_is_full_a_request_waits_where_it_is() -> None:
    def test() -> None:
        with a_world() as world:
            clients = world.ask_all()
            assert world.free.answer_all() < MODELS
            egress, took = world.rig.dispatch.parcels.egress, []
            world.rig.dispatch.parcels._release_idle()
            while (block := egress.try_reserve(1)) is not None:
                took.append(block[0])
            world.hear(world.stuck)
            for offset in took:
                egress.release(offset)
            assert world.free.answer_all() == 0
        assert got(clients) == EACH_ONCE

    in_loop(test)


def test_the_death_of_a_worker_that_was_occupied_costs_no_answer() -> None:
    def test() -> None:
        world = World()
        clients: list[Any] = world.ask_all()
        world.hear(world.stuck)
        world.rig.dispatch.link_down(world.stuck.seat, world.stuck.epoch)
        assert world.free.answer_all() == MODELS + 1
        assert got([world.hung, *clients]) == [[[2.0]], *EACH_ONCE]
        assert world.rig.is_empty()

    in_loop(test)
