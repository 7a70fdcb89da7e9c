"""Which steps make an ensemble that can run."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.config import ModelConfig, Step, TensorSpec
from overcommit.runtime.ensemble import check, order
from overcommit.runtime.errors import RepositoryError


def spec(name: str, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=(-1, 1), optional=optional)


def step(takes: str, gives: str) -> Step:
    """A step that takes and gives tensors named by letters."""
    return Step(
        model="m",
        inputs={f"in_{name}": name for name in takes},
        outputs={f"out_{name}": name for name in gives},
    )


def config(*steps: Step, outputs: str = "z", inputs: str = "a") -> ModelConfig:
    return ModelConfig(
        inputs=tuple(map(spec, inputs)), outputs=tuple(map(spec, outputs)), steps=steps
    )


@pytest.mark.parametrize(
    "steps",
    [
        (step("a", "z"),),
        (step("b", "z"), step("a", "b")),
        (step("a", "b"), step("a", "c"), step("bc", "z")),
        (step("a", "bz"), step("b", "c")),  # an output that nobody takes is no fault
    ],
)
def test_what_can_run_passes(steps: tuple[Step, ...]) -> None:
    check(config(*steps))


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ((step("b", "z"),), "step 1 .*takes the tensor 'b', which nothing gives"),
        ((step("b", "c"), step("c", "b"), step("a", "z")), "waits for this one"),
        ((step("z", "z"),), "'z'"),
        ((step("a", "z"), step("a", "z")), "step 2 .*'z', which is there already"),
        ((step("a", "a"),), "'a', which is there already"),
        ((step("a", "b"),), "no step gives the output 'z'"),
        ((step("a", ""),), "hands no output on"),
    ],
)
def test_what_cannot_run_is_refused(steps: tuple[Step, ...], says: str) -> None:
    with pytest.raises(RepositoryError, match=says):
        check(config(*steps))


def test_steps_and_engine_belong_together() -> None:
    with pytest.raises(RepositoryError, match="has steps; add"):
        check(ModelConfig(engine="ensemble"))
    with pytest.raises(RepositoryError, match="the engine 'torch'"):
        check(msgspec.structs.replace(config(step("a", "z")), engine="torch"))
    check(msgspec.structs.replace(config(step("a", "z")), engine="ensemble"))
    check(ModelConfig())


def test_an_ensemble_says_what_it_takes_and_gives() -> None:
    for bare in (config(step("a", "z"), outputs=""), config(step("", "z"), inputs="")):
        with pytest.raises(RepositoryError, match="inputs and outputs"):
            check(bare)


def test_an_output_cannot_be_an_input_that_may_be_left_out() -> None:
    inputs = (spec("a"), spec("z", optional=True))
    outputs = (spec("z"),)
    with pytest.raises(RepositoryError, match="output 'z'"):
        check(ModelConfig(inputs=inputs, outputs=outputs, steps=(step("a", "b"),)))


@given(st.data())
def test_an_order_is_found_whatever_order_the_steps_are_written_in(data: st.DataObject) -> None:
    names = "bcdefg"
    steps = [
        step(data.draw(st.text(alphabet="a" + names[:number], max_size=3)), name)
        for number, name in enumerate(names)
    ]
    shuffled = data.draw(st.permutations(steps))
    there = {"a"}
    for number in order(shuffled, "a"):
        assert there.issuperset(shuffled[number].inputs.values())
        there.update(shuffled[number].outputs.values())
    assert there == {"a", *names}
