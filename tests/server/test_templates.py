"""Templates: what they read is what the general way reads, and they read nothing else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import payload
from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import BadRequest
from overcommit.runtime.front_end_messages import Route
from overcommit.server import inference
from overcommit.server.answer_plans import Selection
from overcommit.server.classification import Classes
from overcommit.server.heads import Target
from overcommit.server.inference import Prepared
from overcommit.server.limits import TEMPLATES_MAX
from overcommit.server.plans import InputPlan, Plans, RoutePlans


def route(slot: int = 1, **datatypes: str) -> Route:
    specs = tuple(
        TensorSpec(name=name, datatype=datatype, shape=(-1, -1), axes=("batch", name))
        for name, datatype in datatypes.items()
    )
    return Route(slot=slot, name=f"m{slot}", version="1", state="ready", inputs=specs, outputs=())


def tensor(name: str, datatype: str, values: list[Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [1, len(values)], "data": values, **more}


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": inputs, **more}).encode()


def teach(plans: RoutePlans, text: bytes, times: int = 3) -> None:
    for _ in range(times):
        inference.prepare(plans, text, None)


def is_known(plans: RoutePlans, text: bytes) -> bool:
    """Whether a template reads this body."""
    template = plans.templates.find(text)
    return template is not None and template.read(text) is not None


FLOATS = route(x="FP32")


def test_a_body_is_read_by_a_template_from_its_third_time_on() -> None:
    plans = RoutePlans(FLOATS)
    first = body(tensor("x", "FP32", [1.5, 2.5]))
    teach(plans, first, times=1)
    assert not is_known(plans, first)
    teach(plans, first, times=1)
    assert is_known(plans, first)
    teach(plans, first, times=1)
    prepared, data = inference.prepare(plans, body(tensor("x", "FP32", [3.25, -1])), None)
    assert data == [np.array([3.25, -1], np.float32).tobytes()]
    again, _ = inference.prepare(plans, first, None)
    assert again is prepared


def test_several_inputs_are_read_in_the_order_of_the_body() -> None:
    plans = RoutePlans(route(ids="INT64", mask="INT64"))
    teach(plans, body(tensor("mask", "INT64", [1, 1]), tensor("ids", "INT64", [7, 8])))
    text = body(tensor("mask", "INT64", [1, 0]), tensor("ids", "INT64", [101, 102]))
    assert is_known(plans, text)
    prepared, data = inference.prepare(plans, text, None)
    assert [np.frombuffer(each, np.int64).tolist() for each in data] == [[1, 0], [101, 102]]
    assert [place.index for place in prepared.plan.places] == [1, 0]


def test_versions_of_one_shape_share_templates_and_not_what_they_prepare() -> None:
    plans = Plans()
    one, other = plans.of(route(1, x="FP32")), plans.of(route(2, x="FP32"))
    text = body(tensor("x", "FP32", [1.0]))
    teach(one, text)
    prepared, _ = inference.prepare(other, text, None)
    assert is_known(other, text)
    assert prepared.route.name == "m2"
    assert inference.prepare(one, text, None)[0].route.name == "m1"


def test_who_is_asked_again_remembers_only_what_is_true_of_his_plans() -> None:
    plans = Plans()
    one, other = plans.of(route(1, x="FP32")), plans.of(route(2, x="FP32"))
    short, long = body(tensor("x", "FP32", [1.5])), body(tensor("x", "FP32", [1.5, 2.5]))
    named = body(tensor("x", "FP32", [3.5]), id="mine")
    target = Target("m1", None)
    for plans_now in (one, other, one):
        target.point_at(plans_now, 1)
        for text in (short, long, short, named, short, long, long, named, named, short) * 2:
            prepared, data = inference.prepare_again(target, text, None)
            expected, same = inference.prepare(plans_now, text, None)
            assert (prepared.route, prepared.id) == (plans_now.route, expected.id)
            assert prepared.plan.counts == expected.plan.counts
            assert list(data) == list(same)
        assert inference.prepare_again(target, short, None)[0] is target.prepared


def answer_block(values: list[float]) -> memoryview:
    places, length = payload.plan([(0, "FP32", 4 * len(values), (1, len(values)))])
    block = memoryview(bytearray(length))
    payload.encode(block, places)
    at = places[0].offset
    block[at : at + 4 * len(values)] = np.array(values, np.float32).tobytes()
    return block


def test_versions_of_one_shape_share_an_answers_layout_and_each_signs_its_own() -> None:
    spec = TensorSpec(name="y", datatype="FP32", shape=(-1, 2))
    both = [
        Route(slot=slot, name=name, version=version, state="ready", inputs=(), outputs=(spec,))
        for slot, name, version in ((1, "m", "1"), (2, 'a"b', "2"))
    ]
    block = answer_block([1.0, 2.0])
    plans = Plans()
    layouts = []
    for one in both:
        mine = plans.of(one)
        prepared = inference.Prepared(mine, InputPlan((), b"", 0, 0, ()), None, None, False)
        assert json.loads(b"".join(inference.respond(prepared, block).pieces)) == {
            "model_name": one.name,
            "model_version": one.version,
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}],
        }
        layouts.append(prepared.plan_of(block))
    assert layouts[0] is layouts[1]


def test_versions_of_one_shape_share_what_is_asked_of_their_answers_but_not_classes() -> None:
    spec = TensorSpec(name="y", datatype="FP32", shape=(-1, 2))
    block = answer_block([1.0, 2.0])
    plans = Plans()
    both = [
        plans.of(
            Route(slot=n, name=f"m{n}", version="1", state="ready", inputs=(), outputs=(spec,))
        )
        for n in (1, 2)
    ]
    asked = InputPlan((), b"", 0, 0, ())
    for want in (None, False, True):
        one, other = (Prepared(each, asked, None, (("y", want),), False) for each in both)
        assert one.selection is other.selection
        assert one.plan_of(block) is other.plan_of(block)
        for prepared in (one, other):
            whole = b"".join(inference.respond(prepared, block).pieces)
            assert prepared.route.name.encode() in whole
    classes: Selection = (("y", (Classes(1), None)),)
    labelled = [Prepared(each, asked, None, classes, False) for each in both]
    for prepared in labelled:
        inference.respond(prepared, block)
    assert labelled[0].answers is not labelled[1].answers
    assert not any(selection == classes for _, selection, _ in both[0].shape.outputs)


@pytest.mark.parametrize(
    "text",
    [
        body(tensor("x", "FP32", [1.0, 2.0]), id="seven"),
        body(tensor("x", "FP32", [1.0, 2.0]), parameters={"timeout": 5}),
        body({**tensor("x", "FP32", [1.0, 2.0]), "data": [[1.0, 2.0]]}),
        body(tensor("x", "FP32", [])),
    ],
    ids=["id", "timeout", "nested", "empty"],
)
def test_what_is_more_than_numbers_is_read_the_general_way(text: bytes) -> None:
    plans = RoutePlans(FLOATS)
    teach(plans, text, times=4)
    assert not is_known(plans, text)


def test_a_key_that_only_looks_like_data_makes_no_template() -> None:
    plans = RoutePlans(FLOATS)
    text = b'{"note":"\\"data\\":[4]","data":[5],"inputs":[%b]}' % (
        json.dumps(tensor("x", "FP32", [1.0])).encode()
    )
    teach(plans, text, times=4)
    assert not is_known(plans, text)
    twice = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1],"data":[2]}]}'
    teach(plans, twice, times=4)
    _, data = inference.prepare(plans, twice, None)
    assert data == [np.array([2], np.float32).tobytes()]


@pytest.mark.parametrize(
    "numbers",
    ["1.0", "1.0,2.0,3.0", "1.0,null", "1.0,[2.0]", '1.0,"2"', "1.0,2.0]", "1.0 2.0", "1.0,1e999"],
)
def test_a_malformed_body_under_a_known_prefix_is_judged_by_the_general_way(numbers: str) -> None:
    plans = RoutePlans(FLOATS)
    teach(plans, body(tensor("x", "FP32", [1.5, 2.5])))
    text = body(tensor("x", "FP32", [1.5, 2.5])).replace(b"1.5, 2.5", numbers.encode())
    results = []
    for each in (plans, RoutePlans(FLOATS)):
        try:
            results.append(str(inference.prepare(each, text, None)[1]))
        except BadRequest as error:
            results.append(error.message)
    assert results[0] == results[1]


def test_a_number_that_does_not_fit_is_refused_by_name() -> None:
    plans = RoutePlans(route(x="INT8"))
    teach(plans, body(tensor("x", "INT8", [1, 2])))
    assert is_known(plans, body(tensor("x", "INT8", [-128, 127])))
    with pytest.raises(BadRequest, match="128 does not fit INT8"):
        inference.prepare(plans, body(tensor("x", "INT8", [1, 128])), None)


def test_no_more_templates_are_kept_than_the_limit() -> None:
    plans = RoutePlans(FLOATS)
    for width in range(1, TEMPLATES_MAX + 40):
        teach(plans, body(tensor("x", "FP32", [1.0] * width)), times=2)
    assert len(plans.templates) <= TEMPLATES_MAX


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")]),
)
def test_a_template_reads_what_the_general_way_reads(
    floats: list[float], integers: list[int], separators: tuple[str, str]
) -> None:
    plans = RoutePlans(route(x="FP64", y="INT64"))

    def text(left: list[float], right: list[int]) -> bytes:
        inputs = (tensor("x", "FP64", left), tensor("y", "INT64", right))
        return json.dumps({"inputs": inputs}, separators=separators).encode()

    teach(plans, text([0.5] * len(floats), [1] * len(integers)))
    _, data = inference.prepare(plans, text(floats, integers), None)
    assert data == [
        np.array(floats, np.float64).tobytes(),
        np.array(integers, np.int64).tobytes(),
    ]
