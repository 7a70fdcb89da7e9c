"""The thread that does what is too slow for a worker's loop."""

from __future__ import annotations

import threading

from overcommit.runtime.helper import Helper

WATCHDOG_S = 30.0


def test_results_come_in_the_order_of_the_questions_and_an_error_is_one() -> None:
    rung = threading.Semaphore(0)
    helper: Helper[int, str] = Helper("helper", rung.release)
    helper.ask(1, lambda: "one")
    helper.ask(2, lambda: str(1 // 0))
    for _ in range(2):
        assert rung.acquire(timeout=WATCHDOG_S)
    assert helper.try_take() == (1, "one")
    key, error = helper.try_take() or (0, "")
    assert key == 2
    assert isinstance(error, ZeroDivisionError)
    assert helper.try_take() is None


def test_the_bell_is_left_alone_once_it_is_closed() -> None:
    rings: list[int] = []
    began, may_end = threading.Event(), threading.Event()
    helper: Helper[int, bool] = Helper("helper", lambda: rings.append(1))

    def work() -> bool:
        began.set()
        return may_end.wait(WATCHDOG_S)

    helper.ask(1, work)
    assert began.wait(WATCHDOG_S)
    helper.close()
    may_end.set()
    last = threading.Event()
    helper.ask(2, lambda: last.set() is None)  # by then the first is over, its ring as well
    assert last.wait(WATCHDOG_S)
    assert rings == []
