"""Which versions a front end still has requests for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from overcommit.runtime.front_end_messages import AskUsed, Used
from overcommit.server.parcels import Pending
from overcommit.server.uses import Uses


def test_what_is_pending_or_kept_is_used() -> None:
    pending: dict[int, Pending] = {}
    uses = Uses(pending)

    def used(*slots: int) -> tuple[int, ...]:
        answer = uses.answer(AskUsed(id=4, slots=slots))
        assert answer == Used(id=4, slots=answer.slots)
        return answer.slots

    assert used(1, 2, 3) == ()
    pending[9] = cast(Pending, SimpleNamespace(route=SimpleNamespace(slot=2)))
    assert used(1, 2, 3) == (2,)
    with uses.keep({1, 3}), uses.keep({3, 4}):
        assert used(3, 2, 1) == (3, 2, 1)
        del pending[9]
        assert used(1, 2, 3) == (1, 3)
    assert used(1, 2, 3, 4) == ()


def test_what_is_kept_is_let_go_when_that_fails() -> None:
    uses = Uses({})
    try:
        with uses.keep({1}), uses.keep({1}):
            raise KeyError("a step")
    except KeyError:
        assert uses.answer(AskUsed(id=1, slots=(1,))).slots == ()
