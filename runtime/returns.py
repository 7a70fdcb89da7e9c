"""Who comes back by whole seconds: the version that they were refused is there again by then.

HTTP's Retry-After knows seconds only, so it is rounded up, and a client that goes by it comes up to a
second later than is meant.  Where room is short, what was loaded for it has been pushed out by then.  So
a refusal is booked.  At the time that was meant it is seen whether somebody comes; if nobody does, the
version is wanted once more, early enough to be there when the second is over, and kept then.

    (none) -> MEANT     [book]
    MEANT -> WATCHED    [tick, at the time that was meant]
    WATCHED -> (none)   [tick, GRACE_NS later: the version is asked for, so they have come]
    WATCHED -> AWAITED  [tick, GRACE_NS later: it is not]
    AWAITED -> AWAITED  [tick: there is time yet; half of it later what is before the version has changed]
    AWAITED -> (none)   [tick: it is wanted, and kept until they had time to come]
    all     -> (none)   [tick: the version was removed]

Invariants
 1. Of a version one booking at most has its time that was meant before it; there are BOOKED_MAX in all,
    and more are not booked.
 2. A booking ends within a second and what was foreseen, and wants its version once at most; where that
    is refused, nobody hears of it.

Pure.  Owned by residency.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.residents import NOBODY, Action, Port, Refuse, State, Usage, Version
from overcommit.runtime.wish_queue import GRACE_NS, WishQueue

BOOKED_MAX: Final = 256
SECOND_NS: Final = 1_000_000_000
OWN_LOADS: Final = 2.0  # it is wanted so many times its own load earlier than is foreseen
LOOK_NS: Final = 5_000_000  # what is not earlier than this is now

Find = Callable[[int], Version | None]
Want = Callable[[int, int, int], list[Action]]  # slot, waiter, now


@dataclass(slots=True, eq=False)
class _Booking:
    version: Version
    meant_ns: int
    first_ns: int  # the first who goes by seconds comes then ...
    last_ns: int  # ... and the last of those who are told the same
    uses: int | None = None  # at the time that was meant
    is_awaited: bool = False


class Returns:
    """See the module."""

    def __init__(self, queue: WishQueue, port: Port, find: Find, want: Want) -> None:
        self._queue = queue
        self._port = port
        self._find = find
        self._want = want
        self._times: list[tuple[int, int, _Booking]] = []  # when to look, a number, at what
        self._latest: dict[int, _Booking] = {}  # by slot
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._times)

    def next_ns(self) -> int | None:
        """Return when `tick` is due; None: nobody is awaited."""
        return self._times[0][0] if self._times else None

    def expect(self, version: Version, earliest_ns: int, now_ns: int) -> tuple[int, int] | None:
        """`WishQueue.expect`, booked: who is told comes then, or when the second is over."""
        expected = self._queue.expect(version, earliest_ns, now_ns)
        if expected is not None:
            self.book(version, expected[1], now_ns)
        return expected

    def book(self, version: Version, meant_ns: int, now_ns: int) -> None:
        """Requests for a version are told now to come back at this time, and until then more will be."""
        latest = self._latest.get(version.slot)
        if (latest is not None and now_ns < latest.meant_ns) or len(self) >= BOOKED_MAX:
            return
        first_ns = now_ns - (now_ns - meant_ns) // SECOND_NS * SECOND_NS
        if first_ns - meant_ns <= GRACE_NS:
            return  # the second is over when they are meant to come
        # Who is refused just before the time that is meant comes a second after that.
        last_ns = max(first_ns, meant_ns + SECOND_NS)
        booking = _Booking(version, meant_ns, first_ns, last_ns)
        self._latest[version.slot] = booking
        self._look(booking, meant_ns)

    def _look(self, booking: _Booking, at_ns: int) -> None:
        bisect.insort(self._times, (at_ns, next(self._numbers), booking))

    def tick(self, now_ns: int) -> list[Action]:
        """See who has come, and want what is awaited."""
        actions: list[Action] = []
        while self._times and self._times[0][0] <= now_ns:
            _, _, booking = self._times.pop(0)
            version = booking.version
            usage = self._port.usage(version.slot)
            if self._find(version.slot) is not version:
                self._end(booking)
            elif booking.uses is None:
                booking.uses = usage.uses
                self._look(booking, now_ns + GRACE_NS)
            elif not booking.is_awaited and self._have_come(booking, usage):
                self._end(booking)
            else:
                booking.is_awaited = True
                left_ns = booking.first_ns - self._lead_ns(version, now_ns) - now_ns
                if left_ns > LOOK_NS:
                    self._look(booking, now_ns + left_ns // 2)
                else:
                    self._end(booking)
                    actions += self._await(booking, now_ns)
        return actions

    def _have_come(self, booking: _Booking, usage: Usage) -> bool:
        """Whether requests were run since the time that was meant, or wait, or were refused again."""
        latest = self._latest.get(booking.version.slot)
        return usage.uses != booking.uses or usage.waiting > 0 or latest is not booking

    def _end(self, booking: _Booking) -> None:
        if self._latest.get(booking.version.slot) is booking:
            del self._latest[booking.version.slot]

    def _lead_ns(self, version: Version, now_ns: int) -> int:
        """Return how long before it is needed a version has to be wanted."""
        foreseen = self._queue.wait_ns(version, now_ns)
        wait_ns = 0.0 if foreseen is None else foreseen[0]
        return int(wait_ns + OWN_LOADS * self._queue.load_ns(version))

    def _await(self, booking: _Booking, now_ns: int) -> list[Action]:
        version = booking.version
        actions: list[Action] = []
        if version.state not in (State.DEVICE, State.LOADING) and now_ns >= version.retry_ns:
            actions = self._want(version.slot, NOBODY, now_ns)
            self._queue.promise(version, booking.first_ns)
        version.promised_ns = max(version.promised_ns, booking.last_ns + GRACE_NS)
        return [a for a in actions if not isinstance(a, Refuse) or a.waiters]
