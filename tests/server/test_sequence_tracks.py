"""Which worker a sequence goes to, and what a front end says when that worker is gone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from front_end_rig import ROUTE, Client, Peer, Rig, in_loop
from tests.server.test_front_end import HEAD, answers

from overcommit.runtime import _shm
from overcommit.runtime.errors import BadRequest
from overcommit.runtime.front_end_messages import SeatNews
from overcommit.runtime.sequence_terms import ASK_BYTES, ASK_ROOM_BYTES, Ask, decode
from overcommit.server import codec, sequences
from overcommit.server.sequences import Tracks, can_go_on, read

START, NEXT, END = Ask(1, is_start=True), Ask(1), Ask(1, is_end=True)


@dataclass
class Link:
    key: int
    is_broken: bool = False


def links(*keys: int) -> Any:
    return {key: Link(key) for key in keys}


def ask(**parameters: Any) -> Ask:
    raw = {name: msgspec.Raw(codec.encode(value)) for name, value in parameters.items()}
    return read(raw, "m")._replace(sent_ns=0)


def test_all_front_ends_find_the_same_seat_and_sequences_are_spread() -> None:
    one, other = Tracks(4), Tracks(4)
    seats = [one.seat_of(3, key) for key in range(1, 401)]
    assert seats == [other.seat_of(3, key) for key in range(1, 401)]
    assert all(60 < seats.count(seat) < 140 for seat in range(4))


def test_a_sequence_goes_to_its_seat_alone() -> None:
    tracks = Tracks(2)
    seat = tracks.seat_of(3, 1)
    both = links(1, 1 << 16 | 1)
    link = tracks.link_for(3, 1, both)
    assert link is not None
    assert link.key >> 16 == seat
    there = {key: link for key, link in both.items() if key >> 16 != seat}
    assert tracks.link_for(3, 1, there) is None, "held until somebody sits there"
    both[link.key].is_broken = True
    assert tracks.link_for(3, 1, both) is None


def test_a_broken_seats_sequences_are_spread_over_the_others_and_those_stay() -> None:
    tracks, whole = Tracks(3, lambda slot: 1), Tracks(3, lambda slot: 1)
    tracks.broken = frozenset({4})
    keys = range(1, 301)
    moved = [tracks.seat_of(3, key) for key in keys if whole.seat_of(3, key) == 4]
    assert set(moved) == {3, 5}
    assert all(
        tracks.seat_of(3, key) == whole.seat_of(3, key)
        for key in keys
        if whole.seat_of(3, key) != 4
    )
    tracks.broken = frozenset({3, 4, 5})
    assert tracks.seat_of(3, 1) == whole.seat_of(3, 1)


def test_of_a_dead_workers_requests_those_from_a_start_on_can_go_on() -> None:
    other = Ask(2)
    asks = [NEXT, END, START, other, NEXT, START._replace(is_again=True)]
    verdicts = [False, False, True, False, True, False]
    assert can_go_on((3, ask, True) for ask in asks) == verdicts
    assert can_go_on([(3, START, True), (4, NEXT, True)]) == [True, False], "another version's"


def test_what_a_dead_worker_never_saw_is_for_the_next_one_to_judge() -> None:
    again = NEXT._replace(is_again=True)
    asks = [(3, NEXT, True), (3, NEXT, False), (3, again, False)]
    assert can_go_on(asks) == [False, True, False]


def test_parameters_are_read() -> None:
    assert ask(sequence_id=7) == Ask(7)
    assert ask(sequence_id="7", sequence_start=True, sequence_end=False) == Ask("7", is_start=True)
    assert sequences.read_if_any(None) is None
    again = sequences.parameters_of(Ask("x", is_end=True))
    assert read(again, "m")._replace(sent_ns=0) == Ask("x", is_end=True)
    for wrong in (1.0, True, None, [1], {"a": 1}, -1, 2**64):
        with pytest.raises(BadRequest, match="Unable to parse 'sequence_id'"):
            ask(sequence_id=wrong)


# --- through a front end ------------------------------------------------------------------------
SEQUENCE_ROUTE = msgspec.structs.replace(ROUTE, sequence=True)


class World:
    """A front end with one worker, and a client that speaks of sequences."""

    def __init__(self) -> None:
        self.rig = Rig(SEQUENCE_ROUTE)
        self.peer = Peer(self.rig, 0, 1)
        self.clients: list[Client] = []

    def send(self, key: int, value: float, **flags: bool) -> None:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}
        parameters = {"sequence_id": key} | {
            f"sequence_{name}": flag for name, flag in flags.items()
        }
        text = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
        client = self.rig.connect()
        client.send(HEAD + b"Content-Length: %d\r\n\r\n" % len(text) + text)
        self.clients.append(client)

    def asked(self, submission: Any) -> tuple[Any, ...]:
        """What a submission says of its sequence."""
        in_offset, in_length = submission[3], submission[5]
        block = self.rig.ingress[in_offset : in_offset + in_length]
        return decode(block[in_length - ASK_ROOM_BYTES :][:ASK_BYTES])[:4]

    def statuses(self) -> list[list[int]]:
        """Of what each client got so far."""
        return [[status for status, _ in answers(client.written)] for client in self.clients]


def test_what_waits_for_a_dead_worker_goes_on_with_its_start_or_is_lost() -> None:
    def test() -> None:
        world = World()
        world.send(1, 1, start=True)
        world.peer.answer_all()
        world.send(1, 2)  # the dead worker knew what came before it
        world.send(2, 3, start=True)
        world.send(2, 4)
        world.peer.take()
        world.send(1, 5)
        world.rig.dispatch.link_down(0, 1)
        assert world.statuses() == [[200], [502], [], [], []]
        world.peer = Peer(world.rig, 0, 2)
        taken = world.peer.take()
        assert [world.asked(each) for each in taken] == [
            (2, True, False, False),
            (2, False, False, False),
            (1, False, False, False),
        ]
        for each in taken:
            world.peer.answer(each)
        world.rig.dispatch.drain()
        assert world.statuses() == [[200], [502], [200], [200], [200]]
        assert world.rig.is_empty()

    in_loop(test)


def test_a_sequence_that_was_begun_again_through_another_front_end_is_not_lost() -> None:
    def test() -> None:
        world = World()
        world.send(1, 1, start=True)
        world.peer.answer_all()
        world.rig.dispatch.link_down(0, 1)
        world.send(1, 2)  # its START went to the successor, by another way
        assert world.statuses() == [[200], []]
        world.peer = Peer(world.rig, 0, 2)
        assert world.peer.answer_all() == 1
        world.send(1, 3, end=True)
        assert world.peer.answer_all() == 1
        assert world.statuses() == [[200], [200], [200]]
        assert world.rig.is_empty()

    in_loop(test)


def test_an_answer_that_did_not_fit_is_asked_for_again_and_not_computed_again() -> None:
    def test() -> None:
        world = World()
        world.send(1, 1, start=True, end=True)
        (first,) = world.peer.take()
        world.peer.completions.push(first[0], 1, 2, 3, 0, _shm.TOO_LARGE, 1, 5000)
        world.rig.dispatch.drain()
        (second,) = world.peer.take()
        assert second[0] == first[0]
        assert world.asked(second) == (1, True, True, True)
        world.peer.answer(second)
        world.rig.dispatch.drain()
        assert world.statuses() == [[200]]
        assert world.rig.is_empty()

    in_loop(test)


def test_requests_of_a_seat_that_is_empty_are_held_until_somebody_sits_there() -> None:
    def test() -> None:
        world = World()
        world.rig.dispatch.link_down(0, 1)
        world.send(7, 1, start=True)
        world.send(7, 2, end=True)
        assert world.statuses() == [[], []]
        world.peer = Peer(world.rig, 0, 2)
        assert world.peer.answer_all() == 2
        assert world.statuses() == [[200], [200]]
        world.send(7, 2)
        assert world.peer.answer_all() == 1, "its worker says that it must begin with a START"

    in_loop(test)


def test_requests_of_a_seat_that_broke_for_good_go_to_another() -> None:
    def test() -> None:
        world = World()
        world.rig.dispatch.tracks = tracks = Tracks(2)
        key = next(key for key in range(1, 99) if tracks.seat_of(3, key) == 1)
        world.send(key, 1, start=True)
        assert world.peer.answer_all() == 0
        world.rig.dispatch.hear(SeatNews(broken=(1,)))
        assert world.peer.answer_all() == 1
        assert world.statuses() == [[200]]

    in_loop(test)
