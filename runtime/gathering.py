"""Questions whose answer needs what every front end has counted up to now.

A front end tells its counts each second.  Who asks for statistics, around a measurement say, wants those of
this moment from all of them, wherever the requests went.

    ASKED --TellCounts to the others--> WAITING --all have told, or are dead--> ANSWERED
                                        WAITING --GATHER_NS over--> ANSWERED, with what is there

Invariants
 1. A question is answered once, by `answer`.
 2. A front end that hangs or dies delays an answer by GATHER_NS at most.

Called by administration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.children import Child
from overcommit.runtime.front_end_messages import TellCounts

GATHER_NS: Final = 1_000_000_000
_Key = tuple[int, int]


@dataclass(slots=True)
class _Question:
    answer: Callable[[], None]
    missing: set[_Key]
    until_ns: int


class Gathering:
    """The questions that wait for counts."""

    def __init__(self) -> None:
        self._questions: dict[int, _Question] = {}
        self._count = 0

    def ask(self, others: list[Child], answer: Callable[[], None], now_ns: int) -> None:
        """Call `answer` when these front ends have told what they counted."""
        if not others:
            answer()
            return
        self._count += 1
        missing = {front.incarnation for front in others}
        self._questions[self._count] = _Question(answer, missing, now_ns + GATHER_NS)
        for front in others:
            front.post(TellCounts(id=self._count))

    def on_told(self, front: Child, number: int) -> None:
        """A front end has told its counts, all of them."""
        question = self._questions.get(number)
        if question is not None:
            question.missing.discard(front.incarnation)
            self._settle(number, question)

    def on_gone(self, front: Child) -> None:
        """A front end is dead: it tells nothing more."""
        for number, question in list(self._questions.items()):
            question.missing.discard(front.incarnation)
            self._settle(number, question)

    def step(self, now_ns: int) -> None:
        """Answer what has waited long enough."""
        for number, question in list(self._questions.items()):
            if now_ns >= question.until_ns:
                question.missing.clear()
                self._settle(number, question)

    def _settle(self, number: int, question: _Question) -> None:
        if not question.missing and self._questions.pop(number, None) is not None:
            question.answer()
