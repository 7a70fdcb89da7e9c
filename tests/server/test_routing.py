"""The routing table: what a name means, and what many routes share."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from overcommit.runtime.config import Step, TensorSpec
from overcommit.runtime.errors import BadRequest, NotFound, Unavailable
from overcommit.runtime.front_end_messages import ModelNames, Route, Routes
from overcommit.server.routing import CANARY, STABLE, RouteTable


def route(slot: int, version: str = "1", state: str = "ready", name: str = "m") -> Route:
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 16), axes=("batch", None))
    return Route(slot=slot, name=name, version=version, state=state, inputs=(spec,))  # type: ignore[arg-type]


def table(*routes: Route) -> RouteTable:
    made = RouteTable()
    made.apply(Routes(upsert=routes))
    return made


def test_without_a_version_the_highest_that_can_be_used_is_meant() -> None:
    routes = table(route(1, "9"), route(2, "10"), route(3, "11", "unavailable"))
    assert routes.find("m", None).version == "10"
    routes.apply(Routes(removed=(1, 2)))
    assert routes.find("m", None).version == "11"


def test_what_is_not_there_is_said() -> None:
    routes = table(route(1))
    with pytest.raises(NotFound):
        routes.find("n", None)
    with pytest.raises(NotFound, match="there is 1"):
        routes.find("m", "2")
    with pytest.raises(BadRequest):
        routes.find("m", "x")
    routes.apply(Routes(removed=(1,)))
    with pytest.raises(NotFound):
        routes.find("m", None)


def test_a_slot_of_a_former_version_takes_no_newer_route_away() -> None:
    routes = table(route(1))
    routes.apply(Routes(upsert=(route(2),), removed=(1,)))
    assert routes.find("m", "1").slot == 2
    assert len(routes) == 1


def test_routes_of_one_architecture_share_their_signature() -> None:
    messages = [Routes(upsert=(route(slot, name=f"m{slot}"),)) for slot in (1, 2)]
    routes = RouteTable()
    for message in messages:
        routes.apply(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Routes))
    one, two = routes.find("m1", None), routes.find("m2", None)
    assert one.inputs == messages[0].upsert[0].inputs
    assert one.inputs is two.inputs


# --- names ----------------------------------------------------------------------------------------
def name(routes: RouteTable, **said: Any) -> None:
    routes.apply(Routes(names=(ModelNames(name="m", **said),)))


def test_an_alias_means_the_model_or_one_of_its_versions() -> None:
    routes = table(route(1, "1"), route(2, "2"))
    name(routes, aliases={"old-name": "", "stable": "1"})
    assert routes.find("old-name", None).version == "2"
    assert routes.find("stable", None).version == "1"
    assert routes.find("stable", "2").version == "2"
    name(routes)
    with pytest.raises(NotFound):
        routes.find("stable", None)


def test_a_model_goes_before_an_alias_of_its_name() -> None:
    routes = table(route(1), route(2, name="other"))
    name(routes, aliases={"other": ""})
    assert routes.find("other", None).name == "other"
    routes.apply(Routes(removed=(2,)))
    assert routes.find("other", None).name == "m"


def test_a_canary_gets_its_share_and_the_rest_stays() -> None:
    routes = table(route(1, "1"), route(2, "2"))
    name(routes, weights={"2": 25.0}, aliases={"also": ""})
    assert routes.is_split("m")
    assert routes.is_split("also")
    got = [routes.find("also", None).version for _ in range(2000)]
    assert 300 < got.count("2") < 700
    assert got.count("1") + got.count("2") == 2000
    assert routes.find("m", CANARY).version == "2"
    assert routes.find("m", STABLE).version == "1"
    assert routes.find("m", "2").version == "2"


def test_the_share_of_a_version_that_cannot_serve_goes_to_the_others() -> None:
    routes = table(route(1, "1"), route(2, "2", "unavailable"))
    name(routes, weights={"2": 100.0})
    assert not routes.is_split("m")
    assert routes.find("m", None).version == "1"
    assert routes.find("m", CANARY).version == "1"
    routes.apply(Routes(upsert=(route(2, "2"),)))
    assert routes.find("m", None).version == "2"


def test_a_version_on_trial_is_for_those_who_name_it_while_there_is_another() -> None:
    routes = table(route(1, "1"), route(2, "2"))
    name(routes, held=("2",))
    assert routes.find("m", None).version == "1"
    assert routes.find("m", "2").version == "2"
    routes.apply(Routes(removed=(1,)))
    assert routes.find("m", None).version == "2"
    assert not routes.is_split("m")


def test_an_ensemble_is_usable_as_long_as_its_steps_are() -> None:
    steps = (Step(model="m", inputs={"x": "x"}, outputs={"x": "y"}),)
    given = route(1).inputs
    pair = msgspec.structs.replace(
        route(9, name="pair"),
        inputs=given,
        outputs=(msgspec.structs.replace(given[0], name="y"),),
        steps=steps,
    )
    routes = table(pair)
    with pytest.raises(NotFound, match=r"model .m.\): there is no model of this name"):
        routes.find_usable("pair", None)
    for state in ("packing", "ready"):  # requests wait for an image at the step that needs it
        routes.apply(
            Routes(upsert=(msgspec.structs.replace(route(1, state=state), outputs=given),))
        )
        found = routes.find_usable("pair", None)
        assert found is not None
        assert found.slot == 9
        assert routes.is_ready("pair", None) is (state == "ready")
    routes.apply(Routes(upsert=(route(2, state="unloaded"),), removed=(1,)))
    with pytest.raises(NotFound, match="it is unloaded"):
        routes.is_ready("pair", None)
    other = msgspec.structs.replace(route(3, state="unavailable"), reason="it is torn")
    routes.apply(Routes(upsert=(other,), removed=(2,)))
    with pytest.raises(Unavailable, match=r"cannot be served.*it is torn"):
        routes.find_usable("pair", "1")
