"""What front ends are told, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from overcommit.runtime.announcer import REMOVED_MAX, SAY_NS, Announcer, route_messages
from overcommit.runtime.config import CONTROL_MESSAGE_BYTES_MAX, VERSIONS_MAX, ModelConfig
from overcommit.runtime.control import encoded_bytes
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.front_end_messages import Route, Routes


class Front:
    """A front end that keeps what it is told."""

    def __init__(self, index: int = 0) -> None:
        self.incarnation = (index, 1)
        self.told: list[Routes] = []

    def post(self, message: Routes) -> None:
        self.told.append(message)

    def slots(self) -> list[int]:
        return [route.slot for message in self.told for route in message.upsert]


def fleet(*fronts: Front) -> Any:
    return cast(Any, SimpleNamespace(of_kind=lambda kind, ready: iter(fronts)))


def entry(slot: int, state: State = State.READY) -> Entry:
    return Entry(slot, f"m{slot}", "1", f"/m{slot}", "f", ModelConfig(), state)


def test_a_new_front_end_gets_the_whole_table_once() -> None:
    front = Front()
    announcer = Announcer(fleet(front))
    for _ in range(2):
        announcer.tell_new([entry(1), entry(2)])
    assert front.slots() == [1, 2]
    assert front.told[-1].complete


def test_who_has_no_table_yet_hears_of_no_change() -> None:
    front = Front()
    announcer = Announcer(fleet(front))
    announcer.say([entry(1)], (), 0)
    assert front.told == []


def test_changes_that_nobody_waits_for_are_told_together() -> None:
    front = Front()
    announcer = Announcer(fleet(front))
    announcer.tell_new([])
    front.told.clear()
    announcer.note(entry(1), SAY_NS)
    assert front.slots() == [1]
    for slot in (2, 3):
        announcer.note(entry(slot), SAY_NS + slot)
        assert announcer.is_unsaid(slot)
    announcer.step(2 * SAY_NS - 1)
    assert len(front.told) == 1
    announcer.step(2 * SAY_NS)
    assert front.slots() == [1, 2, 3]
    assert not announcer.is_unsaid(3)


def test_a_change_that_is_told_at_once_takes_the_others_along() -> None:
    front = Front()
    announcer = Announcer(fleet(front))
    announcer.tell_new([])
    front.told.clear()
    announcer.say([entry(1)], (), SAY_NS)
    announcer.note(entry(2), SAY_NS + 1)
    announcer.say([entry(3)], (), SAY_NS + 2)
    assert front.slots() == [1, 2, 3]


def test_the_state_of_the_moment_is_told() -> None:
    front = Front()
    announcer = Announcer(fleet(front))
    announcer.tell_new([])
    changing = entry(1)
    announcer.say((), [7], SAY_NS)
    announcer.note(changing, SAY_NS + 1)
    changing.state = State.UNLOADED
    announcer.step(3 * SAY_NS)
    assert front.told[-1].upsert[0].state == "unloaded"


def test_what_is_removed_is_not_told_as_changed() -> None:
    front = Front()
    announcer = Announcer(fleet(front))
    announcer.tell_new([])
    announcer.say((), [7], SAY_NS)
    announcer.note(entry(1), SAY_NS + 1)
    announcer.say((), [1], SAY_NS + 2)
    assert front.slots() == []
    assert front.told[-1].removed == (1,)
    announcer.step(9 * SAY_NS)
    assert front.told[-1].removed == (1,)


@pytest.mark.parametrize("count", [0, REMOVED_MAX, REMOVED_MAX + 1, 44_000, VERSIONS_MAX])
@pytest.mark.parametrize("length", [0, 1000])
def test_all_versions_may_go_at_once(count: int, length: int) -> None:
    routes = [
        Route(slot=slot, name=f"m{slot}", version="1", state="ready", reason="x" * 60)
        for slot in range(length)
    ]
    gone = range(VERSIONS_MAX - count, VERSIONS_MAX)
    messages = route_messages(routes, gone)
    assert max(encoded_bytes(message) for message in messages) <= CONTROL_MESSAGE_BYTES_MAX
    assert [slot for message in messages for slot in message.removed] == list(gone)
    assert [route for message in messages for route in message.upsert] == routes
    told = [(bool(message.removed), bool(message.upsert)) for message in messages]
    assert (True, False) not in told or (False, True) not in told[told.index((True, False)) :]
    assert [message.complete for message in messages] == [False] * (len(messages) - 1) + [True]


def test_a_long_table_comes_in_messages_that_fit() -> None:
    routes = [
        Route(slot=slot, name=f"m{slot}", version="1", state="ready", reason="x" * 100)
        for slot in range(3000)
    ]
    messages = route_messages(routes, [5])
    assert len(messages) > 1
    assert [route for message in messages for route in message.upsert] == routes
    assert max(encoded_bytes(message) for message in messages) <= CONTROL_MESSAGE_BYTES_MAX
    assert [message.complete for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].removed == (5,)


def test_its_revision_grows_with_each_change_told_or_not() -> None:
    announcer = Announcer(fleet(Front()))
    seen = [announcer.revision]

    def grew() -> bool:
        seen.append(announcer.revision)
        return seen[-1] > seen[-2]

    announcer.note(entry(1), 0)
    assert grew()
    announcer.say([entry(2)], (), 0)
    assert grew()
    announcer.say((), (), 0)
    assert not grew()
    announcer.say((), (2,), 0)
    assert grew()
    announcer.say_names(())
    assert grew()
