"""Chunks on their way from the supervisor to its children: in order, each once, none too many."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from overcommit.runtime.chunk_feed import ChunkFeed
from overcommit.runtime.config import CONTROL_FDS_MAX
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.messages import Chunks, MakeChunks, Message
from overcommit.runtime.vault import Vault

COUNT = 2 * CONTROL_FDS_MAX + 5


class Child:
    """What a child was sent, as (first, count)."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.asked = 0

    def post(self, message: Message, fds: tuple[int, ...]) -> None:
        if isinstance(message, MakeChunks):
            self.asked = message.count
            return
        assert isinstance(message, Chunks)
        assert len(message.fds) == len(fds)
        self.sent.append((message.first, len(fds)))


@pytest.fixture
def feed() -> Iterator[ChunkFeed]:
    made = ChunkFeed(Vault(COUNT))
    yield made
    made.vault.close()


def make(feed: ChunkFeed, count: int) -> None:
    feed.on_made(len(feed.vault), [os.open("/dev/null", os.O_RDONLY) for _ in range(count)])


def test_a_worker_gets_everything_in_order_one_message_at_a_time(feed: ChunkFeed) -> None:
    make(feed, COUNT)
    worker = Child()
    feed.add(1, worker.post, COUNT)
    assert worker.sent == [(0, CONTROL_FDS_MAX)]
    feed.on_taken(1, CONTROL_FDS_MAX)
    feed.on_taken(1, 2 * CONTROL_FDS_MAX)
    feed.on_taken(1, COUNT)
    assert worker.sent[1:] == [(CONTROL_FDS_MAX, CONTROL_FDS_MAX), (2 * CONTROL_FDS_MAX, 5)]


def test_a_worker_that_waits_gets_chunks_as_they_are_made(feed: ChunkFeed) -> None:
    worker = Child()
    feed.add(1, worker.post, COUNT)
    assert not worker.sent
    make(feed, 3)
    make(feed, 2)
    assert worker.sent == [(0, 3)], "the next ones wait until these are taken"
    feed.on_taken(1, 3)
    assert worker.sent == [(0, 3), (3, 2)]


def test_a_mover_gets_what_was_there_and_nothing_that_it_made(feed: ChunkFeed) -> None:
    make(feed, 3)
    mover = Child()
    feed.add(1, mover.post, 3)
    feed.on_taken(1, 3)
    make(feed, 4)
    assert mover.sent == [(0, 3)]


def test_a_dead_child_gets_nothing(feed: ChunkFeed) -> None:
    worker = Child()
    feed.add(1, worker.post, COUNT)
    feed.forget(1)
    make(feed, 3)
    feed.on_taken(1, 0)
    assert not worker.sent


def test_chunks_that_do_not_continue_what_is_held_are_refused_and_closed(feed: ChunkFeed) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ProtocolError, match="chunks 1 to 2 came where 0"):
        feed.on_made(1, [fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_everybody_is_told_of_fewer_chunks_and_gets_no_more(feed: ChunkFeed) -> None:
    make(feed, COUNT)
    told: list[tuple[int, int, int]] = []

    def post(message: Message, fds: tuple[int, ...]) -> None:
        assert isinstance(message, Chunks)
        told.append((message.first, message.count, len(fds)))

    feed.add(1, post, COUNT)
    feed.on_taken(1, CONTROL_FDS_MAX)
    feed.on_taken(1, 2 * CONTROL_FDS_MAX)
    feed.on_taken(1, COUNT)
    told.clear()
    feed.shrink(3)
    assert told == [(3, 3, 0)]
    assert (len(feed.vault), feed.vault.count, feed.vault.is_full) == (3, 3, True)
    feed.on_taken(1, 3)
    assert len(told) == 1


def settled(feed: ChunkFeed, count: int) -> tuple[Child, Child]:
    """A mover and a worker that have so many chunks, which are all."""
    make(feed, count)
    feed.shrink(count)
    mover, worker = Child(), Child()
    feed.add(1, mover.post, count, is_mover=True)
    feed.add(2, worker.post, count)
    for key in (1, 2):
        feed.on_taken(key, count)
    assert feed.is_settled
    return mover, worker


def test_the_mover_makes_more_and_workers_are_sent_them_at_once(feed: ChunkFeed) -> None:
    mover, worker = settled(feed, 5)
    feed.grow(9)
    assert (mover.asked, feed.vault.is_full, feed.is_settled) == (9, False, False)
    make(feed, 4)
    assert worker.sent == [(0, 5), (5, 4)]
    assert mover.sent == [(0, 5)]
    assert not feed.is_settled
    feed.on_taken(2, 9)
    assert feed.is_settled


def test_a_worker_that_starts_while_device_grows_takes_all_of_it(feed: ChunkFeed) -> None:
    settled(feed, 5)
    feed.grow(9)
    late = Child()
    feed.add(3, late.post, feed.vault.count)
    make(feed, 4)
    feed.on_taken(3, 5)
    assert late.sent == [(0, 5), (5, 4)]


def test_what_was_said_before_a_shrink_is_not_taken_for_what_is_there(feed: ChunkFeed) -> None:
    _, worker = settled(feed, 5)
    feed.grow(9)
    make(feed, 4)
    feed.shrink(6)
    assert not feed.is_settled
    feed.on_taken(2, 9)  # the answer to the chunks that were sent before
    assert not feed.is_settled
    feed.on_taken(1, 6)
    feed.on_taken(2, 6)
    assert feed.is_settled
    feed.grow(8)
    make(feed, 2)
    assert worker.sent[-1] == (6, 2)


def test_without_a_mover_nothing_grows(feed: ChunkFeed) -> None:
    settled(feed, 5)
    feed.forget(1)
    assert not feed.is_settled
