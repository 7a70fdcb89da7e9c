"""When a version is kept away from the workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.config import QUARANTINE_DEATHS, QUARANTINE_S, RESTART_WINDOW_S
from overcommit.runtime.quarantine import QUARANTINE_S_MAX, Quarantine

SECOND = 1_000_000_000
WINDOW_NS = int(RESTART_WINDOW_S * SECOND)


def _kill(quarantine: Quarantine, now_ns: int, times: int = QUARANTINE_DEATHS) -> None:
    for _ in range(times):
        quarantine.on_worker_died(1, now_ns)


def test_an_unknown_version_may_run() -> None:
    assert Quarantine().blocked(1, 0) is None


def test_fewer_deaths_than_the_limit_block_nothing() -> None:
    quarantine = Quarantine()
    _kill(quarantine, 0, QUARANTINE_DEATHS - 1)
    assert quarantine.blocked(1, 0) is None


def test_deaths_within_the_window_block_the_version_and_no_other() -> None:
    quarantine = Quarantine()
    _kill(quarantine, 0)
    assert quarantine.blocked(1, 0) == QUARANTINE_S
    assert quarantine.blocked(1, SECOND) == QUARANTINE_S - 1
    assert quarantine.blocked(2, 0) is None
    assert quarantine.blocked(1, int(QUARANTINE_S * SECOND)) is None


def test_deaths_that_are_far_apart_block_nothing() -> None:
    quarantine = Quarantine()
    for number in range(10):
        quarantine.on_worker_died(1, number * WINDOW_NS)
        assert quarantine.blocked(1, number * WINDOW_NS) is None


def test_each_block_is_twice_as_long_up_to_the_limit() -> None:
    quarantine = Quarantine()
    now_ns, lengths = 0, []
    for _ in range(7):
        _kill(quarantine, now_ns)
        left_s = quarantine.blocked(1, now_ns)
        assert left_s is not None
        lengths.append(left_s)
        now_ns += int(left_s * SECOND)
    expected = [min(QUARANTINE_S * 2**n, QUARANTINE_S_MAX) for n in range(7)]
    assert lengths == expected
    assert lengths[-1] == QUARANTINE_S_MAX


def test_a_quiet_window_after_the_block_clears_the_record() -> None:
    quarantine = Quarantine()
    _kill(quarantine, 0)
    now_ns = int(QUARANTINE_S * SECOND) + WINDOW_NS + 1
    _kill(quarantine, now_ns)
    assert quarantine.blocked(1, now_ns) == QUARANTINE_S


def test_a_death_after_a_quiet_window_counts_as_the_first() -> None:
    quarantine = Quarantine()
    _kill(quarantine, 0, QUARANTINE_DEATHS - 1)
    _kill(quarantine, WINDOW_NS + 1, QUARANTINE_DEATHS - 1)
    assert quarantine.blocked(1, WINDOW_NS + 1) is None


def test_a_forgotten_slot_has_a_clean_record() -> None:
    quarantine = Quarantine()
    _kill(quarantine, 0)
    quarantine.forget(1)
    quarantine.forget(2)
    assert quarantine.blocked(1, 0) is None
    _kill(quarantine, 0, 1)
    assert quarantine.blocked(1, 0) is None


@given(gaps_s=st.lists(st.integers(0, 120)))
def test_a_block_never_exceeds_the_limit_and_always_ends(gaps_s: list[int]) -> None:
    quarantine, now_ns = Quarantine(), 0
    for gap_s in gaps_s:
        now_ns += gap_s * SECOND
        quarantine.on_worker_died(1, now_ns)
        left_s = quarantine.blocked(1, now_ns)
        assert left_s is None or 0 < left_s <= QUARANTINE_S_MAX
    assert quarantine.blocked(1, now_ns + int(QUARANTINE_S_MAX * SECOND)) is None
