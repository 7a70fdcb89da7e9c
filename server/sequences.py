"""Which sequence a request is of, and which worker has it.

A sequence's worker is known by its id alone: every front end finds the same seat, without a word to each
other.  When a worker dies, the sequences of its seat are gone; its successor sits in the same seat and
knows none.  So that nobody is told that he forgot START when it was the worker that forgot, each front end
remembers for the sequences that it has sent where they went.

    unknown --a START is pushed--> at a link --END--> unknown
    at a link --[its worker dies]--> lost --the next request: WorkerLost, or a START--> ...

Invariants
 1. All requests of one sequence go to the same seat; while nobody sits there they are held.
 2. A request in the middle of a sequence never goes to another incarnation than the one before it did,
    as far as this front end has seen them.
 3. At most SEQUENCES_KNOWN_MAX are remembered; of one that was forgotten the worker says that it needs
    a START.

Called by `inference` (`read`), and by the dispatch.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from overcommit.runtime.config import SEQUENCE_ID_BYTES_MAX
from overcommit.runtime.errors import BadRequest, WorkerLost
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.sequence_terms import (
    ASK_BYTES,
    ASK_ROOM_BYTES,
    Ask,
    Key,
    decode,
    mark_again,
)
from overcommit.server import codec
from overcommit.server.limits import SEQUENCES_KNOWN_MAX

if TYPE_CHECKING:
    from overcommit.server.parcels import Parcels, Pending
    from overcommit.server.worker_link import WorkerLink

_TO_COME: Final = 0  # in the place of a link: its START waits for a worker
_UINT64_MAX: Final = 2**64 - 1


# --- what a request says ------------------------------------------------------------------------
def read(parameters: codec.Parameters | None, name: str) -> Ask:
    """Read the parameters of a request to the stateful model `name`.  Raises BadRequest."""
    key = _key(parameters)
    if not key:
        raise BadRequest(
            f"inference request to model '{name}' must specify a non-zero or non-empty correlation ID"
        )
    return _ask(parameters, key)


def read_if_any(parameters: codec.Parameters | None) -> Ask | None:
    """Read the parameters of a request that need not be of a sequence.  Raises BadRequest."""
    key = _key(parameters)
    if not key:
        return None
    return _ask(parameters, key)


def _ask(parameters: codec.Parameters | None, key: Key) -> Ask:
    start = _flag(parameters, "sequence_start")
    end = _flag(parameters, "sequence_end")
    return Ask(key, start, end, sent_ns=time.monotonic_ns())


def parameters_of(ask: Ask) -> codec.Parameters:
    """Say it as the parameters of a request."""
    return {
        "sequence_id": msgspec.Raw(codec.encode(ask.key)),
        "sequence_start": msgspec.Raw(codec.encode(ask.is_start)),
        "sequence_end": msgspec.Raw(codec.encode(ask.is_end)),
    }


def _key(parameters: codec.Parameters | None) -> Key:
    raw = None if parameters is None else parameters.get("sequence_id")
    if raw is None:
        return 0
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = None
    if isinstance(value, str):
        if len(value.encode()) > SEQUENCE_ID_BYTES_MAX:
            raise BadRequest(
                f"string correlation ID cannot be longer than {SEQUENCE_ID_BYTES_MAX} characters"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _UINT64_MAX:
        raise BadRequest(
            "Unable to parse 'sequence_id': it is a whole number up to 18446744073709551615, or a text"
        )
    return value


def _flag(parameters: codec.Parameters | None, name: str) -> bool:
    try:
        return bool(codec.flag(parameters, name))
    except BadRequest as error:
        raise BadRequest(f"Unable to parse '{name}': it is true or false") from error


# --- where it goes ------------------------------------------------------------------------------
class Tracks:
    """Where the sequences of this front end's requests went."""

    def __init__(self, seats: int, site_of: Callable[[int], int] = lambda slot: 0) -> None:
        """`seats` of workers that each site has; `site_of(slot)` is the one that serves a version."""
        self._seats = seats
        self._site_of = site_of
        self._known: dict[tuple[int, Key], int] = {}  # (slot, id) -> link

    def __len__(self) -> int:
        return len(self._known)

    def link_for(
        self, pending: Pending, ask: Ask, links: Mapping[int, WorkerLink]
    ) -> WorkerLink | None:
        """Return the link that a request must go to; None: its worker is not there (yet).

        Raises WorkerLost.
        """
        slot = pending.route.slot
        name = slot, ask.key
        seat = self.seat_of(slot, ask.key)
        link = next((link for key, link in links.items() if key >> 16 == seat), None)
        if link is not None and link.is_broken:
            link = None
        known = self._known.get(name)
        if ask.is_start:
            self._remember(name, _TO_COME if link is None else link.key)
        elif known and (link is None or known != link.key) and known not in links:
            del self._known[name]
            raise lost(pending.route, ask)
        if ask.is_end and link is not None:
            self._known.pop(name, None)
        return link

    def seat_of(self, slot: int, key: Key) -> int:
        """The seat whose worker has this sequence."""
        kind, text = (b"n", str(key)) if isinstance(key, int) else (b"t", key)
        inside = zlib.crc32(b"%d %b %b" % (slot, kind, text.encode())) % self._seats
        return self._site_of(slot) * self._seats + inside

    def _remember(self, name: tuple[int, Key], link: int) -> None:
        self._known.pop(name, None)
        while len(self._known) >= SEQUENCES_KNOWN_MAX:
            del self._known[next(iter(self._known))]
        self._known[name] = link


def ask_of(parcels: Parcels, pending: Pending) -> Ask:
    """Read what a filled request says of its sequence."""
    block = parcels.request(pending)
    return decode(block[len(block) - ASK_ROOM_BYTES :][:ASK_BYTES])


def say_again(parcels: Parcels, pending: Pending) -> None:
    """Its answer did not fit: it must not run again."""
    mark_again(parcels.request(pending))


def can_go_on(asks: Iterable[tuple[int, Ask]]) -> list[bool]:
    """Which of a dead worker's requests may be sent to another one.

    `asks`: slot and ask of each, in the order of their coming.  Those from a START on: what the worker knew
    of their sequence is in them.
    """
    begun: set[tuple[int, Key]] = set()
    verdicts: list[bool] = []
    for slot, ask in asks:
        if ask.is_start:
            begun.add((slot, ask.key))
        verdicts.append((slot, ask.key) in begun and not ask.is_again)
    return verdicts


def lost(route: Route, ask: Ask) -> WorkerLost:
    """What is said to a sequence whose worker has died."""
    return WorkerLost(
        f"model '{route.name}': sequence {ask.key} is lost: the worker that kept its state died; begin it "
        f"again with sequence_start"
    )
