"""What a client asks of the server for its shared memory, step by step; how it is sent is the client's.

A generator yields what is to be asked and is sent the answer, or thrown the error that came instead; so the
blocking client and the one for asyncio do the same.

Invariants
 1. Whatever is raised in, a cancellation too, a region that was lent is given back or retired.
 2. A region is registered, and proved, before it is used (`sharing.py`).

Driven by `Client` and `AsyncClient`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from overcommit.runtime.errors import OvercommitError
from overcommit.server.clients import exchange, sharing
from overcommit.server.clients.exchange import (
    ConnectionWasClosed,
    Inference,
    Received,
    Result,
    Sent,
)
from overcommit.server.clients.sharing import ASK_TIMEOUT_S, Region, Sharing


@dataclass(slots=True, frozen=True)
class Ask:
    """One request to send; a patient one again when the server says that it will have time."""

    sent: Sent
    timeout_s: float | None = ASK_TIMEOUT_S  # None: the client's own
    is_patient: bool = False


T = TypeVar("T")
Steps = Generator[Ask, Received, T]


def infer(own: Sharing, asked: Inference, timeout_s: float | None) -> Steps[Result | None]:
    """Run a model over shared memory; None: the tensors are to be sent in the body."""
    region = yield from _region(own, asked)
    if region is None:
        return None
    try:
        received = yield Ask(sharing.sent_in(region, asked), timeout_s, is_patient=True)
    except ConnectionWasClosed:
        own.retire(region)
        return None
    except BaseException:
        own.retire(region)
        raise
    if sharing.is_refusal(received):
        own.give_back(region)
        received = yield Ask(asked.in_body(), timeout_s, is_patient=True)
        if not sharing.is_refusal(received):  # so it was the region
            yield from drop(own.fail())
        return exchange.infer_result(received)
    try:
        return sharing.result_of(received, region)
    finally:
        if exchange.is_servers_own(received):
            own.give_back(region)
        else:
            own.retire(region)


def drop(regions: Sequence[Region]) -> Steps[None]:
    """Unregister and remove regions; the server finds out by itself if it cannot be told."""
    is_there = True
    try:
        for region in regions:
            try:
                if is_there:
                    yield Ask(exchange.region_request(region.name, "unregister"))
            except OvercommitError:
                is_there = False
    finally:
        for region in regions:
            region.close()


def _region(own: Sharing, asked: Inference) -> Steps[Region | None]:
    """Have a region that the server has proved to see; None: there is none."""
    if not (nbytes := own.wanted_bytes(asked)):
        return None
    if not own.is_on and not (yield from _begin(own)):
        return None
    region = own.lend(nbytes)
    if region is not None:
        return region
    region, gone = own.make(nbytes)
    proof = ""
    try:
        yield from drop(gone)
        if region is None:
            return None
        sent = exchange.region_request(region.name, "register", region.name, region.nbytes)
        with contextlib.suppress(OvercommitError):
            proof = exchange.region_proof((yield Ask(sent)))
    except BaseException:
        if region is not None:
            own.retire(region)
        raise
    if proof == region.proof:
        return region
    own.refuse(region)
    return None


def _begin(own: Sharing) -> Steps[bool]:
    """Ask whether the server takes regions, unless somebody asks or it is too early."""
    if not own.begin():
        return False
    is_on = False
    try:
        with contextlib.suppress(OvercommitError):
            is_on = exchange.takes_regions((yield Ask(Sent("GET", "/v2"))))
    finally:
        own.end(is_on)
    return is_on
