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
from overcommit.runtime.errors import BadRequest, WorkerLost
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.sequence_terms import ASK_BYTES, ASK_ROOM_BYTES, Ask, decode
from overcommit.server import codec, sequences
from overcommit.server.sequences import Tracks, can_go_on, read

START, NEXT, END = Ask(1, is_start=True), Ask(1), Ask(1, is_end=True)


@dataclass
class Link:
    key: int
    is_broken: bool = False


@dataclass
class Pending:
    route: Route


PENDING: Any = Pending(Route(slot=3, name="m", version="1", state="ready", sequence=True))


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
    assert tracks.link_for(PENDING, START, both).key >> 16 == seat  # type: ignore[union-attr]
    there = {key: link for key, link in both.items() if key >> 16 != seat}
    fresh = Tracks(2)
    assert fresh.link_for(PENDING, START, there) is None, "held until somebody sits there"
    assert fresh.link_for(PENDING, NEXT, there) is None, "behind its START"
    assert fresh.link_for(PENDING, NEXT, both) is not None


def test_after_the_workers_death_the_next_request_is_told_and_a_start_begins_anew() -> None:
    tracks = Tracks(1)
    assert tracks.link_for(PENDING, START, links(1)) is not None
    with pytest.raises(WorkerLost, match="sequence 1 is lost"):
        tracks.link_for(PENDING, NEXT, {})
    assert tracks.link_for(PENDING, START, links(2)) is not None
    assert tracks.link_for(PENDING, NEXT, links(2)) is not None
    with pytest.raises(WorkerLost):
        tracks.link_for(PENDING, END, links(3))


def test_a_sequence_that_ended_is_forgotten() -> None:
    tracks = Tracks(1)
    tracks.link_for(PENDING, START, links(1))
    tracks.link_for(PENDING, END, links(1))
    assert len(tracks) == 0


def test_so_many_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "SEQUENCES_KNOWN_MAX", 2)
    tracks = Tracks(1)
    for key in (1, 2, 3):
        tracks.link_for(PENDING, Ask(key, is_start=True), links(1))
    assert len(tracks) == 2
    assert tracks.link_for(PENDING, Ask(1), links(2)) is not None, "its worker will say so"


def test_of_a_dead_workers_requests_those_from_a_start_on_can_go_on() -> None:
    other = Ask(2)
    asks = [NEXT, END, START, other, NEXT, START._replace(is_again=True)]
    assert can_go_on((3, ask) for ask in asks) == [False, False, True, False, True, False]
    assert can_go_on([(3, START), (4, NEXT)]) == [True, False], "another version's"


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
        world.rig.dispatch.link_down(0, 1)
        assert world.statuses() == [[200], [502], [], []]
        world.peer = Peer(world.rig, 0, 2)
        taken = world.peer.take()
        assert [world.asked(each) for each in taken] == [
            (2, True, False, False),
            (2, False, False, False),
        ]
        for each in taken:
            world.peer.answer(each)
        world.rig.dispatch.drain()
        assert world.statuses() == [[200], [502], [200], [200]]
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
