"""Of thousands of lines the first are said, the rest counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.sparing import LINES_MAX, PERIOD_NS, SAME_MAX, Sparing


def test_what_comes_at_once_is_said_up_to_a_number_and_then_counted() -> None:
    lines = Sparing()
    said = [lines.admits(key, f"no {key}", 5) for key in range(LINES_MAX + 3)]
    assert said == [True] * LINES_MAX + [False] * 3
    assert lines.take_more(4 + PERIOD_NS) == 0
    assert lines.take_more(5 + PERIOD_NS) == 3
    assert lines.take_more(5 + PERIOD_NS) == 0
    assert lines.admits("next", "no", 6 + PERIOD_NS)


def test_what_many_have_in_common_leaves_room_for_other_lines() -> None:
    lines = Sparing()
    assert [lines.admits(key, "no", 0) for key in range(1000)].count(True) == SAME_MAX
    assert lines.admits("another", "cold", 0)
    assert lines.take_more(PERIOD_NS) == 1000 - SAME_MAX
    assert lines.admits("next", "no", PERIOD_NS)


def test_the_same_is_said_once_and_another_reason_again() -> None:
    lines = Sparing()
    assert [lines.admits("minilm", text, 0) for text in ("cold", "cold", "hot", "cold")] == [
        *(True, False, True, True)
    ]
    lines.forget("minilm")
    assert lines.admits("minilm", "cold", 0)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, PERIOD_NS))))
def test_every_line_is_said_or_counted(steps: list[tuple[int, int]]) -> None:
    lines = Sparing()
    now_ns = said = counted = all_of_them = 0
    for number, pause_ns in steps:
        now_ns += pause_ns
        counted += lines.take_more(now_ns)
        for _ in range(number):
            all_of_them += 1
            said += lines.admits_new(now_ns)
    counted += lines.take_more(now_ns + PERIOD_NS)
    assert said + counted == all_of_them
