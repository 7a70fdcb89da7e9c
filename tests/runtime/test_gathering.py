"""Questions that wait for what all front ends have counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from overcommit.runtime.front_end_messages import TellCounts
from overcommit.runtime.gathering import GATHER_NS, Gathering


@dataclass
class Front:
    """A front end that is asked."""

    index: int
    epoch: int = 1
    asked: list[int] = field(default_factory=list)

    @property
    def incarnation(self) -> tuple[int, int]:
        return self.index, self.epoch

    def post(self, message: TellCounts) -> None:
        self.asked.append(message.id)


def asked(*fronts: Front, now_ns: int = 0) -> tuple[Gathering, list[str]]:
    gathering, answers = Gathering(), list[str]()
    gathering.ask(list(fronts), lambda: answers.append("done"), now_ns)  # type: ignore[arg-type]
    return gathering, answers


def test_alone_it_is_answered_at_once() -> None:
    assert asked()[1] == ["done"]


def test_it_is_answered_once_when_the_last_has_told() -> None:
    one, two = Front(1), Front(2)
    gathering, answers = asked(one, two)
    gathering.on_told(one, one.asked[0])  # type: ignore[arg-type]
    gathering.on_told(one, one.asked[0])  # type: ignore[arg-type]
    assert answers == []
    gathering.on_told(two, two.asked[0])  # type: ignore[arg-type]
    gathering.on_told(two, two.asked[0])  # type: ignore[arg-type]
    gathering.step(10 * GATHER_NS)
    assert answers == ["done"]


def test_nobody_waits_for_the_dead_or_for_ever() -> None:
    one, two = Front(1), Front(2)
    gathering, answers = asked(one, two)
    gathering.on_gone(one)  # type: ignore[arg-type]
    gathering.step(GATHER_NS - 1)
    assert answers == []
    gathering.step(GATHER_NS)
    assert answers == ["done"]


def test_another_incarnation_does_not_answer_for_the_one_before() -> None:
    gathering, answers = asked(Front(1))
    gathering.on_told(Front(1, epoch=2), 1)  # type: ignore[arg-type]
    assert answers == []
