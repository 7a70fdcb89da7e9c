"""Requests that wait at an occupied worker, and go to another one meanwhile.

A ring has one consumer, and this one may go on at any instant; so nothing can be taken out of it again.  But
a front end decides whose answer counts: a request that waits there is abandoned, as if its client had left,
and sent to another worker under a new id and in new blocks.  The former ones come back with the former id's
completion, mostly a cancelled one.  If the worker goes on just then, a request may be computed twice, as one
may whose worker died; it is answered once.

Invariants
 1. A request makes one detour at most: workers that are occupied in turn do not pass it on to each other.
 2. None goes whose version is in that batch, nor one of a sequence: its state is there.
 3. Every block belongs to one id: the request has both ids' blocks in no instant.
 4. At most DETOUR_BYTES_MAX are copied at a time; what is beyond stays.

Called by the dispatch when it hears who is occupied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from overcommit.server.limits import DETOUR_BYTES_MAX
from overcommit.server.parcels import Parcels, Pending
from overcommit.server.worker_link import WorkerLink


class Detours:
    """Which requests have made one.  `next_id` makes an id for a request."""

    def __init__(self, parcels: Parcels, next_id: Callable[[], int]) -> None:
        self._parcels = parcels
        self._next_id = next_id
        self._gone_on: set[int] = set()

    def take_out(
        self,
        links: Mapping[int, WorkerLink],
        pendings: dict[int, Pending],
        among: Callable[[int], Collection[int]],
    ) -> list[Pending]:
        """Take out what should go to another worker, to be sent; `among(slot)` are those for a version.

        In `pendings` each has its new id, and who has its former blocks the former one.
        """
        self._gone_on.intersection_update(pendings)
        running = {key: link.batch().ids for key, link in links.items() if not link.is_broken}
        left_bytes = DETOUR_BYTES_MAX
        taken: list[Pending] = []
        for former_id, pending in list(pendings.items()):
            link, slot = pending.link, pending.route.slot
            if link is None or pending.reply is None or pending.route.sequence:
                continue
            if former_id in self._gone_on or former_id in running.get(link.key, (former_id,)):
                continue
            if link.key in among(slot):
                continue
            left_bytes -= pending.in_length
            former = None
            if left_bytes >= 0:
                former = self._parcels.try_exchange(pending, self._next_id())
            if former is None:
                break
            pendings[former_id] = former
            pendings[pending.request_id] = pending
            self._gone_on.add(pending.request_id)
            link.cancel(former_id, slot)
            taken.append(pending)
        return taken
