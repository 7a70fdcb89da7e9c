"""The versions that a worker knows: what they are, their programs, and where their weights lie.

Owns per version its signature, its mapping of the DEVICE arena and its bound model, and the helper
thread that reads image headers and imports programs.  The number of bound models is limited; the
one that ran longest ago goes first and is bound again when it is wanted.

A version here:

    UNKNOWN -> KNOWN                      [learn]
    KNOWN -> PLACED -> BOUND              [place, then the program is loaded, then bind]
    KNOWN -> OPEN -> BOUND                [the program is loaded, then place, then bind]
    KNOWN, OPEN, BOUND -> the same        [prepare: mapped where it will be placed, and not read]
    prepared -> as if placed              [arrive: it is resident there]
    BOUND, PLACED -> the same, unplaced   [the lease was refused; another generation will come]
    BOUND -> KNOWN                        [make_room]
    any -> FAILED -> KNOWN                [fail; after a pause that grows with every failure]
    any -> UNKNOWN                        [forget]

A version is runnable when it is bound and placed.  Whether its weights are still there is decided
by the lease before each batch, not here.

Invariants
 1. A program is bound once while its mapping lives: the address stays, wherever the chunks lie.
 2. Weights are touched only under a lease, binding included.
 3. A mapping is closed only after its model is let go of.
 4. What may be leased is mapped where it lies, in whole.  Only a message maps, in its turn (`place`,
    `prepare`): who shared which chunks when it was sent was true then, and whoever is mapped here was told
    of before, so it takes chunks only from versions that had left them.  Later it might take them from one
    that shares them since; so `arrive`, which follows a word and no message, maps nothing.

Called by the worker's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from overcommit.runtime import reshape
from overcommit.runtime.arena import Ranges, WeightsMapping
from overcommit.runtime.by_slot import BySlot
from overcommit.runtime.config import BOUND_MODELS_MAX, LOAD_BACKOFF_S, MIB
from overcommit.runtime.errors import ImageError, ModelError, OvercommitError
from overcommit.runtime.helper import Helper
from overcommit.runtime.launch import Starter
from overcommit.runtime.mixing import Families, Family
from overcommit.runtime.sequence_batch import SequenceBatch
from overcommit.runtime.sequence_signature import SequenceSignature
from overcommit.runtime.sequence_terms import slots_of
from overcommit.runtime.sequences import Sequences
from overcommit.runtime.signature import Signature, signature_of
from overcommit.runtime.worker_messages import Coming, Placed, VersionInfo

if TYPE_CHECKING:  # engines are imported by the process that runs them
    from overcommit.runtime.engines import BoundModel, Program
    from overcommit.runtime.image import ImageHeader

log = logging.getLogger("overcommit.worker")

Opened = tuple["ImageHeader", "Program"]
Opener = Callable[[VersionInfo], Opened]

# Faulting a model's pages in costs 65-240 us a MiB, and every lane of the worker waits; a larger
# model takes its faults, 16 pages each, in its first batch.
POPULATE_BYTES_MAX: Final = 16 * MIB


@dataclass(slots=True, frozen=True)
class Failure:
    """Why a version cannot be served here, and until when nobody tries again."""

    code: str
    message: str
    until_ns: int


@dataclass(slots=True, eq=False)
class Version:
    """One version in this worker."""

    info: VersionInfo
    signature: Signature
    mapping: WeightsMapping | None = None
    address: int = 0  # of the mapping, while there is one
    generation: int | None = None  # where it was placed last, as far as this worker knows
    opened: Opened | None = None  # loaded, not bound yet
    is_loading: bool = False
    model: BoundModel | None = None
    starter: Starter | None = None  # begins its batches on a device, where one runs it
    family: Family | None = None  # that it may share batches with
    has_run: bool = False
    content_digest: int | None = None  # of its weights, as they were packed
    checked: int | None = None  # the generation whose bytes were held against it
    failure: Failure | None = None
    failures: int = 0
    sequences: Sequences | None = None  # of a model with state
    sequence_batch: SequenceBatch | None = None  # how their batches are made, once it was bound
    bindings: int = 0

    @property
    def is_runnable(self) -> bool:
        """Bound and placed: a batch may try for the lease."""
        return self.model is not None and self.generation is not None

    @property
    def title(self) -> str:
        """Its name for logs and messages."""
        return f"model '{self.info.name}' version {self.info.version}"

    @property
    def incarnation(self) -> Hashable:
        """What changes whenever a state is lost that the model keeps itself."""
        own: Hashable = getattr(self.model, "incarnation", None)
        return self.bindings if own is None else own

    def failing(self, now_ns: int) -> Failure | None:
        """The failure that still holds, if any."""
        if self.failure is not None and now_ns >= self.failure.until_ns:
            self.failure = None
        return self.failure


class Loader:
    """Reads headers and imports programs, in a helper thread."""

    def __init__(self, open_program: Opener, ring: Callable[[], None]) -> None:
        self._open = open_program
        self._helper: Helper[VersionInfo, Opened] = Helper("loader", ring)

    def load(self, info: VersionInfo) -> None:
        """Ask for a version's program; the doorbell rings when it is there."""
        self._helper.ask(info, lambda: self._open(info))

    def try_take(self) -> tuple[VersionInfo, Opened | Exception] | None:
        """Return one finished load, or None."""
        return self._helper.try_take()

    def close(self) -> None:
        """Nobody waits for programs any more."""
        self._helper.close()


def _version_of(info: VersionInfo, died_ns: int) -> Version:
    sequence = info.config.sequence
    if sequence is None:
        return Version(info, signature_of(info.config))
    idle_ns = sequence.idle_us * 1000
    # What was idle for so long would be over anyway.
    lost_until_ns = died_ns + idle_ns if died_ns else 0
    sequences = Sequences(info.name, slots_of(info.config), idle_ns, lost_until_ns)
    return Version(info, SequenceSignature(info.config, sequences), sequences=sequences)


@dataclass(slots=True)
class Versions:
    """Every version this worker has been told of, by slot."""

    ranges: Ranges
    loader: Loader
    families: Families
    bound_max: int = BOUND_MODELS_MAX
    died_ns: int = 0  # when the worker before this one died; 0: there was none
    digest_of: Callable[[int, int], int] | None = (
        None  # (address, bytes), where somebody wants checks
    )
    released: int = 0  # models let go of, ever
    by_slot: BySlot[Version] = field(default_factory=BySlot)
    _stateful: set[int] = field(default_factory=set)  # slots of versions with sequences
    _recent: dict[int, None] = field(default_factory=dict)  # slots with a mapping, by last run

    def get(self, slot: int) -> Version | None:
        """The version in this slot; None when nobody has told us of one."""
        return self.by_slot.find(slot)

    def of(self, slots: Sequence[int]) -> list[Version]:
        """The versions in these slots, which must be known."""
        return cast("list[Version]", list(map(self.by_slot.__getitem__, slots)))

    # --- events ---------------------------------------------------------------------------------
    def learn(self, info: VersionInfo) -> Version:
        """A version was announced."""
        self.forget(info.slot)
        version = _version_of(info, self.died_ns)
        self.by_slot.put(info.slot, version)
        if version.sequences is not None:
            self._stateful.add(info.slot)
        return version

    def forget(self, slot: int) -> None:
        """The version is gone: let go of its model, then of its addresses."""
        version = self.by_slot.take(slot)
        self._stateful.discard(slot)
        if version is not None:
            self._release(version)

    def place(self, placed: Placed) -> Version | None:
        """Map a version where it lies now; None when it is not known (any more).

        Raises OSError or ValueError when it cannot be mapped.
        """
        version = self.get(placed.slot)
        if version is None:
            return None
        version.generation = None
        self._map(version, placed)
        version.generation = placed.generation
        self.on_run(placed.slot)
        return version

    def prepare(self, coming: Coming) -> bool:
        """Map a version where it will lie; nothing may read it before it is placed there.

        False: it is not known, or cannot be mapped ahead.

        Raises OSError or ValueError when it cannot be mapped.
        """
        version = self.get(coming.slot)
        if version is None or not self.ranges.can_map_ahead:
            return False
        assert version.generation is None, "what is placed may be read"
        self._map(version, coming)
        self._recent.setdefault(coming.slot, None)
        return True

    def arrive(self, coming: Coming) -> Version | None:
        """What was mapped ahead is resident there; None when it is not mapped any more.

        Nobody can have taken a chunk of it: from Coming on it holds them, and who was told of them since
        was told that they are shared.
        """
        version = self.get(coming.slot)
        if version is None or version.mapping is None:
            return None
        if version.mapping.generation != coming.generation:
            return None
        version.generation = coming.generation
        self.on_run(coming.slot)
        return version

    def _map(self, version: Version, where: Placed | Coming) -> None:
        """Map a version, unless that was done ahead and nothing was mapped otherwise since."""
        if version.mapping is not None and not version.mapping.can_hold(where.extents):
            self._release(version)  # it gets another address, and is bound there
        if version.mapping is None:
            version.mapping = self.ranges.open(version.info.nbytes)
        if version.mapping.is_at(where.extents, where.generation, where.shared):
            return
        populate = version.info.nbytes <= POPULATE_BYTES_MAX
        version.mapping.map(where.extents, where.generation, populate, where.shared)
        version.address = version.mapping.address  # of a small one on a GPU, known only now

    def open(self, version: Version) -> None:
        """See to it that the program is loaded, in the helper thread."""
        if version.model is None and version.opened is None and not version.is_loading:
            version.is_loading = True
            self.loader.load(version.info)

    def take_opened(self) -> tuple[Version, Exception | None] | None:
        """Take note of one finished load; its version, and what it raised."""
        while (done := self.loader.try_take()) is not None:
            info, result = done
            version = self.get(info.slot)
            if version is None or version.info is not info:
                continue  # forgotten meanwhile
            version.is_loading = False
            if isinstance(result, Exception):
                return version, result
            version.opened = result
            return version, None
        return None

    def bind(self, version: Version) -> None:
        """Join program and weights.  The caller holds the lease.  Raises what the engine raises."""
        assert version.opened is not None, "loaded first"
        assert version.mapping is not None, "placed first"
        header, program = version.opened
        memory = version.mapping.view()
        if version.sequences is not None:
            version.sequence_batch = SequenceBatch(version.info.config)
        version.model = program.bind(header, memory)
        version.content_digest = header.content_digest if header else None
        version.bindings += 1
        # A mixed batch copies weights with the CPU; who has state runs by itself.
        can_mix = isinstance(memory, memoryview) and version.sequences is None
        mixed = program.mixed(header) if can_mix else None
        if reshape.has_any(version.info.config):
            version.model, mixed = reshape.Reshaped(version.model, version.info.config), None
        if version.sequences is None:
            version.starter = getattr(version.model, "starter", None)
        version.family = self.families.of(mixed, version.signature)
        version.opened = None  # the header's tables are of no use any more
        version.failures = 0

    def must_check(self, version: Version) -> bool:
        """Whether the weights, where they are now, are to be held against their digest."""
        return (
            self.digest_of is not None
            and version.content_digest is not None
            and version.generation not in (None, version.checked)
        )

    def check(self, version: Version) -> None:
        """Digest the weights where they lie.  The caller holds the lease.  Raises ImageError."""
        assert self.digest_of is not None, "asked by `must_check`"
        found = self.digest_of(version.address, version.info.nbytes)
        if found != version.content_digest:
            raise ImageError(
                "its weights are in DEVICE other than they were packed: the digest is "
                f"{found:016x}, not {version.content_digest:016x}"
            )
        version.checked = version.generation

    def fail(self, version: Version, error: Exception, now_ns: int) -> Failure:
        """A version cannot be opened, mapped or bound: nobody tries for a while."""
        self._release(version)
        pause_s = LOAD_BACKOFF_S[min(version.failures, len(LOAD_BACKOFF_S) - 1)]
        version.failures += 1
        code, reason = ModelError.code, f"{type(error).__name__}: {error}"
        if isinstance(error, OvercommitError):
            code, reason = error.code, error.message
        version.failure = Failure(
            code=code,
            message=f"{version.title} cannot be started: {reason}",
            until_ns=now_ns + int(pause_s * 1e9),
        )
        return version.failure

    def end_idle_sequences(self, now_ns: int) -> None:
        """Let go of the states of sequences that nobody has gone on with."""
        for slot in self._stateful:
            version = self.by_slot[slot]
            assert version is not None, "forgotten with its version"
            sequences = version.sequences
            assert sequences is not None, "noted for its sequences"
            sequences.expire_idle(now_ns)

    # --- the bound ------------------------------------------------------------------------------
    def on_run(self, slot: int) -> None:
        """A version ran: it is the last to go."""
        if 2 * len(self._recent) < self.bound_max and slot in self._recent:
            return  # nobody will have to go for long; the order is only kept when it may matter
        self._recent.pop(slot, None)
        self._recent[slot] = None

    def on_runs(self, slots: Sequence[int]) -> None:
        """Several versions ran that have a mapping."""
        if 2 * len(self._recent) >= self.bound_max:
            for slot in slots:
                self.on_run(slot)

    def make_room(self, is_waiting: Callable[[int], bool]) -> list[int]:
        """Let go of what ran longest ago while there is too much; return the slots."""
        gone: list[int] = []
        for slot in list(self._recent):
            if len(self._recent) <= self.bound_max:
                break
            version = self.by_slot[slot]
            assert version is not None, "what has a mapping is known"
            has_state = version.sequences is not None and len(version.sequences)
            if not is_waiting(slot) and not version.is_loading and not has_state:
                self._release(version)
                gone.append(slot)
        return gone

    def _release(self, version: Version) -> None:
        self._recent.pop(version.info.slot, None)
        version.generation = None
        version.opened = None
        self.released += version.model is not None
        version.model = version.starter = None
        version.family = None
        version.has_run = False
        version.checked = None
        if version.mapping is not None:
            version.mapping.close()
            version.mapping = None
            version.address = 0
