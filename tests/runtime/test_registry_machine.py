"""The registry under random scans, packs, loads and unloads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.entries import Entry, State, order
from overcommit.runtime.errors import NotFound, RepositoryError
from overcommit.runtime.packer_messages import PackDone
from overcommit.runtime.registry import Registry
from overcommit.runtime.repository import VersionSource

FAILED = PackDone(job=1, ok=False, message="no engine can run it")


def source(name: str, version: str, fingerprint: str, how: str) -> VersionSource:
    config = None if how else ModelConfig()
    error = "broken" if how == "broken" else None
    folder = f"/models/{name}/{version}"
    return VersionSource(name, version, folder, fingerprint, config, error, how == "settling")


def packed(folder: Path) -> PackDone:
    image = folder / "k.image"
    image.write_bytes(b"i")
    return PackDone(job=1, ok=True, image_path=str(image), nbytes=1, engine="torch")


NAMES = st.sampled_from(["a", "b"])


class RegistryMachine(RuleBasedStateMachine):
    """Random scans, packs, loads and unloads against what must always hold."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.registry = Registry(self.path)
        self.to_pack: list[int] = []
        self.routed: dict[int, str] = {}  # what front ends know: slot -> name/version
        self.leaving: list[int] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    def announce(self, entries: list[Entry], removed: list[int]) -> None:
        for entry in entries:
            self.routed[entry.slot] = f"{entry.name}/{entry.version}"
        for slot in removed:
            self.routed.pop(slot, None)
            self.leaving.append(slot)

    @rule(
        found=st.dictionaries(
            st.tuples(NAMES, st.sampled_from(["1", "2"])),
            st.tuples(st.sampled_from("xyz"), st.sampled_from(["", "broken", "settling"])),
        )
    )
    def scan(self, found: dict[tuple[str, str], tuple[str, str]]) -> None:
        sources = [
            source(name, version, mark, how) for (name, version), (mark, how) in found.items()
        ]
        changes = self.registry.apply_scan(sources)
        self.to_pack += changes.to_pack
        slots = (*changes.added, *changes.changed)
        self.announce([e for s in slots if (e := self.registry.by_slot(s))], changes.removed)

    @rule(ok=st.booleans(), at=st.integers(0, 9))
    def pack(self, ok: bool, at: int) -> None:
        if not self.to_pack:
            return
        slot = self.to_pack.pop(at % len(self.to_pack))
        if self.registry.by_slot(slot) is None:
            return
        removed = self.registry.on_packed(slot, packed(self.path) if ok else FAILED)
        entry = self.registry.by_slot(slot)
        self.announce([entry] if entry else [], removed)

    @rule(name=NAMES, load=st.booleans())
    def load_or_unload(self, name: str, load: bool) -> None:
        try:
            if load:
                affected = self.registry.set_loaded(name)
                self.to_pack += [e.slot for e in affected if e.state is State.PACKING]
                removed = []
            else:
                changes = self.registry.set_unloaded(name)
                slots = (*changes.added, *changes.changed)
                affected = [e for e in map(self.registry.by_slot, slots) if e is not None]
                removed = changes.removed
        except (NotFound, RepositoryError):
            return
        self.announce(affected, removed)

    @rule()
    def release(self) -> None:
        while self.leaving:
            self.registry.release(self.leaving.pop())

    @invariant()
    def what_is_listed_is_what_is_current_in_order(self) -> None:
        registry = self.registry
        listed = list(registry.entries())
        assert listed == sorted(registry._current.values(), key=order)
        for entry in listed:
            assert any(each is entry for each in registry.versions(entry.name))

    @invariant()
    def front_ends_know_exactly_what_is_current(self) -> None:
        if hasattr(self, "registry"):
            current = {e.slot: f"{e.name}/{e.version}" for e in self.registry.entries()}
            assert self.routed == current
            assert len(set(current.values())) == len(current)

    @invariant()
    def states_are_sound(self) -> None:
        if not hasattr(self, "registry"):
            return
        for entry in self.registry.entries():
            assert not entry.retired
            assert self.registry.by_slot(entry.slot) is entry
            if entry.state is State.READY:
                assert entry.image_path
            if entry.state is State.UNAVAILABLE:
                assert entry.reason
            if entry.state is State.PACKING:
                assert entry.slot in self.to_pack


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
