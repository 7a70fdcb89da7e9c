"""Which versions are packed again, and when."""

from __future__ import annotations

from overcommit.runtime.pack_limits import PACK_RETRY_S
from overcommit.runtime.pack_retries import PackRetries

SECOND_NS = 1_000_000_000


def test_a_version_waits_longer_after_each_failure_and_is_due_once() -> None:
    retries = PackRetries()
    now_ns = 0
    for wait_s in (*PACK_RETRY_S, PACK_RETRY_S[-1]):
        assert retries.put_off(("m", "1"), now_ns) == wait_s
        assert retries.take_due(now_ns + int(wait_s * SECOND_NS) - 1) == []
        now_ns += int(wait_s * SECOND_NS)
        assert retries.take_due(now_ns) == [("m", "1")]
        assert retries.take_due(now_ns) == []


def test_who_was_packed_begins_anew() -> None:
    retries = PackRetries()
    retries.put_off(("m", "1"), 0)
    retries.put_off(("m", "1"), 0)
    retries.forget(("m", "1"))
    assert retries.take_due(10**18) == []
    assert retries.put_off(("m", "1"), 0) == PACK_RETRY_S[0]
