"""When a server thrashes, when it has stopped, and how long models should stay meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.config import MIB
from overcommit.runtime.thrashing import (
    BEGIN,
    END,
    HELD_MAX,
    STAY_LOADS,
    STAY_NS_MAX,
    WINDOW,
    Load,
    Look,
    Reading,
    Thrashing,
)

SECOND: Final = 1_000_000_000
MEMORY: Final = 100 * MIB
MODEL: Final = 8 * MIB


class Server:
    """Plays a server second by second; every model weighs as much."""

    def __init__(self) -> None:
        self.thrashing = Thrashing(MEMORY)
        self.now_ns = SECOND
        self.busy_ns = 0
        self.uses: dict[int, int] = {}
        self.second((), (), 0.0)

    def second(
        self, loaded: Sequence[int], used: Sequence[int], busy: float, load_ns: int = 20_000_000
    ) -> Reading:
        """A second in which these were loaded, these used once each, and loads took a share."""
        self.now_ns += SECOND
        self.busy_ns += int(busy * SECOND)
        for slot in used:
            self.uses[slot] = self.uses.get(slot, 0) + 1
        for slot in loaded:
            self.uses.setdefault(slot, 0)
        loads = tuple(Load(slot, MODEL, load_ns) for slot in loaded)
        look = Look(self.now_ns, self.busy_ns, loads, dict(self.uses))
        return self.thrashing.take(look, self.weigh)

    @staticmethod
    def weigh(slots: Collection[int]) -> int:
        return len(slots) * MODEL

    def thrash(self, seconds: int = WINDOW) -> Reading:
        """Thirty models in turn, twelve of which fit; each load serves one request."""
        for _ in range(seconds):
            reading = self.second(range(30), range(30), 0.9)
        return reading


def test_a_working_set_over_memory_that_loads_all_the_time_thrashes() -> None:
    server = Server()
    server.second(range(30), range(30), 0.9)
    assert not server.thrashing.reading.is_thrashing, "once is an incident"
    assert server.thrash(BEGIN).is_thrashing
    reading = server.thrash(WINDOW)
    assert reading.working_set_bytes == 30 * MODEL
    assert reading.memory_bytes == MEMORY
    assert reading.loads_per_s == pytest.approx(30)
    assert reading.busy_share == pytest.approx(0.9)
    assert reading.uses_per_load == pytest.approx(1)


def test_a_working_set_that_fits_does_not_however_much_is_loaded() -> None:
    server = Server()
    for _ in range(10):
        reading = server.second(range(12), range(12), 0.9)
    assert not reading.is_thrashing


def test_loads_that_leave_time_for_others_are_no_thrashing() -> None:
    server = Server()
    for _ in range(10):
        reading = server.second(range(30), range(30), 0.3)
    assert not reading.is_thrashing


def test_loads_that_serve_many_requests_are_no_thrashing() -> None:
    server = Server()
    for _ in range(10):
        reading = server.second(range(30), list(range(30)) * 20, 0.9)
    assert not reading.is_thrashing


def test_a_few_loads_of_giants_are_an_incident() -> None:
    server = Server()
    for _ in range(10):
        reading = server.second((1,), range(30), 0.9)
    assert not reading.is_thrashing


@pytest.mark.parametrize("calm", ["fits", "idle", "useful"])
def test_it_ends_some_time_after_one_of_them_has_ended(calm: str) -> None:
    server = Server()
    began_ns = server.thrash().since_ns
    seconds = 0
    while server.thrashing.reading.is_thrashing:
        seconds += 1
        assert seconds < WINDOW + END + 2
        if calm == "fits":
            server.second(range(10), range(10), 0.9)
        elif calm == "idle":
            server.second(range(30), range(30), 0.0)
        else:
            server.second(range(30), list(range(30)) * 200, 0.9)
    assert seconds >= END
    assert server.thrashing.reading.since_ns > began_ns
    assert server.thrashing.reading.stay_ns == 0


def test_between_the_bounds_it_goes_on_as_it_is() -> None:
    calm, hot = Server(), Server()
    hot.thrash()
    for _ in range(20):
        assert hot.second(range(30), range(30), 0.4).is_thrashing
        assert not calm.second(range(30), range(30), 0.4).is_thrashing


def test_what_was_loaded_stays_as_long_as_a_few_loads_take() -> None:
    server = Server()
    assert server.thrash().stay_ns == STAY_LOADS * 20_000_000


def test_it_does_not_stay_so_long_that_most_of_memory_is_held() -> None:
    server = Server()
    for _ in range(WINDOW):
        reading = server.second(list(range(30)) * 20, range(30), 0.9, load_ns=10 * SECOND)
    per_second = 600 * MODEL
    assert reading.stay_ns == pytest.approx(HELD_MAX * MEMORY / per_second * SECOND, rel=1e-6)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 40), max_size=60),
            st.lists(st.integers(0, 40), max_size=60),
            st.floats(0, 1),
            st.integers(0, 10 * SECOND),
        ),
        max_size=25,
    )
)
def test_it_never_turns_twice_in_a_row_and_never_stays_while_calm(
    seconds: list[tuple[list[int], list[int], float, int]],
) -> None:
    server = Server()
    turns: list[int] = []
    for number, (loaded, used, busy, load_ns) in enumerate(seconds):
        former = server.thrashing.reading
        reading = server.second(loaded, used, busy, load_ns)
        if reading.is_thrashing != former.is_thrashing:
            turns.append(number)
        assert 0 <= reading.stay_ns <= STAY_NS_MAX
        assert reading.is_thrashing or reading.stay_ns == 0
        assert reading.uses_per_load >= 0
    assert all(later - earlier >= BEGIN for earlier, later in itertools.pairwise(turns))
