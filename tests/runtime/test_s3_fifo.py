"""S3-FIFO: who is filtered out, who gets another turn, and whose name is kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.policy import make_order, make_policy
from overcommit.runtime.s3_fifo import Queues, S3Fifo

MB = 10**6


class Tier:
    """A tier of the policy, without bytes."""

    def __init__(self) -> None:
        policy = make_policy("s3_fifo")
        assert isinstance(policy, S3Fifo)
        order = make_order(policy)
        assert isinstance(order, Queues)
        self.policy, self.order, self.uses = policy, order, [0] * 1000
        self.now_ns = 0

    def load(self, *slots: int, nbytes: int = MB, priority: int = 0) -> None:
        for slot in slots:
            self.policy.on_add(slot, nbytes, priority)
            self.policy.on_load(slot, MB, "disk")
            self.order.add(slot)
            self.use(slot)

    def use(self, *slots: int) -> None:
        for slot in slots:
            self.now_ns += 1
            self.uses[slot] += 1
            self.policy.on_use(slot, self.uses[slot], self.now_ns)

    def evict(self) -> int:
        slots = self.order.victims()
        slot = next(slots)
        slots.close()
        self.policy.on_evict(slot, self.now_ns)
        self.order.discard(slot)
        return slot


def test_without_a_second_use_it_is_a_fifo() -> None:
    tier = Tier()
    tier.load(1, 2, 3)
    assert list(tier.order.victims()) == [1, 2, 3]


def test_what_is_used_again_moves_on_and_a_scan_passes_it_by() -> None:
    tier = Tier()
    tier.load(1, 2)
    tier.use(1)
    tier.load(*range(10, 15))
    assert [tier.evict() for _ in range(6)] == [2, 10, 11, 12, 13, 14]
    assert tier.evict() == 1


def test_who_comes_back_while_its_name_is_known_comes_into_main() -> None:
    tier = Tier()
    tier.load(1, 2)
    tier.use(1)
    assert tier.evict() == 2  # 1 has moved on to main
    tier.load(2, 3)
    assert tier.evict() == 3, "2 is in main, 3 is in the small queue"


def test_in_main_each_use_is_worth_a_turn_and_no_more_than_three() -> None:
    tier = Tier()
    tier.load(1, 2)
    tier.use(1, 2)
    assert list(tier.order.victims()) == [1, 2]  # both have moved on
    tier.use(*[1] * 50)
    assert [tier.evict() for _ in range(2)] == [2, 1]


def test_the_small_queue_gives_up_first_only_over_its_share_of_the_bytes() -> None:
    tier = Tier()
    tier.load(*range(20))
    tier.use(*range(20))
    list(tier.order.victims())  # all move on to main
    tier.load(100)  # one of 21: less than a tenth
    assert tier.evict() == 0
    tier.load(101, 102, nbytes=2 * MB)
    assert tier.evict() == 100


def test_a_use_that_is_heard_of_when_it_is_offered_counts() -> None:
    tier = Tier()
    tier.load(1, 2)
    offered = []
    for slot in tier.order.victims():
        offered.append(slot)
        if offered == [1]:
            tier.use(1)
    assert offered == [1, 2, 1]


def test_a_lower_priority_leaves_first_whatever_its_uses() -> None:
    tier = Tier()
    tier.load(1)
    tier.load(2, priority=-1)
    tier.use(2, 2, 2)
    assert list(tier.order.victims()) == [2, 1]
    tier.policy.on_add(2, MB, 5)
    tier.order.add(2)
    assert list(tier.order.victims()) == [1, 2]


@given(
    steps=st.lists(st.tuples(st.sampled_from(["load", "use", "evict", "gone"]), st.integers(0, 9)))
)
def test_every_member_is_offered_once_and_the_books_balance(steps: list[tuple[str, int]]) -> None:
    tier = Tier()
    held: set[int] = set()
    for what, slot in steps:
        if what == "load" and slot not in held:
            tier.load(slot, nbytes=MB * (slot + 1), priority=slot % 2)
            held.add(slot)
        elif what == "use" and slot in held:
            tier.use(slot)
        elif what == "evict" and held:
            held.discard(tier.evict())
        elif what == "gone" and slot in held:
            held.discard(slot)
            tier.order.discard(slot)
            tier.policy.on_remove(slot)
        offered = list(tier.order.victims())
        assert sorted(offered) == sorted(held)
        assert len(tier.order) == len(held)
        for queues in tier.order._queues.values():
            assert queues.small_bytes == sum(queues.small.values())
            assert queues.main_bytes == sum(queues.main.values())
        assert tier.policy._name_bytes == sum(tier.policy._names.values())
        assert not held & tier.policy._names.keys()
