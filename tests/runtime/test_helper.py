"""The thread that does what is too slow for a worker's loop."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import torch
from torch import nn

from overcommit.runtime.errors import ModelError
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


def test_what_means_to_end_the_thread_is_an_error_like_others() -> None:
    rung = threading.Semaphore(0)
    helper: Helper[int, str] = Helper("helper", rung.release)
    helper.ask(1, lambda: sys.exit("enough"))
    helper.ask(2, lambda: "two")
    for _ in range(2):
        assert rung.acquire(timeout=WATCHDOG_S)
    _, error = helper.try_take() or (0, "")
    assert isinstance(error, ModelError)
    assert "SystemExit: enough" in error.message
    assert helper.try_take() == (2, "two")


def test_what_was_made_is_nobodys_but_his_who_took_it() -> None:
    class Made:
        """What can be watched."""

    rung = threading.Semaphore(0)
    helper: Helper[int, Made] = Helper("helper", rung.release)
    helper.ask(1, Made)
    assert rung.acquire(timeout=WATCHDOG_S)
    taken = helper.try_take()
    assert taken is not None
    watched = weakref.ref(taken[1])
    del taken
    assert watched() is None


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


def test_helpers_of_one_process_take_turns() -> None:
    rung = threading.Semaphore(0)
    one: Helper[int, bool] = Helper("one", rung.release)
    two: Helper[int, bool] = Helper("two", rung.release)
    began, may_end, overlapped = threading.Event(), threading.Event(), threading.Event()

    def work() -> bool:
        began.set()
        return may_end.wait(WATCHDOG_S)

    one.ask(1, work)
    assert began.wait(WATCHDOG_S)
    two.ask(1, lambda: overlapped.set() is None)
    assert not rung.acquire(timeout=0.2)
    assert not overlapped.is_set()
    may_end.set()
    for _ in range(2):
        assert rung.acquire(timeout=WATCHDOG_S)
    assert one.try_take() == two.try_take() == (1, True)


def test_a_program_is_recorded_and_another_loaded_at_once(tmp_path: Path) -> None:
    """Both import the same parts of torch; two threads that do so in another order find halves."""
    program = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 3), (torch.ones(2, 4),)), program)
    script = f"""
        import threading
        import torch
        from torch import nn
        from overcommit.runtime.engines import mixed, torch_export
        from overcommit.runtime.helper import Helper
        rung = threading.Semaphore(0)
        recorder, loader = Helper("recorder", rung.release), Helper("loader", rung.release)
        net = nn.Linear(4, 3)
        weights = {{name: torch.zeros(4, *t.shape) for name, t in net.state_dict().items()}}
        call = lambda w, i: {{"y": torch.func.functional_call(net, w, (i["x"],))}}
        loader.ask(1, lambda: torch_export.load({str(program)!r}))
        recorder.ask(1, lambda: mixed._record(call, weights, {{"x": torch.zeros(4, 1, 4)}}))
        import torch._dynamo  # as a batch may
        assert rung.acquire(timeout=100) and rung.acquire(timeout=100)
        for helper in (recorder, loader):
            (_, result) = helper.try_take()
            assert not isinstance(result, Exception), repr(result)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
