"""When requests of several versions share a batch, and when they stop to."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pytest

from overcommit.runtime.config import Batching, ModelConfig, TensorSpec
from overcommit.runtime.mixing import (
    FORMS_MAX,
    TRIALS,
    Array,
    Arrays,
    Families,
    Family,
    Recording,
    Shapes,
    Sized,
)
from overcommit.runtime.payload import TensorPlace
from overcommit.runtime.signature import Form, Signature

SLOW_S = 0.002


def signature(datatype: str = "FP32") -> Signature:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1, -1))
    out = TensorSpec(name="y", datatype=datatype, shape=(-1, -1))
    return Signature(
        ModelConfig(inputs=(spec,), outputs=(out,), batching=Batching(max_batch_size=8))
    )


def form(columns: int = 2, rows: int = 1) -> Form:
    place = TensorPlace(0, "FP32", 64, 4 * rows * columns, (rows, columns))
    return Form((place,), rows, 4 * columns, columns, (), 64 + place.nbytes)


class Fake:
    """A recording that gives what it is told to."""

    def __init__(self, size: int, answer: float | Exception = 1.0, seconds: float = 0.0) -> None:
        self.size = size
        self.answer = answer
        self.seconds = seconds

    def run(self, addresses: Sequence[int], inputs: Mapping[str, Array]) -> Arrays:
        time.sleep(self.seconds)
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"y": np.full((len(addresses), 2), self.answer, np.float32)}


class Asked:
    """What a family has asked to be recorded."""

    def __init__(self) -> None:
        self.shapes: list[Shapes] = []
        self.keys: list[Hashable] = []

    def __call__(self, family: Family, key: Hashable, shapes: Shapes) -> None:
        self.keys.append(key)
        self.shapes.append(shapes)


class Nothing:
    def trace(self, shapes: Shapes) -> Sequence[Recording]:
        raise AssertionError("the tests answer for it")


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def family(asked: Asked) -> Family:
    return Family(Nothing(), signature(), asked)


def record(family: Family, asked: Asked, *recordings: Recording) -> None:
    assert family.room(form()) == 1
    family.on_traced(asked.keys[-1], recordings)


def alone(value: float = 1.0, seconds: float = SLOW_S) -> list[Arrays]:
    time.sleep(seconds)
    return [{"y": np.full((1, 2), value, np.float32)} for _ in range(4)]


def try_out(family: Family, sized: Sized, value: float = 1.0, seconds: float = SLOW_S) -> None:
    run = sized.recording.run
    family.try_out(form(), sized, 4, lambda: run(range(4), {}), lambda: alone(value, seconds))


def picked(family: Family, count: int = 4) -> Sized:
    sized = family.pick(form(), count)
    assert sized is not None
    return sized


def test_a_form_is_asked_for_once_and_shares_nothing_until_it_is_recorded(
    family: Family, asked: Asked
) -> None:
    assert [family.room(form()), family.room(form())] == [1, 1]
    assert asked.shapes == [{"x": ("FP32", (1, 2))}]
    assert family.pick(form(), 4) is None
    family.on_traced(asked.keys[0], [Fake(4), Fake(8)])
    assert family.room(form()) == 8
    assert family.room(form(rows=2)) == 1, "another number of rows is another form"


def test_a_size_is_on_after_its_trials(family: Family, asked: Asked) -> None:
    record(family, asked, Fake(4))
    for _ in range(TRIALS):
        assert not picked(family).is_on
        try_out(family, picked(family))
    assert picked(family).is_on
    assert picked(family, 3).is_on, "fewer requests use it too"
    assert family.pick(form(), 1) is None
    assert family.pick(form(), 5) is None


def test_a_size_that_answers_wrong_is_off_at_once(family: Family, asked: Asked) -> None:
    record(family, asked, Fake(4, answer=1.001), Fake(8))
    try_out(family, picked(family))
    assert family.pick(form(), 4) is None
    assert family.room(form()) == 8, "others may be right"
    assert family.pick(form(), 8) is not None


def test_what_trials_with_few_cost_says_from_which_number_on_a_size_pays() -> None:
    sized = Sized(Fake(16))
    for _ in range(TRIALS):
        sized.note(40_000, 30_000, 3)
    assert sized.is_on, "three take 30 us alone; sixteen would take 160"
    assert sized.least == 4


def test_the_best_of_all_trials_counts() -> None:
    sized = Sized(Fake(4))
    sized.note(900_000, 40_000, 4)  # it was not scheduled
    for _ in range(TRIALS - 1):
        sized.note(20_000, 40_000, 4)
    assert (sized.is_on, sized.least) == (True, 2)


def test_fewer_than_pay_run_alone(family: Family, asked: Asked) -> None:
    record(family, asked, Fake(4))
    sized = picked(family)
    for _ in range(TRIALS):
        sized.note(25_000, 40_000, 4)
    assert family.pick(form(), 2) is None
    assert family.pick(form(), 3) is sized


def test_a_size_that_is_no_faster_is_off(family: Family, asked: Asked) -> None:
    record(family, asked, Fake(4, seconds=2 * SLOW_S))
    for _ in range(TRIALS):
        try_out(family, picked(family))
    assert family.pick(form(), 4) is None
    assert family.room(form()) == 1


def test_what_raises_is_off_and_hurts_nobody(family: Family, asked: Asked) -> None:
    record(family, asked, Fake(4, answer=RuntimeError("no")))
    try_out(family, picked(family))
    assert family.room(form()) == 1


def test_what_a_version_raises_alone_is_its_own(family: Family, asked: Asked) -> None:
    record(family, asked, Fake(4))

    def fail() -> list[Arrays]:
        raise ValueError("the model's")

    with pytest.raises(ValueError, match="the model's"):
        family.try_out(form(), picked(family), 4, dict, fail)
    assert family.pick(form(), 4) is not None, "that says nothing about mixing"


def test_a_program_that_cannot_be_recorded_shares_nothing(family: Family, asked: Asked) -> None:
    family.room(form())
    family.on_traced(asked.keys[0], ValueError("control flow"))
    assert family.room(form()) == 1
    assert len(asked.keys) == 1


def test_forms_are_bounded(family: Family, asked: Asked) -> None:
    for columns in range(1, FORMS_MAX + 5):
        family.room(form(columns))
    assert len(asked.keys) == FORMS_MAX


def test_large_requests_are_left_alone(family: Family, asked: Asked) -> None:
    assert family.room(form(columns=100_000)) == 1
    assert not asked.keys


def test_nan_is_equal_to_nan_and_a_wrong_label_is_wrong(family: Family, asked: Asked) -> None:
    record(family, asked, Fake(4, answer=float("nan")))
    try_out(family, picked(family), value=float("nan"))
    assert family.room(form()) == 4
    labels = Family(Nothing(), signature("INT64"), asked)
    record(labels, asked, Fake(4, answer=2.0))
    try_out(labels, picked(labels), value=1.0)
    assert labels.room(form()) == 1


def test_the_helper_records_and_a_family_is_found_again() -> None:
    rung = threading.Event()
    families = Families(rung.set)

    class Program:
        def trace(self, shapes: Shapes) -> Sequence[Recording]:
            return [Fake(4)]

    program, shared = Program(), signature()
    family = families.of(program, shared)
    assert family is not None
    assert families.of(program, shared) is family
    assert families.of(None, shared) is None
    assert family.room(form()) == 1
    assert rung.wait(60)
    families.take_recorded()
    assert family.room(form()) == 4
