"""Where versions are served: placing, moving, copies that come and go, devices that are lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from overcommit.runtime.device_limits import (
    COLD_LOOKS,
    QUEUE_BATCHES,
    REPLICA_LOOKS,
    REST_LOOKS,
    SETTLE_LOOKS,
)
from overcommit.runtime.spread import SiteLook, Spread

GB = 1 << 30
BATCH = 8
Sites = dict[int, tuple[int, ...]]


def look(waiting: int = 0, working_set: int = 0, **more: object) -> SiteLook:
    return SiteLook(10 * GB, working_set, waiting=waiting, **more)  # type: ignore[arg-type]


def take(spread: Spread, looks: Sequence[SiteLook], queues: Mapping[int, int] = {}) -> Sites:
    return spread.look(looks, queues, lambda slot: BATCH)


@pytest.fixture
def spread() -> Spread:
    return Spread([10 * GB, 10 * GB])


# --- placing ------------------------------------------------------------------------------------
def test_versions_go_where_they_weigh_least_for_the_memory() -> None:
    spread = Spread([30 * GB, 10 * GB])
    for slot in range(40):
        assert spread.add(slot, GB)
    assert spread.versions(0) == 30
    assert spread.versions(1) == 10


def test_a_version_that_is_known_stays_where_it_is(spread: Spread) -> None:
    spread.add(1, GB)
    before = spread.sites_of(1)
    spread.add(2, 5 * GB)
    assert not spread.add(1, GB)
    assert spread.sites_of(1) == before
    spread.remove(1)
    assert spread.sites_of(1) == ()


def test_kin_stay_together_until_their_site_is_fuller_by_the_slack(spread: Spread) -> None:
    for slot in range(20):
        spread.add(slot, GB // 4, "trunk")
    sites = [spread.sites_of(slot)[0] for slot in range(20)]
    assert sites[:4] == [sites[0]] * 4, "the first ones are together"
    assert set(sites) == {0, 1}, "but not all of a large family"


# --- copies -------------------------------------------------------------------------------------
def heat(spread: Spread, slot: int, looks: int) -> Sites:
    changed: Sites = {}
    home = spread.sites_of(slot)[0]
    for _ in range(looks):
        seen = [look(), look()]
        seen[home] = look(waiting=100)
        changed |= take(spread, seen, {slot: QUEUE_BATCHES * BATCH})
    return changed


def test_a_queue_that_lasts_brings_a_second_site(spread: Spread) -> None:
    spread.add(1, GB)
    assert heat(spread, 1, REPLICA_LOOKS - 1) == {}
    assert heat(spread, 1, 1) == {1: (0, 1)}
    assert spread.replicas == 1


def test_a_queue_that_comes_and_goes_brings_none(spread: Spread) -> None:
    spread.add(1, GB)
    for _ in range(10):
        assert heat(spread, 1, REPLICA_LOOKS - 1) == {}
        assert take(spread, [look(), look()]) == {}


@pytest.mark.parametrize(
    "other",
    [
        look(waiting=60),
        look(working_set=10 * GB - 1),
        look(is_short=True),
    ],
    ids=["busy", "full", "short"],
)
def test_no_second_site_where_it_would_not_help(spread: Spread, other: SiteLook) -> None:
    spread.add(1, GB)
    for _ in range(2 * REPLICA_LOOKS):
        assert take(spread, [look(waiting=100), other], {1: 1000}) == {}


def test_a_copy_goes_when_it_is_cold_and_not_between_the_bounds(spread: Spread) -> None:
    spread.add(1, GB)
    heat(spread, 1, REPLICA_LOOKS)
    for _ in range(3 * COLD_LOOKS):
        assert take(spread, [look(), look()], {1: BATCH}) == {}
    for _ in range(COLD_LOOKS - 1):
        assert take(spread, [look(), look()]) == {}
    assert take(spread, [look(), look()]) == {1: (0,)}


def test_a_copy_goes_at_once_when_its_site_is_short_of_room(spread: Spread) -> None:
    spread.add(1, GB)
    heat(spread, 1, REPLICA_LOOKS)
    seen = [look(waiting=100), look(is_short=True)]
    assert take(spread, seen, {1: 1000}) == {1: (0,)}
    calm = [look(waiting=100), look()]
    changes = [take(spread, calm, {1: 1000}) for _ in range(REST_LOOKS)]
    assert not any(changes), "it is left alone for a while"


# --- moving -------------------------------------------------------------------------------------
def test_what_a_full_site_loads_again_and_again_moves_to_one_with_room(spread: Spread) -> None:
    for slot in range(6):
        spread.add(slot, 2 * GB, "trunk")  # all on site 0 at first, then by weight
    home = [slot for slot in range(6) if spread.sites_of(slot) == (0,)]
    full = look(working_set=11 * GB, loaded=tuple(home))
    assert take(spread, [full, look(working_set=1 * GB)]) == {home[0]: (1,)}, "one is enough"
    assert take(spread, [full, look(working_set=8 * GB)]) == {}, "the other is full as well"


def test_room_is_not_promised_twice(spread: Spread) -> None:
    for slot in range(8):
        spread.add(slot, 3 * GB)
    mine = tuple(slot for slot in range(8) if spread.sites_of(slot) == (0,))
    full = look(working_set=40 * GB, loaded=mine)
    empty = look()
    assert len(take(spread, [full, empty])) == 3, "nine of its ten gigabytes"
    later = [take(spread, [full, empty]) for _ in range(SETTLE_LOOKS - 1)]
    assert not any(later)


def test_a_version_with_state_stays_unless_its_device_is_lost(spread: Spread) -> None:
    spread.add(1, GB, is_fixed=True)
    assert heat(spread, 1, 2 * REPLICA_LOOKS) == {}
    assert take(spread, [look(working_set=40 * GB, loaded=(1,)), look()]) == {}
    assert spread.lose(0) == {1: (1,)}


# --- losing -------------------------------------------------------------------------------------
def test_versions_of_a_lost_device_are_served_by_the_others(spread: Spread) -> None:
    for slot in range(10):
        spread.add(slot, GB)
    lost = {slot for slot in range(10) if spread.sites_of(slot) == (0,)}
    assert spread.lose(0) == dict.fromkeys(lost, (1,))
    spread.add(10, GB)
    assert spread.sites_of(10) == (1,)
    assert spread.regain(0) == {}
    spread.add(11, GB)
    assert spread.sites_of(11) == (0,)


def test_when_all_are_lost_versions_wait_for_the_first_that_is_back(spread: Spread) -> None:
    spread.add(1, GB)
    spread.lose(0)
    assert spread.lose(1) == {}
    assert spread.sites_of(1) == (1,)
    assert spread.regain(0) == {1: (0,)}


class SpreadMachine(RuleBasedStateMachine):
    """Whatever happens, every version has a site that is there, and the books are right."""

    @initialize(count=st.integers(1, 4))
    def begin(self, count: int) -> None:
        self.count = count
        self.spread = Spread([(site + 1) * GB for site in range(count)])
        self.known: dict[int, tuple[int, str]] = {}

    @rule(
        slot=st.integers(0, 20),
        nbytes=st.integers(1, GB),
        share=st.sampled_from(["", "a", "b"]),
    )
    def add(self, slot: int, nbytes: int, share: str) -> None:
        assert self.spread.add(slot, nbytes, share) is (slot not in self.known)
        self.known[slot] = nbytes, share

    @rule(slot=st.integers(0, 20))
    def remove(self, slot: int) -> None:
        self.spread.remove(slot)
        self.known.pop(slot, None)

    @rule(site=st.integers(0, 3), is_lost=st.booleans())
    def lose_or_regain(self, site: int, is_lost: bool) -> None:
        if site >= self.count:
            return
        before = self.spread.all()
        changed = self.spread.lose(site) if is_lost else self.spread.regain(site)
        self._check_changes(before, changed)

    @rule(data=st.data(), times=st.integers(1, 40))
    def looks(self, data: st.DataObject, times: int) -> None:
        slots = st.lists(st.integers(0, 20), max_size=6)
        seen = [
            SiteLook(
                (site + 1) * GB,
                data.draw(st.integers(0, 2 * (site + 1) * GB)),
                is_short=data.draw(st.booleans()),
                waiting=data.draw(st.integers(0, 500)),
                workers=data.draw(st.integers(0, 3)),
                loaded=tuple(data.draw(slots)),
            )
            for site in range(self.count)
        ]
        queues = data.draw(st.dictionaries(st.integers(0, 20), st.integers(0, 500), max_size=6))
        for _ in range(times):
            before = self.spread.all()
            changed = take(self.spread, seen, queues)
            self._check_changes(before, changed)
            for slot, sites in changed.items():
                gained = set(sites) - set(before[slot])
                assert len(gained) <= 1
                assert all(not seen[site].is_short for site in gained)

    def _check_changes(self, before: Sites, changed: Sites) -> None:
        after = self.spread.all()
        assert changed == {s: sites for s, sites in after.items() if sites != before[s]}

    @invariant()
    def every_version_has_a_site_that_is_there(self) -> None:
        sites = self.spread.all()
        assert sites.keys() == self.known.keys()
        alive = set(range(self.count)) - self.spread.lost
        for mine in sites.values():
            assert mine
            assert len(set(mine)) == len(mine)
            assert set(mine) <= (alive or set(range(self.count)))

    @invariant()
    def the_books_are_right(self) -> None:
        sites = self.spread.all()
        for site in range(self.count):
            here = [slot for slot, mine in sites.items() if site in mine]
            assert self.spread.versions(site) == len(here)
            weight = sum(self.known[slot][0] for slot in here)
            assert self.spread._weights[site] == weight
        kin = {(s, self.known[slot][1]) for slot, mine in sites.items() for s in mine}
        assert self.spread._shares.keys() == {key for key in kin if key[1]}
        assert self.spread.replicas == sum(len(mine) - 1 for mine in sites.values())


SpreadMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestSpreadMachine = SpreadMachine.TestCase
