"""An entry of the registry: one version, what it is good for, and what others must know of it.

Invariants
 1. An entry is one version's files as a scan found them: when they change, the registry makes
    another entry, unless what names mean is all that has changed (`is_renamed`).
 2. What packing found out (config, image, parts, engine) is put in and taken out as a whole, by
    `take_facts` and `facts_of`.
 3. Front ends and workers hear of an entry by `to_route` and `to_info` alone.

The registry alone writes `state`; its docstring has the state machine.  Called by the supervisor,
from its one thread, and by `overcommit pack`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from overcommit.runtime.config import ModelConfig, imaged
from overcommit.runtime.folder_walk import CONTENT_DIGITS
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.labels import label_files
from overcommit.runtime.packer_messages import PackDone
from overcommit.runtime.parts import PartInfo
from overcommit.runtime.repository import VersionSource
from overcommit.runtime.sequence_terms import visible_inputs, visible_outputs
from overcommit.runtime.worker_messages import VersionInfo

_BROKEN_CONFIG: Final = ModelConfig()
SERVES_ON: Final = "serving the version from before its last change"  # and why, behind a colon


class State(enum.Enum):
    """What a version is good for; the values are those of `Route.state`."""

    PACKING = "packing"
    READY = "ready"
    UNAVAILABLE = "unavailable"
    UNLOADED = "unloaded"


@dataclass(slots=True, eq=False)
class Entry:
    """One version.  `config` has inputs and outputs filled in once the version is packed."""

    slot: int
    name: str
    version: str
    folder: str
    fingerprint: str
    config: ModelConfig
    state: State
    reason: str = ""
    image_path: str = ""
    nbytes: int = 0
    parts: tuple[PartInfo, ...] = ()
    packed_bytes: int = 0  # of what is in no part; 0: it is not packed
    engine: str = ""
    program_key: str = ""
    retired: bool = False  # nobody may name it any more; it answers what had come before
    ended: bool = False  # and neither does it do that
    source_config: ModelConfig | None = None  # as in model.toml; None: broken on disk
    on_trial: bool = False  # only who names it gets it, while an older version serves
    seen: VersionSource | None = None  # by the last scan; may be what a successor is made from


@dataclass(slots=True)
class RegistryChanges:
    """Slots that a scan touched.

    `added` and `changed` are to be announced (a changed version's new slot, once it is current),
    `removed` leaves when nothing uses it, `to_pack` needs an image; of `renamed` only what names mean
    has changed.  What is `broken` has files that cannot be served, and says why in its reason; it may serve
    as it was.  Of `lacking` models no version that their policy chooses works.
    """

    added: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    to_pack: list[int] = field(default_factory=list)
    renamed: list[int] = field(default_factory=list)
    on_trial: list[int] = field(default_factory=list)  # successors that have an image
    lacking: list[str] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def sort_in(self, entry: Entry) -> None:
        """Note what a new entry needs."""
        if entry.state is State.PACKING:
            self.to_pack.append(entry.slot)
        elif entry.state is State.UNAVAILABLE:
            self.broken.append(entry.slot)


def new_entry(slot: int, source: VersionSource) -> Entry:
    """Return the entry of a folder that has to be packed, as far as is known."""
    return Entry(
        slot=slot,
        name=source.name,
        version=source.version,
        folder=source.folder,
        fingerprint=source.fingerprint,
        config=source.config or _BROKEN_CONFIG,
        state=State.PACKING,
        source_config=source.config,
        seen=source,
    )


def is_renamed(entry: Entry, source: VersionSource) -> bool:
    """Whether nothing has changed but what names mean."""
    old, new = entry.source_config, source.config
    same = entry.fingerprint[:CONTENT_DIGITS] == source.fingerprint[:CONTENT_DIGITS]
    return same and old is not None and new is not None and imaged(old) == imaged(new)


def order(entry: Entry) -> tuple[str, int, str]:
    """Return what entries are sorted by: the name, then the version as a number."""
    number = int(entry.version) if entry.version.isdecimal() and len(entry.version) < 20 else -1
    return entry.name, number, entry.version


def take_facts(entry: Entry, done: PackDone) -> None:
    """Put in what packing found out."""
    entry.config = done.config
    entry.image_path = done.image_path
    entry.nbytes = done.nbytes
    entry.parts, entry.packed_bytes = done.parts, done.packed_bytes
    entry.engine = done.engine
    entry.program_key = done.program_key


def facts_of(entry: Entry) -> PackDone:
    """Return what packing found out, as the packer said it."""
    return PackDone(
        job=0,
        ok=True,
        config=entry.config,
        image_path=entry.image_path,
        nbytes=entry.nbytes,
        parts=entry.parts,
        packed_bytes=entry.packed_bytes,
        engine=entry.engine,
        program_key=entry.program_key,
    )


def to_route(entry: Entry) -> Route:
    """Return what a front end must know."""
    config = entry.config
    naming = None if entry.source_config is None else entry.source_config.naming
    return Route(
        slot=entry.slot,
        name=entry.name,
        version=entry.version,
        state=entry.state.value,
        reason=entry.reason,
        platform=entry.engine,
        labels=label_files(entry.folder, config, entry.source_config),
        inputs=visible_inputs(config),
        outputs=visible_outputs(config),
        max_batch_size=config.batching.max_batch_size,
        max_queue_size=config.batching.waiting_max,
        timeout_ms=config.timeout_ms,
        steps=config.steps,
        sequence=config.sequence is not None,
        priority_levels=config.batching.priority_levels,
        adapts=config.adapts,
        called=naming.called if naming is not None else "",
    )


def to_info(entry: Entry) -> VersionInfo:
    """Return what a worker must know."""
    return VersionInfo(
        slot=entry.slot,
        name=entry.name,
        version=entry.version,
        image_path=entry.image_path,
        nbytes=entry.nbytes,
        config=entry.config,
    )
