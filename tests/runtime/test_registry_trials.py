"""The registry where new versions show that they work first, and where a policy leaves versions out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.runtime.test_registry import FAILED, make_ready, packed, source

from overcommit.runtime.config import ModelConfig, Naming
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.registry import Registry
from overcommit.runtime.repository import VersionSource
from overcommit.runtime.rollout import Rollout


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "cache")
    made.rehearses = True
    return made


def spare(version: str) -> VersionSource:
    return dataclasses.replace(source(version=version), spare=True)


def test_a_version_beside_one_that_serves_is_on_trial_until_it_has_worked(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    assert not registry.find("minilm").on_trial
    make_ready(registry, tmp_path, source(), source(version="2"))
    new = registry.find("minilm", "2")
    assert new.on_trial
    assert registry.on_rehearsed(new.slot, False, "too hot") == []
    assert new.on_trial
    assert "too hot" in new.reason
    assert registry.on_rehearsed(new.slot, True, "") == []
    assert (new.on_trial, new.reason) == (False, "")


def test_changed_files_take_over_only_when_they_have_worked(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    old = registry.find("minilm")
    for works in (False, True):
        changes = make_ready(registry, tmp_path, source(fingerprint=f"new {works}"))
        (slot,) = changes.to_pack
        new = registry.by_slot(slot)
        assert new is not None
        assert registry.find("minilm") is old
        assert registry.is_successor(new)
        assert {id(old), id(new)} <= set(map(id, registry.with_hidden()))
        assert registry.on_rehearsed(slot, works, "too hot") == [old.slot if works else slot]
        assert registry.find("minilm") is (new if works else old)
        assert works or "too hot" in old.reason


def test_files_that_change_again_end_the_trial(registry: Registry, tmp_path: Path) -> None:
    make_ready(registry, tmp_path, source())
    (slot,) = make_ready(registry, tmp_path, source(fingerprint="b")).to_pack
    assert slot in registry.apply_scan([source(fingerprint="c")]).removed
    assert registry.on_rehearsed(slot, True, "") == []
    assert registry.find("minilm").fingerprint == "a"


def test_a_version_that_the_policy_leaves_out_goes_when_another_serves(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    old = registry.find("minilm")
    for _ in range(2):
        changes = make_ready(registry, tmp_path, spare("1"), source(version="2"))
        assert changes.removed == []
    assert registry.drop_spares("minilm") == []
    registry.on_rehearsed(registry.find("minilm", "2").slot, True, "")
    assert registry.drop_spares("minilm") == [old.slot]
    assert [entry.version for entry in registry.versions("minilm")] == ["2"]


def test_where_nothing_chosen_works_the_next_older_version_fills_in(
    registry: Registry, tmp_path: Path
) -> None:
    sources = [spare("1"), spare("2"), source(version="3")]
    changes = registry.apply_scan(sources)
    assert changes.lacking == []
    assert registry.fill_in("minilm") is None
    registry.on_packed(changes.to_pack[0], FAILED)
    slot = registry.fill_in("minilm")
    assert slot is not None
    assert registry.apply_scan(sources).removed == []
    registry.on_packed(slot, packed(tmp_path))
    assert registry.find("minilm").version == "2"
    assert registry.apply_scan(sources).removed == []
    assert registry.find("minilm", "3").state is State.UNAVAILABLE


def test_what_names_mean_changes_without_another_slot_and_is_known_after_a_start(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source(fingerprint="0123456789abcdef-1"))
    slot = registry.find("minilm").slot
    rollout = Rollout(str(tmp_path), registry)
    assert rollout.changes(["minilm"]) == []
    config = ModelConfig(naming=Naming(aliases={"small": ""}))
    renamed = dataclasses.replace(source(fingerprint="0123456789abcdef-2"), config=config)
    changes = registry.apply_scan([renamed])
    assert (changes.renamed, changes.to_pack) == ([slot], [])
    assert [names.aliases for names in rollout.changes(["minilm"])] == [{"small": ""}]
    assert rollout.changes(["minilm"]) == []
    again = Registry(tmp_path / "cache")
    assert again.apply_scan([renamed]).to_pack == []


def test_what_an_operator_says_goes_before_the_files_and_outlives_a_start(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source(), source(version="2"))
    Rollout(str(tmp_path), registry).say("minilm", weights='{"2": 5}')
    rollout = Rollout(str(tmp_path), registry)
    (names,) = rollout.changes(["minilm"])
    assert names.weights == {"2": 5.0}
    rollout.say("minilm", weights="null")
    (names,) = rollout.changes(["minilm"])
    assert names.weights == {}


def renewed(registry: Registry, tmp_path: Path) -> tuple[Entry, Entry]:
    """A version whose image is gone, and the one that is made again."""
    make_ready(registry, tmp_path, source())
    old = registry.find("minilm")
    new = registry.renew(old)
    assert new is not None
    return old, new


def test_an_image_that_is_gone_is_made_again_once_behind_the_version_that_serves(
    registry: Registry, tmp_path: Path
) -> None:
    old, new = renewed(registry, tmp_path)
    assert (new.state, new.on_trial) == (State.PACKING, True)
    assert registry.renew(old) is None
    assert registry.renew(new) is None
    assert registry.find("minilm") is old
    assert registry.on_packed(new.slot, packed(tmp_path, "again")) == []
    assert registry.on_rehearsed(new.slot, True, "") == [old.slot]
    assert registry.find("minilm") is new


def test_an_image_that_cannot_be_made_again_leaves_the_reason_and_is_tried_once_more(
    registry: Registry, tmp_path: Path
) -> None:
    old, new = renewed(registry, tmp_path)
    assert registry.on_packed(new.slot, FAILED) == []
    assert registry.find("minilm") is old
    assert FAILED.message in old.reason
    assert registry.renew(old) is not None


def test_what_could_not_be_packed_is_packed_again_alone_or_behind_what_serves(
    registry: Registry, tmp_path: Path
) -> None:
    (slot,) = registry.apply_scan([source()]).to_pack
    assert registry.again("minilm", "1") is None  # it is on its way
    registry.on_packed(slot, FAILED)
    entry = registry.again("minilm", "1")
    assert entry is registry.find("minilm")
    assert entry.state is State.PACKING
    registry.on_packed(slot, packed(tmp_path))
    assert registry.again("minilm", "1") is None
    (new_slot,) = registry.apply_scan([source(fingerprint="b")]).to_pack
    registry.on_packed(new_slot, FAILED)
    new = registry.again("minilm", "1")
    assert new is not None
    assert registry.is_successor(new)
    assert new.fingerprint == "b"
    assert registry.again("nobody", "1") is None
