"""When an ensemble can be asked, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from overcommit.runtime.config import ENSEMBLE_DEPTH_MAX, STEPS_MAX, Step, TensorSpec
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.steps import READY, Find, verdict_of


def spec(name: str, *shape: int, datatype: str = "FP32", **more: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape or (-1, 4), **more)


def model(name: str, inputs: tuple[TensorSpec, ...], *outputs: TensorSpec, **more: Any) -> Route:
    return Route(
        **{"slot": 1, "name": name, "version": "1", "state": "ready"} | more,
        inputs=inputs,
        outputs=outputs,
    )


def step(model: str, inputs: str, outputs: str, version: str = "") -> Step:
    """`inputs` and `outputs`: "model's name=ensemble's name ..."."""
    maps = [dict(pair.split("=") for pair in text.split()) for text in (inputs, outputs)]
    return Step(model=model, version=version, inputs=maps[0], outputs=maps[1])


def found(*routes: Route) -> Find:
    known = {route.name: route for route in routes}

    def find(name: str, version: str) -> Route | None:
        route = known.get(name)
        return route if route is not None and version in ("", route.version) else None

    return find


STEPS = (step("first", "a=x", "b=mid"), step("second", "a=mid", "b=y"))
PAIR = model("pair", (spec("x"),), spec("y"), slot=9, steps=STEPS)
FIRST = model("first", (spec("a"),), spec("b"))
SECOND = model("second", (spec("a"),), spec("b"), slot=2)


def replaced(route: Route, **changes: Any) -> Route:
    return msgspec.structs.replace(route, **changes)


def test_an_ensemble_is_ready_where_its_steps_are_and_their_tensors_fit() -> None:
    assert verdict_of(PAIR, found(FIRST, SECOND)) is READY
    narrow = replaced(SECOND, inputs=(spec("a", -1, -1),))
    assert verdict_of(PAIR, found(FIRST, narrow)) is READY


def test_it_waits_for_the_image_of_a_step() -> None:
    verdict = verdict_of(PAIR, found(FIRST, replaced(SECOND, state="packing", inputs=())))
    assert verdict.fate == "waits"
    assert verdict.reason.startswith("ensemble 'pair', step 2 (model 'second'): ")


@pytest.mark.parametrize(
    ("find", "fate", "text"),
    [
        (found(FIRST), "missing", "no model of this name: put it into the repository"),
        (found(FIRST, replaced(SECOND, state="unloaded")), "missing", "models/second/load"),
        (
            found(FIRST, replaced(SECOND, state="unavailable", reason="it is torn")),
            "broken",
            "version 1 cannot be served, mend that and the ensemble is ready: it is torn",
        ),
    ],
)
def test_a_step_that_does_not_serve_is_named_with_the_remedy(
    find: Find, fate: str, text: str
) -> None:
    verdict = verdict_of(PAIR, find)
    assert verdict.fate == fate
    assert verdict.reason.startswith("ensemble 'pair', step 2 (model 'second'): ")
    assert text in verdict.reason


def test_a_version_that_is_not_there_is_named() -> None:
    ensemble = replaced(PAIR, steps=(STEPS[0], step("second", "a=mid", "b=y", "7")))
    verdict = verdict_of(ensemble, found(FIRST, SECOND))
    assert (verdict.fate, "there is no version 7" in verdict.reason) == ("missing", True)


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (model("second", (spec("z"),), spec("b")), "it has no input 'a', but 'z'"),
        (model("second", (spec("a"), spec("z")), spec("b")), "nothing is fed to its input 'z'"),
        (model("second", (spec("a"),), spec("z")), "it has no output 'b', but 'z'"),
        (
            model("second", (spec("a", datatype="INT64"),), spec("b")),
            "output 'b' of step 1 is FP32 [-1, 4], its input 'a' takes INT64 [-1, 4]",
        ),
        (model("second", (spec("a", -1, 5),), spec("b")), "its input 'a' takes FP32 [-1, 5]"),
        (model("second", (spec("a", -1, 4, 1),), spec("b")), "takes FP32 [-1, 4, 1]"),
        (
            model("second", (spec("a"),), spec("b", datatype="FP64")),
            "output 'b' of step 2 is FP64 [-1, 4], its output 'y' is FP32 [-1, 4]",
        ),
        (model("second", (spec("a"),), spec("b", -1, 9)), "its output 'y' is FP32 [-1, 4]"),
    ],
)
def test_tensors_that_contradict_each_other_are_said_with_the_place(
    second: Route, text: str
) -> None:
    verdict = verdict_of(PAIR, found(FIRST, second))
    assert verdict.fate == "broken"
    assert verdict.reason.startswith("ensemble 'pair'")
    assert text in verdict.reason
    assert "correct" in verdict.reason or "map another tensor" in verdict.reason
    # What is said of a model's files before it is packed contradicts as well.
    assert verdict_of(PAIR, found(FIRST, replaced(second, state="packing"))) == verdict


def test_an_input_of_the_ensemble_has_to_fit_each_step_that_takes_it() -> None:
    wide = replaced(PAIR, inputs=(spec("x", 32, 4),))
    assert verdict_of(wide, found(FIRST, SECOND)) is READY
    few = replaced(FIRST, max_batch_size=8)
    assert "at most 8 rows" in verdict_of(wide, found(few, SECOND)).reason


def test_what_may_be_left_out_or_taken_under_any_name_contradicts_nothing() -> None:
    optional = replaced(SECOND, inputs=(spec("a"), spec("z", optional=True)))
    assert verdict_of(PAIR, found(FIRST, optional)) is READY
    adapts = replaced(SECOND, inputs=(spec("q", datatype="FP64"),), adapts=True)
    assert verdict_of(PAIR, found(FIRST, adapts)) is READY
    texts = replaced(FIRST, outputs=(spec("b", datatype="BYTES"),))
    assert "takes FP64" in verdict_of(PAIR, found(texts, adapts)).reason


def test_a_shape_that_trials_showed_gives_way_to_the_declared_one() -> None:
    seen = replaced(FIRST, outputs=(spec("b", -1, 1, declared=(-1, -1)),))
    assert verdict_of(PAIR, found(seen, SECOND)) is READY
    scalar = TensorSpec(name="b", datatype="FP32", shape=())  # a graph that leaves the rank open
    assert verdict_of(PAIR, found(replaced(FIRST, outputs=(scalar,)), SECOND)) is READY


def test_a_step_that_is_an_ensemble_takes_the_outer_one_along() -> None:
    outer = model("outer", (spec("x"),), spec("y"), slot=10, steps=(step("pair", "x=x", "y=y"),))
    assert verdict_of(outer, found(PAIR, FIRST, SECOND)) is READY
    verdict = verdict_of(outer, found(PAIR, FIRST))
    assert verdict.fate == "missing"
    assert verdict.reason.startswith(
        "ensemble 'outer', step 1 (model 'pair'): ensemble 'pair', step 2 (model 'second'): "
    )
    packing = replaced(SECOND, state="packing")
    assert verdict_of(outer, found(PAIR, FIRST, packing)).fate == "waits"


def test_circles_and_towers_end() -> None:
    circle = replaced(PAIR, steps=(step("pair", "x=x", "y=y"),))
    verdict = verdict_of(circle, found(circle))
    assert verdict.fate == "broken"
    assert verdict.reason.startswith(
        "ensemble 'pair', step 1 (model 'pair'): its steps lead back to"
    )
    tower = [FIRST, replaced(PAIR, name="e1", steps=(step("first", "a=x", "b=y"),))]
    for level in range(2, ENSEMBLE_DEPTH_MAX + 2):
        tower.append(
            replaced(
                PAIR,
                slot=20 + level,
                name=f"e{level}",
                steps=(step(f"e{level - 1}", "x=x", "y=y"),),
            )
        )
    assert verdict_of(tower[-2], found(*tower)) is READY
    assert "nested more than" in verdict_of(tower[-1], found(*tower)).reason


def test_each_version_is_looked_at_once_however_many_steps_lead_to_it() -> None:
    asked = 0

    def counting(inner: Find) -> Callable[[str, str], Route | None]:
        def find(name: str, version: str) -> Route | None:
            nonlocal asked
            asked += 1
            return inner(name, version)

        return find

    routes = [replaced(FIRST, name="e0")]
    for level in range(1, ENSEMBLE_DEPTH_MAX + 1):
        steps = tuple(
            step(
                f"e{level - 1}",
                "a=x" if level == 1 else "x=x",
                f"{'b' if level == 1 else 'y'}=y{n}",
            )
            for n in range(STEPS_MAX - 1)
        )
        outputs = (spec("y"),)
        last = msgspec.structs.replace(steps[0], outputs={"b" if level == 1 else "y": "y"})
        routes.append(
            model(f"e{level}", (spec("x"),), *outputs, slot=level + 20, steps=(*steps, last))
        )
    assert verdict_of(routes[-1], counting(found(*routes))) is READY
    assert asked == ENSEMBLE_DEPTH_MAX * STEPS_MAX
