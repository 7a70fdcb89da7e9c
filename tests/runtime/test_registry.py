"""The registry: slots, states, and what a second start knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.entries import RegistryChanges, State, to_info, to_route
from overcommit.runtime.errors import NotFound, RepositoryError
from overcommit.runtime.packer_messages import PackDone
from overcommit.runtime.registry import Registry
from overcommit.runtime.repository import VersionSource
from overcommit.runtime.slots import IDLE_SLOTS

SPEC = TensorSpec(name="x", datatype="FP32", shape=(-1, 16))


def source(
    name: str = "minilm",
    version: str = "1",
    fingerprint: str = "a",
    error: str | None = None,
    settling: bool = False,
) -> VersionSource:
    config = None if error or settling else ModelConfig()
    return VersionSource(
        name, version, f"/models/{name}/{version}", fingerprint, config, error, settling
    )


def packed(tmp_path: Path, key: str = "k") -> PackDone:
    image = tmp_path / f"{key}.image"
    image.write_bytes(b"i" * 4096)
    config = ModelConfig(inputs=(SPEC,), outputs=(SPEC,))
    return PackDone(
        job=1, ok=True, image_path=str(image), nbytes=4096, engine="torch", config=config
    )


FAILED = PackDone(job=1, ok=False, message="no engine can run it")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "cache")


def make_ready(registry: Registry, tmp_path: Path, *sources: VersionSource) -> RegistryChanges:
    changes = registry.apply_scan(sources)
    for slot in changes.to_pack:
        assert registry.on_packed(slot, packed(tmp_path)) == []
    return changes


# --- a version's way ----------------------------------------------------------------------------
def test_a_new_version_is_packed_and_then_ready(registry: Registry, tmp_path: Path) -> None:
    changes = registry.apply_scan([source()])
    assert changes.added == changes.to_pack
    assert len(changes.added) == 1
    entry = registry.find("minilm")
    assert entry.state is State.PACKING
    assert registry.on_packed(entry.slot, packed(tmp_path)) == []
    assert entry.state is State.READY
    assert to_route(entry).inputs == (SPEC,)
    assert to_route(entry).state == "ready"
    assert to_info(entry).nbytes == 4096


def test_the_same_scan_again_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    make_ready(registry, tmp_path, source(), source("bad", error="broken"))
    assert registry.apply_scan([source(), source("bad", error="broken")]) == RegistryChanges()


def test_a_broken_folder_is_listed_with_its_reason(registry: Registry, tmp_path: Path) -> None:
    changes = make_ready(registry, tmp_path, source("bad", error="unknown key"), source())
    assert len(changes.added) == 2
    entry = registry.find("bad")
    assert (entry.state, entry.reason) == (State.UNAVAILABLE, "unknown key")
    assert registry.find("minilm").state is State.READY


def test_a_version_that_cannot_be_packed_is_unavailable(registry: Registry) -> None:
    (slot,) = registry.apply_scan([source()]).to_pack
    registry.on_packed(slot, FAILED)
    entry = registry.find("minilm")
    assert (entry.state, entry.reason) == (State.UNAVAILABLE, "no engine can run it")


def test_a_settling_version_is_left_alone(registry: Registry, tmp_path: Path) -> None:
    assert registry.apply_scan([source(settling=True)]) == RegistryChanges()
    make_ready(registry, tmp_path, source())
    assert registry.apply_scan([source(fingerprint="b", settling=True)]) == RegistryChanges()
    assert registry.find("minilm").state is State.READY


# --- changes on disk ----------------------------------------------------------------------------
def test_the_old_version_serves_until_the_new_one_is_packed(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    old = registry.find("minilm")
    changes = registry.apply_scan([source(fingerprint="b")])
    assert (changes.added, changes.changed, changes.removed) == ([], [], [])
    (slot,) = changes.to_pack
    assert slot != old.slot
    assert registry.find("minilm") is old
    assert list(registry.entries()) == [old]
    assert registry.on_packed(slot, packed(tmp_path)) == [old.slot]
    assert registry.find("minilm").slot == slot
    assert registry.by_slot(old.slot) is old  # what still runs may ask for it
    registry.release(old.slot)
    assert registry.by_slot(old.slot) is None


def test_the_old_version_stays_when_the_new_one_cannot_be_packed(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    old = registry.find("minilm")
    (slot,) = registry.apply_scan([source(fingerprint="b")]).to_pack
    assert registry.on_packed(slot, FAILED) == []
    assert registry.by_slot(slot) is None
    assert registry.find("minilm") is old
    assert old.state is State.READY
    assert "no engine can run it" in old.reason
    assert registry.apply_scan([source(fingerprint="b")]) == RegistryChanges()


def test_the_old_version_stays_when_the_new_folder_is_broken(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    registry.apply_scan([source(fingerprint="b", error="unknown key")])
    entry = registry.find("minilm")
    assert entry.state is State.READY
    assert "unknown key" in entry.reason
    assert registry.apply_scan([source()]) == RegistryChanges()
    assert entry.reason == ""


def test_a_second_change_replaces_a_successor_that_is_not_packed_yet(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    old = registry.find("minilm")
    (first,) = registry.apply_scan([source(fingerprint="b")]).to_pack
    changes = registry.apply_scan([source(fingerprint="c")])
    assert changes.removed == [first]
    (second,) = changes.to_pack
    assert registry.on_packed(first, packed(tmp_path)) == []
    assert registry.find("minilm") is old
    assert registry.on_packed(second, packed(tmp_path)) == [old.slot]


def test_a_broken_version_that_is_mended_is_replaced_at_once(registry: Registry) -> None:
    (old,) = registry.apply_scan([source(error="broken")]).added
    changes = registry.apply_scan([source(fingerprint="b")])
    assert changes.removed == [old]
    assert changes.changed == changes.to_pack
    assert registry.find("minilm").state is State.PACKING


def test_a_change_back_to_known_files_needs_no_packing(registry: Registry, tmp_path: Path) -> None:
    make_ready(registry, tmp_path, source())
    make_ready(registry, tmp_path, source(version="2"), source())
    first = registry.find("minilm", "1").slot
    (slot,) = registry.apply_scan([source(fingerprint="b"), source(version="2")]).to_pack
    registry.on_packed(slot, packed(tmp_path, "b"))
    changes = registry.apply_scan([source(), source(version="2")])
    assert changes.to_pack == []
    assert changes.removed == [slot]
    assert registry.find("minilm", "1").state is State.READY
    assert registry.find("minilm", "1").slot not in (first, slot)


def test_a_version_that_is_gone_is_removed_with_its_successor(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    old = registry.find("minilm").slot
    (successor,) = registry.apply_scan([source(fingerprint="b")]).to_pack
    assert sorted(registry.apply_scan([]).removed) == sorted([old, successor])
    assert len(registry) == 0
    with pytest.raises(NotFound):
        registry.find("minilm")


# --- load and unload ----------------------------------------------------------------------------
def test_what_is_unloaded_is_retired_and_another_like_it_is_loaded(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source(), source(version="2"))
    former = registry.versions("minilm")
    changes = registry.set_unloaded("minilm")
    assert (changes.removed, changes.changed) == ([entry.slot for entry in former], [])
    current = registry.versions("minilm")
    assert [entry.slot for entry in current] == changes.added
    assert [entry.version for entry in current] == ["1", "2"]
    assert {entry.state for entry in current} == {State.UNLOADED}
    # Those before serve what they were asked, as if they had been replaced.
    assert all(entry.retired and entry.state is State.READY for entry in former)
    assert [registry.by_slot(entry.slot) for entry in former] == list(former)
    assert registry.set_unloaded("minilm") == RegistryChanges()
    assert registry.set_loaded("minilm") == list(current)
    assert {entry.state for entry in current} == {State.READY}
    assert not any(entry.retired for entry in current)
    for entry in former:
        registry.end(entry.slot)
        assert entry.ended
        registry.release(entry.slot)
        assert registry.by_slot(entry.slot) is None
    assert registry.versions("minilm") == current


def test_without_a_slot_that_is_free_an_unload_changes_the_version_in_place(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "cache", slots_max=1)
    make_ready(registry, tmp_path, source())
    slot = registry.find("minilm").slot
    changes = registry.set_unloaded("minilm")
    assert (changes.changed, changes.added, changes.removed) == ([slot], [], [])
    assert [entry.slot for entry in registry.set_loaded("minilm")] == [slot]


def test_what_was_to_replace_an_unloaded_version_does_and_stays_unloaded(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    (successor,) = registry.apply_scan([source(fingerprint="b")]).to_pack
    (unloaded,) = registry.set_unloaded("minilm").added
    assert registry.successor_slot(registry.find("minilm")) == successor
    assert registry.on_packed(successor, packed(tmp_path, "new")) == [unloaded]
    assert registry.find("minilm").slot == successor
    assert registry.find("minilm").state is State.UNLOADED


def test_an_unloaded_model_stays_unloaded_when_it_changes(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    registry.set_unloaded("minilm")
    changes = registry.apply_scan([source(fingerprint="b"), source(version="2")])
    assert changes.to_pack == []
    assert {entry.state for entry in registry.entries()} == {State.UNLOADED}
    assert {entry.state for entry in registry.set_loaded("minilm")} == {State.PACKING}


def test_a_version_unloaded_while_it_is_packed_stays_unloaded(
    registry: Registry, tmp_path: Path
) -> None:
    (slot,) = registry.apply_scan([source()]).to_pack
    registry.set_unloaded("minilm")
    registry.on_packed(slot, packed(tmp_path))
    assert registry.find("minilm").state is State.UNLOADED
    assert registry.set_loaded("minilm")[0].state is State.READY


def test_load_tries_a_failed_version_again(registry: Registry) -> None:
    (slot,) = registry.apply_scan([source()]).to_pack
    registry.on_packed(slot, FAILED)
    (entry,) = registry.set_loaded("minilm")
    assert (entry.state, entry.reason) == (State.PACKING, "")


def test_load_packs_again_when_the_image_is_gone(registry: Registry, tmp_path: Path) -> None:
    make_ready(registry, tmp_path, source())
    registry.set_unloaded("minilm")
    (tmp_path / "k.image").unlink()
    assert registry.set_loaded("minilm")[0].state is State.PACKING


def test_loading_a_broken_folder_says_what_is_wrong(registry: Registry) -> None:
    registry.apply_scan([source(error="unknown key 'pinn'")])
    with pytest.raises(RepositoryError, match="unknown key 'pinn'"):
        registry.set_loaded("minilm")


@pytest.mark.parametrize("operation", ["find", "set_loaded", "set_unloaded"])
def test_an_unknown_model_is_not_found(registry: Registry, operation: str) -> None:
    with pytest.raises(NotFound, match="Request for unknown model: 'nope' is not found"):
        getattr(registry, operation)("nope")


# --- lookups ------------------------------------------------------------------------------------
def test_latest_is_the_highest_number_that_can_be_used(registry: Registry, tmp_path: Path) -> None:
    make_ready(
        registry, tmp_path, *(source(version=v) for v in ("9", "10", "2")), source(version="11")
    )
    assert registry.find("minilm").version == "11"
    registry.find("minilm", "11").state = State.UNAVAILABLE
    assert registry.find("minilm").version == "10"
    registry.set_unloaded("minilm")
    assert registry.find("minilm").version == "11"


def test_a_missing_version_names_those_that_exist(registry: Registry) -> None:
    registry.apply_scan([source(version="1"), source(version="2")])
    with pytest.raises(NotFound, match=r"'minilm' version 7 is not found; there is 1, 2"):
        registry.find("minilm", "7")


def test_pages_follow_each_other_in_order(registry: Registry) -> None:
    sources = [source(name, version) for name in ("b", "a") for version in ("10", "9")]
    registry.apply_scan(sources)
    rows = [(e.name, e.version) for start in (0, 3) for e in registry.page(start, 3)]
    assert rows == [("a", "9"), ("a", "10"), ("b", "9"), ("b", "10")]
    assert [(e.name, e.version) for e in registry.entries()] == rows
    assert registry.page(99, 5) == []


def test_a_freed_slot_is_used_again_last(tmp_path: Path) -> None:
    registry = Registry(tmp_path, slots_max=IDLE_SLOTS + 2)
    used = []
    for number in range(IDLE_SLOTS + 2):
        used += registry.apply_scan([source(fingerprint=str(number))]).to_pack
        for slot in used[:-1]:
            if registry.by_slot(slot) is None and slot in registry._leaving:
                registry.release(slot)
    assert len(set(used)) == IDLE_SLOTS + 2


def test_a_full_registry_leaves_versions_out_and_serves_the_others(tmp_path: Path) -> None:
    registry = Registry(tmp_path, slots_max=3)
    registry.apply_scan([source(version=str(number)) for number in range(1, 6)])
    assert len(registry) == 3


# --- the pack index -----------------------------------------------------------------------------
def test_a_second_start_packs_nothing(tmp_path: Path) -> None:
    make_ready(Registry(tmp_path), tmp_path, source(), source("other"))
    registry = Registry(tmp_path)
    changes = registry.apply_scan([source(), source("other"), source("third")])
    assert [registry.by_slot(slot).name for slot in changes.to_pack] == ["third"]  # type: ignore[union-attr]
    assert registry.find("minilm").state is State.READY
    assert registry.find("minilm").config.inputs == (SPEC,)
    assert registry.find("minilm").config is registry.find("other").config


@pytest.mark.parametrize("change", ["fingerprint", "folder", "config"])
def test_a_fact_is_used_only_for_the_same_files_and_config(tmp_path: Path, change: str) -> None:
    make_ready(Registry(tmp_path), tmp_path, source())
    value = ModelConfig(weight=5) if change == "config" else "/else"
    changed = dataclasses.replace(source(), **{change: value})
    assert len(Registry(tmp_path).apply_scan([changed]).to_pack) == 1


def test_a_fact_whose_image_is_gone_is_not_used(tmp_path: Path) -> None:
    make_ready(Registry(tmp_path), tmp_path, source())
    (tmp_path / "k.image").unlink()
    assert len(Registry(tmp_path).apply_scan([source()]).to_pack) == 1


def test_an_index_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    registry = Registry(tmp_path / "cache")
    (slot,) = registry.apply_scan([source()]).to_pack
    registry.on_packed(slot, packed(tmp_path))
    assert registry.find("minilm").state is State.READY


def test_a_folder_that_went_and_came_back_needs_no_packing(
    registry: Registry, tmp_path: Path
) -> None:
    make_ready(registry, tmp_path, source())
    registry.apply_scan([])
    changes = registry.apply_scan([source()])
    assert changes.to_pack == []
    assert registry.find("minilm").state is State.READY


def test_what_is_broken_is_reported_once_and_again_when_it_changes(
    registry: Registry, tmp_path: Path
) -> None:
    bad = source("bad", error="no files")
    changes = registry.apply_scan([bad, source()])
    (slot,) = changes.broken
    assert registry.find("bad").slot == slot
    assert registry.apply_scan([bad, source()]).broken == []
    registry.on_packed(registry.find("minilm").slot, packed(tmp_path))
    changes = registry.apply_scan([source("bad", error="no weights"), source(error="cut off")])
    reasons = [registry.find(name).reason for name in ("bad", "minilm")]
    assert [entry.reason for entry in map(registry.by_slot, changes.broken) if entry] == reasons
    assert registry.find("minilm").state is State.READY
    assert reasons[1].endswith("cut off")
