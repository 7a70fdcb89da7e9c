"""The versions of a worker and the thread that loads their programs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from worker_rig import FakeProgram, info, opened

from overcommit.runtime.arena import MemfdRanges
from overcommit.runtime.bound import Loader, Opened, Versions
from overcommit.runtime.config import LOAD_BACKOFF_S, PAGE_BYTES
from overcommit.runtime.errors import ImageError
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.mixing import Families
from overcommit.runtime.worker_messages import VersionInfo


class Opener:
    """Returns one program after the other, each when it is let through."""

    def __init__(self) -> None:
        self.made: list[FakeProgram] = []
        self.gate = threading.Semaphore(0)
        self.bell = threading.Semaphore(0)

    def __call__(self, version: VersionInfo) -> Opened:
        assert self.gate.acquire(timeout=60)
        self.made.append(FakeProgram())
        return opened(self.made[-1])

    def let_through(self) -> None:
        """Let one load end, and wait until it has."""
        self.gate.release()
        assert self.bell.acquire(timeout=60)


@pytest.fixture
def opener() -> Opener:
    return Opener()


@pytest.fixture
def versions(opener: Opener) -> Iterator[Versions]:
    fd = create_memfd("device", PAGE_BYTES)
    yield Versions(MemfdRanges(fd), Loader(opener, opener.bell.release), Families(lambda: None))
    os.close(fd)


def test_a_program_is_asked_for_once_while_it_is_loaded(versions: Versions, opener: Opener) -> None:
    version = versions.learn(info(1))
    for _ in range(3):
        versions.open(version)
    opener.let_through()
    assert versions.take_opened() == (version, None)
    versions.open(version)
    assert versions.take_opened() is None
    assert len(opener.made) == 1


def test_a_program_that_was_loaded_for_a_forgotten_version_is_not_given_to_its_successor(
    versions: Versions, opener: Opener
) -> None:
    versions.open(versions.learn(info(1)))
    successor = versions.learn(info(1))
    versions.open(successor)
    opener.let_through()
    assert versions.take_opened() is None
    opener.let_through()
    assert versions.take_opened() == (successor, None)
    assert successor.opened is not None
    assert successor.opened[1] is opener.made[1]


def test_pauses_grow_with_every_failure_and_end(versions: Versions) -> None:
    version = versions.learn(info(1))
    pauses_ns = [versions.fail(version, OSError("gone"), 0).until_ns for _ in range(9)]
    expected = [int(pause * 1e9) for pause in LOAD_BACKOFF_S]
    assert pauses_ns == expected + [expected[-1]] * (9 - len(expected))
    assert version.failing(pauses_ns[-1] - 1) is not None
    assert version.failing(pauses_ns[-1]) is None


def test_a_failure_says_which_version_and_why(versions: Versions) -> None:
    version = versions.learn(info(1))
    torn = versions.fail(version, ImageError("the image is torn"), 0)
    assert (torn.code, torn.message) == (
        "image",
        "model 'm1' version 1 cannot be started: the image is torn",
    )
    foreign = versions.fail(version, KeyError("layer"), 0)
    assert (foreign.code, foreign.message.rpartition(": ")[2]) == ("model_error", "'layer'")
