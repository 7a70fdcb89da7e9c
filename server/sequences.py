"""Which sequence a request is of, and which worker has it.

A sequence's worker is known by its id alone: every front end finds the same seat, without a word to each
other.  When a worker dies, the sequences of its seat are gone; its successor sits in the same seat, knows
none, and says so.  A front end remembers nothing of sequences: begun again through another front end, one
that it believed to be lost lives.

Invariants
 1. All requests of one sequence go to the same seat; while nobody sits there they are held.  Sequences
    of a seat that is broken for good go to the others of its site.
 2. Whether a sequence is lost is said by who sits there, but for requests that a dead worker had taken.

Called by `inference` (`read`), and by the dispatch.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from overcommit.runtime.config import SEQUENCE_ID_BYTES_MAX
from overcommit.runtime.errors import BadRequest, OvercommitError, WorkerLost
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

if TYPE_CHECKING:
    from overcommit.server.parcels import Parcels, Pending
    from overcommit.server.worker_link import WorkerLink

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
    """Where the requests of sequences go."""

    def __init__(self, seats: int, site_of: Callable[[int], int] = lambda slot: 0) -> None:
        """`seats` of workers that each site has; `site_of(slot)` is the one that serves a version."""
        self._seats = seats
        self._site_of = site_of
        self.broken: frozenset[int] = frozenset()  # seats that nobody will sit in again

    def link_for(self, slot: int, key: Key, links: Mapping[int, WorkerLink]) -> WorkerLink | None:
        """Return the link that a sequence's requests must go to; None: its worker is not there (yet)."""
        seat = self.seat_of(slot, key)
        link = next((link for key, link in links.items() if key >> 16 == seat), None)
        return None if link is None or link.is_broken else link

    def seat_of(self, slot: int, key: Key) -> int:
        """The seat whose worker has this sequence."""
        kind, text = (b"n", str(key)) if isinstance(key, int) else (b"t", key)
        digest = zlib.crc32(b"%d %b %b" % (slot, kind, text.encode()))
        first = self._site_of(slot) * self._seats
        seat = first + digest % self._seats
        if seat in self.broken:
            left = [each for each in range(first, first + self._seats) if each not in self.broken]
            return left[digest // self._seats % len(left)] if left else seat
        return seat


def ask_of(parcels: Parcels, pending: Pending) -> Ask:
    """Read what a filled request says of its sequence."""
    block = parcels.request(pending)
    return decode(block[len(block) - ASK_ROOM_BYTES :][:ASK_BYTES])


def say_again(parcels: Parcels, pending: Pending) -> None:
    """Its answer did not fit: it must not run again."""
    mark_again(parcels.request(pending))


def can_go_on(asks: Iterable[tuple[int, Ask, bool]]) -> list[bool]:
    """Which of a dead worker's requests may be sent to another one.

    `asks`: slot and ask of each, and whether the worker had taken it, in the order of their coming.  Those
    from a START on: what the worker knew of their sequence is in them.  And those that it never saw: the
    next one knows whether their sequence was begun again, through another front end.
    """
    begun: set[tuple[int, Key]] = set()
    verdicts: list[bool] = []
    for slot, ask, was_taken in asks:
        if ask.is_start:
            begun.add((slot, ask.key))
        can = (slot, ask.key) in begun or not was_taken
        verdicts.append(can and not ask.is_again)
    return verdicts


def lost_with(
    parcels: Parcels, pendings: Iterable[Pending], head: int
) -> dict[int, OvercommitError]:
    """Which of a dead worker's requests cannot go to another, because their sequence's state is gone.

    It had taken those before `head`.
    """
    mine = [each for each in pendings if each.route.sequence]
    asks = [ask_of(parcels, each) for each in mine]
    verdicts = can_go_on(
        (each.route.slot, ask, each.position < head) for each, ask in zip(mine, asks, strict=True)
    )
    return {
        each.request_id: lost(each.route, ask)
        for each, ask, can in zip(mine, asks, verdicts, strict=True)
        if not can
    }


def lost(route: Route, ask: Ask) -> WorkerLost:
    """What is said to a sequence whose worker has died."""
    return WorkerLost(
        f"model '{route.name}': sequence {ask.key} is lost: the worker that kept its state died; begin it "
        f"again with sequence_start"
    )
