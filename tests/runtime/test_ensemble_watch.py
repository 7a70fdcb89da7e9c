"""What the supervisor says of ensembles while versions and names change."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
from tests.runtime.test_registry import FAILED, packed, source

from overcommit.runtime import ensemble_watch
from overcommit.runtime.config import ModelConfig, Naming, Step, TensorSpec
from overcommit.runtime.ensemble_watch import SAY_NS, EnsembleWatch
from overcommit.runtime.entries import State
from overcommit.runtime.registry import Registry
from overcommit.runtime.repository import VersionSource
from overcommit.runtime.rollout import Rollout
from overcommit.runtime.steps import verdict_of

STEP = "minilm"


def ensemble(model: str = STEP, version: str = "") -> VersionSource:
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 16))
    step = Step(model=model, version=version, inputs={"x": "x"}, outputs={"x": "y"})
    config = ModelConfig(
        inputs=(spec,), outputs=(named(spec, "y"),), steps=(step,), engine="ensemble"
    )
    return VersionSource("pair", "1", "/models/pair", f"{model}{version}", config)


def named(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name=name, datatype=spec.datatype, shape=spec.shape)


class World:
    """A registry, what names mean in it, and how often either changed."""

    def __init__(self, folder: Path, *, rehearses: bool = False) -> None:
        self.folder = folder
        self.registry = Registry(folder / "cache")
        self.registry.rehearses = rehearses
        self.rollout = Rollout(str(folder), self.registry)
        self.revision = 0
        self.now_ns = 0
        self.watch = EnsembleWatch(self.registry, self.rollout, lambda: self.revision)

    def scan(self, *sources: VersionSource) -> list[int]:
        changes = self.registry.apply_scan(sources)
        self.rollout.changes({each.name for each in sources})
        self.changed()
        return changes.to_pack

    def pack(self, *slots: int, ok: bool = True) -> None:
        for slot in slots:
            self.registry.on_packed(slot, packed(self.folder) if ok else FAILED)
        self.changed()

    def changed(self) -> None:
        self.revision += 1

    def state(self) -> State:
        return self.watch.state(self.registry.find("pair"))

    def reason(self) -> str:
        return self.watch.verdict(self.registry.find("pair")).reason

    def step(self) -> None:
        self.now_ns += 1_000 * SAY_NS
        self.watch.step(self.now_ns)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_an_ensemble_follows_its_step(world: World) -> None:
    world.scan(ensemble())
    assert world.state() is State.UNAVAILABLE
    slots = world.scan(ensemble(), source())
    assert (world.state(), "is being made" in world.reason()) == (State.PACKING, True)
    world.pack(*slots, ok=False)
    assert (world.state(), FAILED.message in world.reason()) == (State.UNAVAILABLE, True)
    world.registry.set_loaded(STEP)
    world.pack(*slots)
    assert (world.state(), world.reason()) == (State.READY, "")
    world.registry.set_unloaded(STEP)
    world.changed()
    assert (world.state(), "/minilm/load" in world.reason()) == (State.UNAVAILABLE, True)
    world.registry.set_unloaded("pair")
    world.changed()
    assert (world.state(), world.reason()) == (State.UNLOADED, "")


def test_a_step_means_what_a_front_end_would_take_it_for(world: World) -> None:
    called = ModelConfig(naming=Naming(aliases={"best": "", "old": "1"}, called="v1"))
    first = dataclasses.replace(source(), config=called)
    world.pack(*world.scan(ensemble("best"), first))
    assert world.state() is State.READY
    for model, version in (("old", ""), (STEP, "1"), (STEP, "v1")):
        world.scan(ensemble(model, version), first)
        assert world.state() is State.READY, (model, version)
    world.scan(ensemble(STEP, "2"), first)
    assert "there is no version 2" in world.reason()
    # A version that is broken is not meant, while another one serves.
    world.scan(ensemble(), first, source(version="2", error="it is torn"))
    assert world.state() is State.READY
    # One with a share of a rollout is not who the others' requests go to.
    shared = dataclasses.replace(
        source(version="3"), config=ModelConfig(naming=Naming(weights={"3": 10}))
    )
    world.scan(ensemble(), first, shared)
    assert world.state() is State.READY


def test_a_verdict_is_worked_out_once_between_two_changes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counting(route: ensemble_watch.Route, find: object) -> object:
        asked.append(route.name)
        return verdict_of(route, find)  # type: ignore[arg-type]

    monkeypatch.setattr(ensemble_watch, "verdict_of", counting)
    world.pack(*world.scan(ensemble(), source()))
    for _ in range(9):
        assert world.state() is State.READY
    world.step()
    assert asked == ["pair"]
    world.changed()
    assert world.state() is State.READY
    assert asked == ["pair"] * 2


def test_a_reason_is_logged_once_and_so_is_its_end(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "overcommit.catalogue")
    world.scan(ensemble())
    for _ in range(3):
        world.changed()
        world.step()
    ((said,),) = ([record.getMessage() for record in caplog.records],)
    assert said.startswith("pair version 1: ensemble 'pair', step 1 (model 'minilm'): there is no")
    slots = world.scan(ensemble(), source())
    world.step()  # it waits for the image: nothing is known yet
    assert len(caplog.records) == 1
    world.pack(*slots)
    for _ in range(3):
        world.changed()
        world.step()
    assert [record.getMessage() for record in caplog.records][1:] == [
        "pair version 1: its steps are there"
    ]


def test_looks_are_some_time_apart_however_often_things_change(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.scan(ensemble())
    world.step()
    world.scan(ensemble("nobody"))
    world.watch.step(world.now_ns + SAY_NS - 1)
    assert len(caplog.records) == 1
    world.step()
    assert "nobody" in caplog.records[-1].getMessage()
