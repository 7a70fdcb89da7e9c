"""The pack queue: order, a packer that dies, a packer that is idle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from overcommit.runtime.config import (
    PACK_TIMEOUT_S,
    START_TIMEOUT_S,
    ModelConfig,
    Settings,
)
from overcommit.runtime.control import ControlSocket, socket_pair
from overcommit.runtime.messages import LogLevel, Ready, Start, Stop
from overcommit.runtime.pack_limits import PACKER_IDLE_S
from overcommit.runtime.packer_messages import Pack, PackDone, PackProgress
from overcommit.runtime.packing import Packing
from overcommit.runtime.process import Process


class Bench:
    """A pack queue whose packer is the test."""

    def __init__(self) -> None:
        self.peers: list[ControlSocket] = []
        self.done: list[tuple[int, PackDone]] = []
        self.unwanted: set[int] = set()
        self.packing = Packing(Settings(), self.start, self.describe, self.on_done)
        self.now_ns = 1

    def start(self) -> Process:
        ours, theirs = socket_pair()
        self.peers.append(ControlSocket(theirs))
        return Process("packer", ControlSocket(ours))

    def describe(self, slot: int, job: int) -> Pack | None:
        if slot in self.unwanted:
            return None
        config = ModelConfig()
        return Pack(
            job=job,
            name=f"m{slot}",
            version="1",
            folder="",
            config=config,
            cache_dir="",
            allow_code=False,
        )

    def on_done(self, slot: int, done: PackDone) -> None:
        self.done.append((slot, done))

    def said(self) -> list[object]:
        messages = []
        while (received := self.peers[-1].try_receive()) is not None:
            messages.append(received[0])
        return messages

    def jobs(self) -> list[str]:
        return [message.name for message in self.said() if isinstance(message, Pack)]

    def say(self, message: object) -> None:
        self.packing.on_message(message, self.now_ns)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    if made.packing.process is not None:
        made.packing.process.control.close()
    for peer in made.peers:
        peer.close()


def test_jobs_go_one_by_one_and_a_hurried_one_goes_next(bench: Bench) -> None:
    for slot in (1, 2, 3, 2):
        bench.packing.add(slot)
    bench.packing.step(1)
    bench.say(Ready(pid=1))
    bench.packing.hurry(3)
    assert len(bench.packing) == 3
    started = bench.said()
    assert isinstance(started[0], Start)
    assert [m.name for m in started if isinstance(m, Pack)] == ["m1"]
    bench.say(PackProgress(job=1, done=5, total=10))
    assert [bench.packing.share_done(slot) for slot in (1, 2, 3)] == [0.5, None, None]
    bench.say(PackDone(job=1, ok=True))
    assert bench.jobs() == ["m3"]
    bench.say(PackDone(job=2, ok=False, message="no"))
    assert bench.jobs() == ["m2"]
    bench.say(PackDone(job=3, ok=True))
    assert [(slot, done.ok) for slot, done in bench.done] == [(1, True), (3, False), (2, True)]
    assert len(bench.packing) == 0


def test_a_log_level_reaches_this_packer_and_those_that_follow(bench: Bench) -> None:
    bench.packing.set_level("DEBUG")
    bench.packing.add(1)
    bench.packing.step(1)
    assert [m.level for m in bench.said() if isinstance(m, LogLevel)] == ["DEBUG"]
    bench.packing.set_level("WARNING")
    assert [m.level for m in bench.said() if isinstance(m, LogLevel)] == ["WARNING"]


def test_what_is_dropped_or_unwanted_is_not_packed(bench: Bench) -> None:
    bench.unwanted = {1}
    for slot in (1, 2, 3):
        bench.packing.add(slot)
    bench.packing.drop(2)
    bench.packing.step(1)
    bench.say(Ready(pid=1))
    assert bench.jobs() == ["m3"]


def test_a_packer_that_dies_twice_over_a_version_breaks_that_version_only(bench: Bench) -> None:
    bench.packing.add(1)
    bench.packing.add(2)
    for _ in range(2):
        bench.packing.step(1)
        bench.say(Ready(pid=1))
        assert bench.jobs() == ["m1"]
        assert bench.packing.process is not None
        bench.packing.process.control.close()
        bench.packing.on_dead("signal 9")
    assert [(slot, done.ok) for slot, done in bench.done] == [(1, False)]
    assert "signal 9" in bench.done[0][1].message
    bench.packing.step(1)
    bench.say(Ready(pid=1))
    assert bench.jobs() == ["m2"]


def test_an_answer_to_an_old_job_changes_nothing(bench: Bench) -> None:
    bench.packing.add(1)
    bench.packing.step(1)
    bench.say(Ready(pid=1))
    bench.say(PackDone(job=77, ok=True))
    assert bench.done == []
    assert bench.packing.current == 1


def test_an_idle_packer_is_sent_home_and_a_new_one_comes_for_new_work(bench: Bench) -> None:
    bench.packing.add(1)
    bench.packing.step(1)
    bench.say(Ready(pid=1))
    bench.say(PackDone(job=1, ok=True))
    bench.said()
    bench.packing.step(2)
    bench.packing.step(3 + int(PACKER_IDLE_S * 1e9))
    assert bench.said() == [Stop()]
    assert bench.packing.process is not None
    bench.packing.process.control.close()
    bench.packing.on_dead("exit status 0")
    bench.packing.add(2)
    bench.packing.step(4)
    assert len(bench.peers) == 2


def test_a_version_that_does_not_get_on_is_given_up_and_the_rest_goes_on(bench: Bench) -> None:
    bench.packing.add(1)
    bench.packing.add(2)
    bench.packing.step(1)
    bench.say(Ready(pid=1))
    limit_ns = int(PACK_TIMEOUT_S * 1e9)
    # What it says of getting on counts, whether anything is written yet or not.
    for done, total in ((0, 0), (1, 9), (2, 9)):
        bench.now_ns += limit_ns
        bench.packing.step(bench.now_ns)
        bench.say(PackProgress(job=1, done=done, total=total))
    process = bench.packing.process
    assert process is not None
    assert not process.kill_asked
    assert bench.packing.share_done(1) == 2 / 9
    bench.packing.step(bench.now_ns + limit_ns + 1)
    assert process.kill_asked
    process.control.close()
    bench.packing.on_dead("signal 9")
    ((slot, done),) = bench.done
    assert (slot, done.ok) == (1, False)
    assert "no progress for 600 s" in done.message
    assert "--pack-timeout" in done.message
    bench.packing.step(bench.now_ns)
    bench.say(Ready(pid=2))
    assert bench.jobs() == ["m2"]


def test_a_packer_that_does_not_get_ready_is_replaced(bench: Bench) -> None:
    bench.packing.add(1)
    bench.packing.step(1)
    late_ns = 2 + int(START_TIMEOUT_S * 1e9)
    bench.packing.step(late_ns)
    process = bench.packing.process
    assert process is not None
    assert process.kill_asked
    process.control.close()
    bench.packing.on_dead("signal 9")
    assert bench.done == []
    bench.packing.step(late_ns)
    bench.say(Ready(pid=2))
    assert bench.jobs() == ["m1"]


def test_the_packer_is_described_while_there_is_one(bench: Bench) -> None:
    assert bench.packing.describe() == []
    bench.packing.add(1)
    bench.packing.step(1)
    assert [(row["kind"], row["state"]) for row in bench.packing.describe()] == [
        ("packer", "STARTING")
    ]
    bench.say(Ready(pid=1))
    assert [row["state"] for row in bench.packing.describe()] == ["LIVE"]


def test_a_verdict_on_one_version_is_not_the_next_ones(bench: Bench) -> None:
    bench.packing.add(1)
    bench.packing.step(1)
    bench.say(Ready(pid=1))
    bench.packing.step(2 + int(PACK_TIMEOUT_S * 1e9))
    assert bench.packing.process is not None
    # It answers just before it is killed: what it was at is done, and the next one waits for another.
    bench.packing.add(2)
    bench.say(PackDone(job=1, ok=True))
    bench.packing.process.control.close()
    bench.packing.on_dead("signal 9")
    assert [(slot, done.ok) for slot, done in bench.done] == [(1, True)]
    for _ in range(2):
        bench.packing.step(1)
        bench.say(Ready(pid=2))
        assert bench.packing.process is not None
        bench.packing.process.control.close()
        bench.packing.on_dead("signal 6, SIGABRT")
    slot, done = bench.done[-1]
    assert slot == 2
    assert "SIGABRT" in done.message
    assert "mend it, and load it again" in done.message
