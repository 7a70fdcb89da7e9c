"""A GPU's worker: batches that are begun, and landed when the device has done them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cuda_rig import started
from fake_backend import FakeBackend
from fake_driver import FakeDriver, FakeGpu
from fake_kernels import FakeKernels
from front_rig import Front
from worker_rig import FakeModel, FakeProgram, Programs, Rig, X, ready, vector_config

from overcommit.kernels import digest
from overcommit.runtime import _shm
from overcommit.runtime.config import PAGE_BYTES
from overcommit.runtime.device_limits import FLIGHTS_MAX, GRAPH_AFTER
from overcommit.runtime.engines import places
from overcommit.runtime.engines.bound_module import BoundModule
from overcommit.runtime.errors import DeviceLost
from overcommit.runtime.flight_deck import FlightDeck
from overcommit.runtime.payload_pins import PayloadPins
from overcommit.runtime.worker_messages import Forget

CONFIG = vector_config(max_batch_size=8)


class DeviceProgram(FakeProgram):
    """y = x * weight, by torch on the device; NaN is an error of the model."""

    def bind(self, header: object, memory: memoryview) -> Any:
        self.bindings += 1

        def call(arguments: dict[str, Any]) -> torch.Tensor:
            x: torch.Tensor = arguments["x"]
            if x.isnan().any():
                raise ValueError("not a number")
            return x * torch.frombuffer(bytearray(memory[:4]), dtype=torch.float32)

        return BoundModule(call, CONFIG)


class DevicePrograms(Programs):
    """Slots from 9 on have models that the CPU runs."""

    def __getitem__(self, slot: int) -> FakeProgram:
        return self.by_slot.setdefault(slot, DeviceProgram() if slot < 9 else FakeProgram())


class Hangar:
    """The rig, its device, and one front end."""

    def __init__(self) -> None:
        self.driver: FakeDriver = started(FakeGpu())
        self.is_lost = False
        self.backend = FakeBackend(lambda: self.is_lost, self.driver.reaches)
        places.choose("cpu", self.backend)
        self.rig = Rig(DevicePrograms(), pins=PayloadPins(self.driver, 0))
        self.front: Front = self.rig.link()
        self.rig.until(lambda: len(self.rig.worker.links) == 1)
        (link,) = self.rig.worker.links.all()
        assert link.pin is not None
        link.pin.wait()

    @property
    def deck(self) -> FlightDeck:
        assert self.rig.worker.deck is not None
        return self.rig.worker.deck

    @property
    def kernels(self) -> FakeKernels:
        assert self.backend.kernels is not None
        return self.backend.kernels

    def begin(self, *slots: int, x: Any = X) -> list[int]:
        """Submit, and let the worker begin it; nothing lands."""
        self.backend.is_held = True
        ids = [self.front.submit(slot, [x]) for slot in slots]
        self.rig.until(lambda: self.rig.status.read()[4][-len(ids) :] == ids)
        assert not set(ids) & set(self.front.collect())
        return ids

    def land(self, *ids: int) -> None:
        self.backend.is_held = False
        self.rig.answered(self.front, *ids)


@pytest.fixture
def hangar() -> Iterator[Hangar]:
    made = Hangar()
    yield made
    made.is_lost = False
    made.backend.is_held = False
    made.deck.clear(None, 0)
    made.rig.close()
    places.choose("cpu")
    assert made.driver.registered == {}


def lease(hangar: Hangar, slot: int) -> int:
    return int(hangar.rig.leases.read(slot)[0])


def test_a_batch_is_gathered_and_scattered_by_the_device(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG, weight=2.0)
    hangar.kernels.launches.clear()
    ids = [hangar.front.submit(3, [n * X]) for n in range(1, 4)]
    hangar.rig.answered(hangar.front, *ids)
    for n, one in enumerate(ids, 1):
        (y,) = hangar.front.outputs(one)
        assert y.tolist() == (2 * n * X).tolist()
    gathered = ("gather", "UINT32", "UINT32", 4)  # three requests, and a row up to the bucket
    assert hangar.kernels.launches == [gathered, ("scatter", "UINT32", "UINT32", 3)]


def test_lease_and_page_hold_until_the_device_has_done_it(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    (one,) = hangar.begin(3)
    assert lease(hangar, 3) == 1
    hangar.rig.settle()
    _, started_ns, phase, slot, ids = hangar.rig.status.read()
    assert (phase, slot, ids, started_ns > 0) == (_shm.PHASE_COMPUTE, 3, [one], True)
    hangar.land(one)
    assert lease(hangar, 3) == 0
    assert hangar.rig.status.read()[1:3] == (0, _shm.PHASE_IDLE)


def test_lanes_are_in_the_air_together_each_on_a_seat_and_no_more_than_there_are(
    hangar: Hangar,
) -> None:
    slots = range(1, FLIGHTS_MAX + 2)
    for slot in slots:
        ready(hangar.rig, hangar.front, slot, config=CONFIG, weight=float(slot))
    flown = [hangar.begin(slot)[0] for slot in slots[:FLIGHTS_MAX]]
    last = hangar.front.submit(slots[-1], [X])
    hangar.rig.settle()
    assert len(hangar.deck.flights) == FLIGHTS_MAX
    assert [len(queue) for queue in hangar.backend._queues] == [1] * FLIGHTS_MAX
    assert hangar.rig.status.read()[4] == flown
    hangar.land(*flown, last)
    for slot, one in zip(slots, [*flown, last], strict=True):
        assert hangar.front.outputs(one)[0].tolist() == (slot * X).tolist()


def test_a_lane_has_one_batch_in_the_air_and_what_comes_meanwhile_is_the_next(
    hangar: Hangar,
) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    (first,) = hangar.begin(3)
    later = [hangar.front.submit(3, [X]) for _ in range(3)]
    hangar.rig.settle()
    assert len(hangar.deck.flights) == 1
    hangar.land(first, *later)
    assert [hangar.front.answers[one][6] for one in (first, *later)] == [1, 3, 3, 3]


def test_requests_in_the_air_are_no_more_than_the_page_names(hangar: Hangar) -> None:
    big = vector_config(max_batch_size=64)
    for slot in (3, 4):
        ready(hangar.rig, hangar.front, slot, config=big)
    hangar.begin(*([3] * (_shm.STATUS_BATCH_MAX - 24)))
    more = [hangar.front.submit(4, [X]) for _ in range(32)]
    hangar.rig.until(lambda: more[-1] in hangar.rig.status.read()[4])
    assert hangar.rig.status.read()[4] == more, "the first batch was waited for"
    hangar.land(*more)


def test_a_request_that_fails_takes_no_neighbour_along(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    good, bad = hangar.front.submit(3, [X]), hangar.front.submit(3, [X * np.nan])
    hangar.rig.answered(hangar.front, good, bad)
    assert hangar.front.outputs(good)[0].tolist() == (2 * X).tolist()
    assert hangar.front.status(bad) == _shm.MODEL_ERROR
    assert "ValueError: not a number" in hangar.front.text(bad)
    assert (lease(hangar, 3), hangar.rig.status.read()[1]) == (0, 0)
    after = hangar.front.submit(3, [X])
    hangar.rig.answered(hangar.front, after)


def test_an_error_lets_the_others_land_first(hangar: Hangar) -> None:
    for slot in (3, 4):
        ready(hangar.rig, hangar.front, slot, config=CONFIG)
    (flown,) = hangar.begin(4)
    bad = [hangar.front.submit(3, [X * np.nan]) for _ in range(2)]
    hangar.land(flown, *bad)
    assert [hangar.front.status(one) for one in (flown, *bad)] == [
        *(_shm.OK, _shm.MODEL_ERROR, _shm.MODEL_ERROR)
    ]


def test_a_version_that_is_forgotten_lands_before_it_goes(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    (one,) = hangar.begin(3)
    hangar.rig.control.send(Forget(slot=3))
    hangar.rig.answered(hangar.front, one)
    assert hangar.front.status(one) == _shm.OK
    assert hangar.rig.worker.versions.get(3) is None


def test_a_front_end_that_goes_is_written_to_no_more(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    hangar.begin(3)
    hangar.rig.unlink(hangar.front)
    hangar.rig.until(lambda: not len(hangar.rig.worker.links))
    assert len(hangar.deck.flights) == 0
    assert lease(hangar, 3) == 0
    assert hangar.driver.registered == {}


def test_weights_that_are_not_resident_are_asked_for_again(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    hangar.rig.table.set(3, _shm.EVICTING, 1)
    one = hangar.front.submit(3, [X])
    hangar.rig.settle()
    assert (len(hangar.deck.flights), lease(hangar, 3)) == (0, 0)
    hangar.rig.control.send(hangar.rig.publish(3, 2, 5.0))
    hangar.rig.answered(hangar.front, one)
    assert hangar.front.outputs(one)[0].tolist() == (5 * X).tolist()


def test_a_model_of_the_cpu_runs_when_nothing_is_in_the_air(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    ready(hangar.rig, hangar.front, 9, config=CONFIG)
    (flown,) = hangar.begin(3)
    seen: list[int] = []
    model = hangar.rig.worker.versions.get(9)
    assert model is not None
    assert isinstance(model.model, FakeModel)

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(hangar.deck.flights))
        return {"y": inputs["x"]}

    model.model.override = run
    one = hangar.front.submit(9, [X])
    hangar.rig.answered(hangar.front, flown, one)
    assert seen == [0]


def test_a_graph_is_replayed_on_its_own_seat(hangar: Hangar) -> None:
    for slot in (3, 4):
        ready(hangar.rig, hangar.front, slot, config=CONFIG, weight=float(slot))
    for _ in range(GRAPH_AFTER + 1):
        hangar.rig.answered(hangar.front, hangar.front.submit(3, [X]))
    (other,) = hangar.begin(4)  # on the seat of the graph, the first of those that are free
    (again,) = hangar.begin(3, x=3 * X)
    assert [len(queue) for queue in hangar.backend._queues] == [2, 0, 0, 0]
    hangar.land(other, again)
    assert hangar.front.outputs(other)[0].tolist() == (4 * X).tolist()
    assert hangar.front.outputs(again)[0].tolist() == (9 * X).tolist()


@pytest.mark.parametrize("lacks", ["kernels", "registered memory"])
def test_without_the_device_path_the_cpu_makes_and_splits_the_batch(
    hangar: Hangar, lacks: str
) -> None:
    kernels = hangar.kernels
    if lacks == "kernels":
        hangar.backend.kernels = None
    else:
        (link,) = hangar.rig.worker.links.all()
        assert link.pin is not None
        link.pin.is_pinned = False
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    (one,) = hangar.begin(3, x=7 * X)
    hangar.land(one)
    assert hangar.front.outputs(one)[0].tolist() == (14 * X).tolist()
    assert kernels.launches == []


def test_a_device_that_is_lost_ends_the_worker_with_the_requests_on_its_page(
    hangar: Hangar,
) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG)
    (one,) = hangar.begin(3)
    hangar.is_lost, hangar.backend.is_held = True, False
    with pytest.raises(DeviceLost):
        hangar.rig.answered(hangar.front, one)
    assert hangar.rig.status.read()[4] == [one]


# --- what DEVICE holds --------------------------------------------------------------------------
def checks(hangar: Hangar, digest: int) -> None:
    """Have weights held against this digest, as `--verify always` does."""
    versions = hangar.rig.worker.versions
    versions.digest_of = hangar.kernels.digest
    version = versions.get(3)
    assert version is not None
    version.content_digest = digest


def test_weights_that_come_back_are_held_against_their_digest_once(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG, weight=2.0)
    page = hangar.rig.device[3 * PAGE_BYTES : 4 * PAGE_BYTES]
    checks(hangar, digest.digest(page))
    hangar.kernels.launches.clear()
    hangar.rig.control.send(hangar.rig.publish(3, 2, 2.0))
    one = hangar.front.submit(3, [X])
    hangar.rig.answered(hangar.front, one)
    assert hangar.front.status(one) == _shm.OK
    hangar.rig.control.send(hangar.rig.publish(3, 2, 2.0))
    hangar.rig.settle()
    assert [each[0] for each in hangar.kernels.launches].count("digest") == 1


def test_weights_that_are_not_what_was_packed_are_not_run(hangar: Hangar) -> None:
    ready(hangar.rig, hangar.front, 3, config=CONFIG, weight=2.0)
    checks(hangar, digest.digest(hangar.rig.device[3 * PAGE_BYTES : 4 * PAGE_BYTES]))
    hangar.rig.control.send(hangar.rig.publish(3, 2, 2.5))
    hangar.rig.settle()
    one = hangar.front.submit(3, [X])
    hangar.rig.answered(hangar.front, one)
    assert "its weights are in DEVICE other than they were packed" in hangar.front.text(one)
    assert lease(hangar, 3) == 0
