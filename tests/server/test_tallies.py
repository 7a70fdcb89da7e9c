"""What a front end counts for each version, and that it tells each count once."""

from __future__ import annotations

from overcommit.runtime.config import CONTROL_MESSAGE_BYTES_MAX
from overcommit.runtime.control import encoded_bytes
from overcommit.runtime.messages import BATCH_UNIT, Counters, ModelCounters
from overcommit.server.limits import COUNTERS_MODELS_MAX
from overcommit.server.tallies import Tallies


def test_what_was_taken_is_not_told_again() -> None:
    tallies = Tallies()
    tallies.count(3, 0, 5, 7, 4)
    tallies.count(3, 0, 5, 7, 0)
    tallies.count_failure(4, 0)
    one, two = sorted(tallies.take(10), key=lambda row: row.slot)
    assert (one.slot, one.success, one.queue_ns, one.compute_ns) == (3, 2, 10, 14)
    assert one.batches == BATCH_UNIT // 4 + BATCH_UNIT
    assert (two.slot, two.success, two.failure) == (4, 0, 1)
    assert tallies.take(10) == ()


def test_many_versions_are_taken_in_turns() -> None:
    tallies = Tallies()
    for slot in range(7):
        tallies.count_failure(slot, 0)
    taken = [tallies.take(3) for _ in range(4)]
    assert [len(rows) for rows in taken] == [3, 3, 1, 0]
    assert {row.slot for rows in taken for row in rows} == set(range(7))


def test_the_most_that_one_message_may_hold_fits() -> None:
    largest = (1 << 63) - 1
    row = ModelCounters(
        slot=65_535,
        success=largest,
        failure=largest,
        queue_ns=largest,
        compute_ns=largest,
        request_ns=largest,
        batches=largest,
    )
    message = Counters(models=(row,) * COUNTERS_MODELS_MAX)
    assert encoded_bytes(message) <= CONTROL_MESSAGE_BYTES_MAX
