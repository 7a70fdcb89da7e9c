"""Ensembles that are new or changed: what served before serves until their steps are there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from tests.runtime.test_ensemble_watch import STEP, World, ensemble
from tests.runtime.test_registry import source

from overcommit.runtime import ensemble_trials
from overcommit.runtime.config import Step
from overcommit.runtime.ensemble_trials import EnsembleTrials
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.repository import VersionSource

SECOND_NS = 1_000_000_000


class Trying(World):
    """The same, with the catalogue's part in trials."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, rehearses=True)
        self.said: list[tuple[str, bool, str]] = []  # version, whether it takes over, why not
        self.trials = EnsembleTrials(self.registry, self.watch, self._decide)

    def _decide(self, slot: int, ok: bool, reason: str) -> None:
        entry = self.registry.by_slot(slot)
        assert entry is not None
        self.said.append((entry.version, ok, reason))
        self.registry.on_rehearsed(slot, ok, reason)
        self.changed()

    def scan(self, *sources: VersionSource) -> list[int]:
        changes = self.registry.apply_scan(sources)
        self.rollout.changes({each.name for each in sources})
        self.changed()
        for slot in (*changes.added, *changes.on_trial):
            entry = self.registry.by_slot(slot)
            if entry is not None and entry.on_trial and entry.config.steps:
                self.trials.add(slot)
        return changes.to_pack

    def look(self) -> list[tuple[str, bool, str]]:
        """Give every trial the time to end; return what was said."""
        for _ in range(9):
            self.now_ns += 1_000 * SECOND_NS
            self.trials.step(self.now_ns)
        said, self.said = self.said, []
        return said

    def serving(self) -> Entry:
        """What requests that name no version get."""
        self.rollout.changes(["pair"])
        versions = self.registry.versions("pair")
        return [each for each in versions if not each.on_trial][-1]


@pytest.fixture
def world(tmp_path: Path) -> Trying:
    world = Trying(tmp_path)
    world.pack(*world.scan(source(), ensemble()))
    assert world.look() == []
    return world


def second(model: str = STEP) -> VersionSource:
    return dataclasses.replace(ensemble(model), version="2", folder="/models/pair/2")


def handing_on(model: str) -> VersionSource:
    """An ensemble of one ensemble."""
    made = ensemble(model)
    assert made.config is not None
    step = Step(model=model, inputs={"x": "x"}, outputs={"y": "y"})
    return dataclasses.replace(made, config=msgspec.structs.replace(made.config, steps=(step,)))


def test_changed_files_take_over_when_their_step_is_there(world: Trying) -> None:
    before = world.serving()
    world.scan(source(), ensemble("other"))
    ((version, takes_over, reason),) = world.look()
    assert (version, takes_over) == ("1", False)
    assert "step 1 (model 'other'): there is no model of this name" in reason
    assert world.serving() is before
    assert before.reason.startswith("serving the version from before its last change: ensemble")
    assert world.state() is State.READY
    slots = world.scan(source(), ensemble("other"), source("other"))
    assert world.look() == []  # its image is being made
    assert world.serving() is before
    world.pack(*slots)
    assert world.look() == [("1", True, "")]
    assert world.serving() is not before
    assert (world.serving().reason, world.state()) == ("", State.READY)


def test_a_new_version_takes_over_when_its_step_is_there(world: Trying) -> None:
    world.scan(source(), ensemble(), second("other"))
    ((version, takes_over, _),) = world.look()
    assert (version, takes_over, world.serving().version) == ("2", False, "1")
    world.pack(*world.scan(source(), ensemble(), second("other"), source("other")))
    assert world.look() == [("2", True, "")]
    assert world.serving().version == "2"


def test_what_can_be_asked_at_once_takes_over_at_once(world: Trying) -> None:
    world.scan(source(), ensemble(), second())
    assert world.look() == [("2", True, "")]


def test_a_reason_is_said_once_and_another_one_too(world: Trying) -> None:
    world.scan(source(), ensemble("other"))
    assert len(world.look()) == 1
    world.changed()
    assert world.look() == []
    world.scan(source(), ensemble("other"), source("other", error="it is torn"))
    ((_, takes_over, reason),) = world.look()
    assert (takes_over, "it is torn" in reason) == (False, True)


def test_where_nothing_can_be_asked_the_newest_says_why(world: Trying) -> None:
    world.scan(source(), ensemble(), second("other"))
    world.look()
    world.scan(source(), second("other"))  # the first one is gone
    ((version, takes_over, reason),) = world.look()
    assert (version, takes_over, "model 'other'" in reason) == ("2", True, True)
    assert world.serving().version == "2"


def test_files_that_were_broken_already_are_replaced_by_what_is_broken_now(tmp_path: Path) -> None:
    world = Trying(tmp_path)
    world.scan(ensemble("nobody"))
    world.scan(ensemble("nothing"))
    ((_, takes_over, reason),) = world.look()
    assert (takes_over, "'nothing'" in reason) == (True, True)
    assert "'nothing'" in world.reason()


def test_old_files_that_come_back_end_the_trial(world: Trying) -> None:
    before = world.serving()
    world.scan(source(), ensemble("other"))
    assert len(world.look()) == 1
    world.scan(source(), ensemble())
    assert (world.serving(), before.reason) == (before, "")
    assert world.look() == []
    assert world.serving() is before


def test_an_unloaded_ensemble_is_replaced_and_stays_unloaded(world: Trying) -> None:
    world.scan(source(), ensemble("other"))
    world.look()
    world.registry.set_unloaded("pair")
    world.changed()
    ((_, takes_over, _),) = world.look()
    assert takes_over
    assert world.registry.find("pair").state is State.UNLOADED
    assert "other" in world.registry.find("pair").fingerprint


def test_a_step_of_the_serving_version_may_go_and_come_back(world: Trying) -> None:
    world.scan(source(), ensemble(), second("other"))
    world.look()
    for _ in range(2):
        world.registry.set_unloaded(STEP)
        world.changed()
        assert world.look() == []
        assert world.serving().version == "1"
        world.registry.set_loaded(STEP)
        world.changed()
        assert world.look() == []


def test_a_version_on_trial_stays_so_over_an_unload(world: Trying) -> None:
    world.scan(source(), ensemble(), second("other"))
    world.look()
    world.registry.set_unloaded("pair")
    world.changed()
    assert world.look() == []
    for entry in world.registry.set_loaded("pair"):
        if entry.on_trial:  # as the catalogue has it
            world.trials.add(entry.slot)
    world.changed()
    ((version, takes_over, _),) = world.look()
    assert (version, takes_over, world.serving().version) == ("2", False, "1")


def test_who_is_refused_is_undecided_again_when_something_has_changed(world: Trying) -> None:
    world.scan(source(), ensemble(), second("other"))
    slot = world.registry.find("pair", "2").slot
    assert slot in world.trials
    world.look()
    assert slot not in world.trials
    world.changed()
    assert slot in world.trials
    world.look()
    assert slot not in world.trials
    world.trials.add(slot)  # somebody loads it
    assert slot in world.trials
    assert world.look() == []
    assert slot not in world.trials


@pytest.mark.parametrize("where", ["in its place", "another version"])
def test_steps_that_would_lead_back_to_what_takes_over_are_a_circle(
    world: Trying, where: str
) -> None:
    above = dataclasses.replace(handing_on("pair"), name="above")
    world.scan(source(), ensemble(), above)
    assert world.look() == []
    assert world.watch.verdict(world.registry.find("above")).fate == "ready"
    changed = [handing_on("above")]
    if where == "another version":
        changed = [
            ensemble(),
            dataclasses.replace(changed[0], version="2", folder="/models/pair/2"),
        ]
    world.scan(source(), *changed, above)
    ((_, takes_over, reason),) = world.look()
    assert (takes_over, "in a circle" in reason) == (False, True)
    assert world.watch.verdict(world.registry.find("above")).fate == "ready"


def test_thousands_take_over_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble_trials, "LOOK_NS", -1)
    world = Trying(tmp_path)
    first = [dataclasses.replace(ensemble(), name=f"pair-{n}") for n in range(5)]
    both = [*first, *(dataclasses.replace(each, version="2") for each in first)]
    world.pack(*world.scan(source(), *first))
    world.scan(source(), *both)
    world.trials.step(SECOND_NS)
    assert len(world.said) == 1
    assert len(world.look()) == 5
