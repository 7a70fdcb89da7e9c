"""What a front end counts for each version, and that it tells each count once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from overcommit.runtime import stages
from overcommit.runtime.config import CONTROL_MESSAGE_BYTES_MAX, VERSIONS_MAX
from overcommit.runtime.control import encoded_bytes
from overcommit.runtime.front_end_messages import BATCH_UNIT, BatchCounters, Counters, ModelCounters
from overcommit.server.limits import COUNTERS_MODELS_MAX
from overcommit.server.tallies import Tallies


def test_what_was_taken_is_not_told_again() -> None:
    tallies = Tallies()
    tallies.count(3, 20, 5, 0, 1, 0)
    tallies.count(3, 20, 5, 0, 1, 0)
    tallies.count_failure(4, 0)
    models, batches = tallies.take(10)
    one, two = sorted(models, key=lambda row: row.slot)
    assert (one.slot, one.success, one.queue_ns, one.request_ns) == (3, 2, 10, 40)
    assert (two.slot, two.success, two.failure) == (4, 0, 1)
    assert two.failure_ns == two.request_ns > 0
    assert batches == ()
    assert not tallies
    assert tallies.take(10) == ((), ())


def test_a_batch_is_counted_once_and_its_times_for_each_request_in_it() -> None:
    tallies = Tallies()
    unit = stages.UNIT_NS
    tallies.count_batch(3, 100 * unit, 4, stages.pack(6, 4, 10 * unit, 20 * unit))
    tallies.count_batch(3, 50 * unit, 1, stages.pack(1, 1, unit, unit))
    (model,), batches = tallies.take(10)
    assert (model.executions, model.inferences) == (2, 7)
    assert model.compute_ns == (4 * 100 + 50) * unit
    assert model.input_ns == (4 * 10 + 1) * unit
    assert model.output_ns == (4 * 20 + 1) * unit
    assert model.batches == 2 * BATCH_UNIT
    assert [(b.rows, b.executions, b.input_ns, b.infer_ns, b.output_ns) for b in batches] == [
        (1, 1, unit, 48 * unit, unit),
        (6, 1, 10 * unit, 70 * unit, 20 * unit),
    ]


def test_a_version_has_its_part_of_a_batch_that_versions_share() -> None:
    tallies = Tallies()
    tallies.count_batch(3, 1000, 8, stages.pack(2, 2, 0, 0))
    (model,), _ = tallies.take(10)
    assert (model.executions, model.batches) == (1, BATCH_UNIT // 4)


def test_more_sizes_than_a_message_holds_come_in_turns() -> None:
    tallies = Tallies()
    for rows in range(1, 8):
        tallies.count_batch(3, 1000, 1, stages.pack(rows, 1, 0, 0))
    taken = []
    while tallies:
        taken += [tallies.take(3)]
    assert sum(model.executions for models, _ in taken for model in models) == 7
    assert [row.rows for _, rows in taken for row in rows] == list(range(1, 8))
    assert all(len(rows) <= 3 for _, rows in taken)


def test_many_versions_are_taken_in_turns() -> None:
    tallies = Tallies()
    for slot in range(7):
        tallies.count_failure(slot, 0)
    taken = [tallies.take(3)[0] for _ in range(4)]
    assert [len(rows) for rows in taken] == [3, 3, 1, 0]
    assert {row.slot for rows in taken for row in rows} == set(range(7))


def test_the_most_that_one_message_may_hold_fits() -> None:
    largest = (1 << 63) - 1
    names = ModelCounters.__struct_fields__[1:]
    row = ModelCounters(slot=65_535, **dict.fromkeys(names, largest))
    names = BatchCounters.__struct_fields__[1:]
    batch = BatchCounters(slot=65_535, **dict.fromkeys(names, largest))
    message = Counters(models=(row,) * COUNTERS_MODELS_MAX, batches=(batch,) * COUNTERS_MODELS_MAX)
    assert encoded_bytes(message) <= CONTROL_MESSAGE_BYTES_MAX


def test_an_answer_that_speaks_for_its_batch_counts_both() -> None:
    tallies = Tallies()
    tallies.count(3, 2000, 5, 1000, 2, stages.pack(4, 2, 0, 0))
    tallies.count(3, 2000, 5, 1000, 2, 0)
    (model,), (batch,) = tallies.take(10)
    assert (model.success, model.executions, model.inferences) == (2, 1, 4)
    assert (batch.slot, batch.rows, batch.executions, batch.infer_ns) == (3, 4, 1, 1000)


def test_what_a_worker_cannot_have_measured_is_cut() -> None:
    tallies = Tallies()
    tallies.count(3, -1, -(1 << 70), 1 << 64, 0, stages.pack(1, 1, 1 << 60, 0))
    (model,), (batch,) = tallies.take(10)
    assert (model.success, model.request_ns, model.queue_ns) == (1, 0, 0)
    assert 0 < batch.infer_ns < model.compute_ns < 1 << 63


@example(
    [(0, 1, 1, False), (0, 2, 1, False), (1, 1, 1, False), (2, 1, 1, True), (2, 1, 1, False)], 3
)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.booleans()),
        max_size=60,
    ),
    st.integers(1, 7),
)
def test_nothing_is_lost_or_told_twice(
    batches: list[tuple[int, int, int, bool]], limit: int
) -> None:
    tallies = Tallies()
    wanted: Counter[tuple[int, int]] = Counter()
    told: Counter[tuple[int, int]] = Counter()
    executions: Counter[int] = Counter()

    def take() -> None:
        models, sizes = tallies.take(limit)
        assert len(models) <= limit
        assert len(sizes) <= limit
        for row in sizes:  # a size that was left over and one that came since are two rows
            told[row.slot, row.rows] += row.executions
        for model in models:
            executions[model.slot] += model.executions

    for slot, rows, requests, is_taken in batches:
        tallies.count_batch(slot, 1000, requests, stages.pack(rows, requests, 0, 0))
        wanted[slot, rows] += 1
        if is_taken:
            take()
    while tallies:
        take()
    assert told == wanted
    for slot in range(6):
        assert executions[slot] == sum(n for (of, _), n in wanted.items() if of == slot)


def test_a_slot_that_no_version_can_have_is_refused() -> None:
    with pytest.raises(IndexError):
        Tallies().count(VERSIONS_MAX, 1, 1, 1, 1, 0)
