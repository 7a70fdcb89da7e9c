"""The routing table: what a name means, and what many routes share."""

from __future__ import annotations

import msgspec
import pytest

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import BadRequest, NotFound
from overcommit.runtime.messages import Route, Routes
from overcommit.server.routing import RouteTable


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
