"""Pairs of blocks: kept together while they are small, given back when memory is short."""

from __future__ import annotations

import mmap
from typing import Any

import pytest

from overcommit.runtime.config import BLOCK_BYTES_MAX, BLOCK_BYTES_MIN
from overcommit.runtime.errors import Overloaded, PayloadTooLarge
from overcommit.runtime.front_end_messages import Route
from overcommit.server.parcels import Parcels, Pending
from overcommit.server.plans import InputPlan

ROUTE = Route(slot=1, name="m", version="1", state="ready")
ARENA_BYTES = 64 * BLOCK_BYTES_MIN


def plan(nbytes: int = 100, out_bytes: int = 100, header: bytes = b"head") -> InputPlan:
    return InputPlan((), header, nbytes, out_bytes, ())


@pytest.fixture
def parcels() -> Parcels:
    return Parcels(mmap.mmap(-1, ARENA_BYTES), mmap.mmap(-1, ARENA_BYTES))


def opened(parcels: Parcels, number: int, of: InputPlan) -> Pending:
    reply: Any = None
    return parcels.open(number, ROUTE, of, reply, 0)


def test_a_small_pair_serves_the_next_small_request_and_nothing_of_the_last_is_left(
    parcels: Parcels,
) -> None:
    first = opened(parcels, 1, plan())
    place = first.in_offset, first.out_offset
    first.retries, first.regrown, first.flags, first.deadline_ns = 1, 1, 1, 5
    parcels.close(first)
    assert parcels.blocks_used == 0
    again = opened(parcels, 2, plan(header=b"other"))
    assert (again.in_offset, again.out_offset) == place
    assert (again.request_id, again.retries, again.regrown, again.flags) == (2, 0, 0, 0)
    assert again.deadline_ns > 5
    assert bytes(parcels._in_view[place[0] : place[0] + 5]) == b"other"
    assert parcels.blocks_used == 2
    parcels.check(1)


def test_a_large_request_gets_blocks_of_its_own_and_gives_them_back(parcels: Parcels) -> None:
    parcels.close(opened(parcels, 1, plan()))
    large = opened(parcels, 2, plan(nbytes=3 * BLOCK_BYTES_MIN))
    assert not large.is_small
    parcels.check(1)
    parcels.close(large)
    parcels.check(0)
    assert parcels.ingress.blocks_used == 1, "the idle pair"


def test_a_pair_with_a_larger_answer_is_not_kept_and_its_version_asks_for_more(
    parcels: Parcels,
) -> None:
    pending = opened(parcels, 1, plan())
    assert parcels.try_regrow(pending, 5000)
    assert pending.out_capacity >= 5000
    parcels.close(pending)
    assert parcels.ingress.blocks_used == parcels.egress.blocks_used == 0
    assert opened(parcels, 2, plan()).out_capacity >= 5000


def test_what_a_long_answer_taught_fades_with_short_ones(parcels: Parcels) -> None:
    pending = opened(parcels, 1, plan())
    assert parcels.try_regrow(pending, 32 * BLOCK_BYTES_MIN)
    parcels.close(pending)
    asked = []
    while parcels.hints:
        pending = opened(parcels, 2, plan())
        asked.append(pending.out_capacity)
        parcels.learn(pending, 100)
        parcels.close(pending)
    assert asked[0] == 32 * BLOCK_BYTES_MIN
    assert asked == sorted(asked, reverse=True)
    assert opened(parcels, 3, plan()).out_capacity == BLOCK_BYTES_MIN


def test_what_an_answer_may_need_refuses_nobody(parcels: Parcels) -> None:
    pending = opened(parcels, 1, plan())
    assert parcels.try_regrow(pending, ARENA_BYTES // 2)
    parcels.close(pending)
    capacities = [opened(parcels, number, plan()).out_capacity for number in range(33)]
    assert capacities == [ARENA_BYTES // 2] + [BLOCK_BYTES_MIN] * 32


def test_idle_pairs_are_given_back_before_memory_is_called_full(parcels: Parcels) -> None:
    pairs = [opened(parcels, number, plan()) for number in range(64)]
    with pytest.raises(Overloaded, match="--payload-memory"):
        opened(parcels, 64, plan())
    for pending in pairs:
        parcels.close(pending)
    whole = opened(parcels, 65, plan(nbytes=ARENA_BYTES))
    parcels.check(1)
    parcels.close(whole)
    parcels.check(0)


def test_what_no_block_can_hold_is_refused_with_the_limit(parcels: Parcels) -> None:
    with pytest.raises(PayloadTooLarge, match=str(BLOCK_BYTES_MAX)):
        opened(parcels, 1, plan(nbytes=BLOCK_BYTES_MAX + 1))
    parcels.check(0)
