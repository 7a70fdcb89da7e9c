"""The words in which peers are spoken of: what one needs, what it is asked to serve, where it is.

A peer is a module that says how to install a server and how to start it for a `Job`.  It starts
nothing itself: it returns a `Launch`, so that every peer is started, watched and ended alike.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from overcommit.bench.dialect import Dialect
from overcommit.bench.errors import BenchError

if TYPE_CHECKING:
    from overcommit.bench.peers.environments import Environment


class CannotDo(BenchError):
    """A peer cannot do what a scenario asks; the report says why and goes on without it."""

    code = "cannot_do"


class Kind(enum.Enum):
    """What is served."""

    ECHO = "echo"  # one model: FP32 [n, width] -> the same, times its scale; batches
    PAYLOAD = "payload"  # one model: FP32 [n, any] -> the same; large and binary
    MANY = "many"  # many echo models, all in memory
    MULTIPLEXED = "multiplexed"  # many tables in files, room for some of them; see `tables`
    EMBEDDING = "embedding"  # a text encoder


@dataclass(slots=True, frozen=True)
class Requirements:
    """What pip installs, step by step; each step is one `pip install`."""

    version: str
    steps: tuple[tuple[str, ...], ...]
    pythons: frozenset[str] = frozenset()  # empty: any


@dataclass(slots=True, frozen=True)
class Job:
    """What a server is to serve."""

    kind: Kind
    folder: Path  # for logs, and for what the peer has to write
    # By model; of MULTIPLEXED ones, the names alone count.
    scales: Mapping[str, float] = field(default_factory=lambda: {"echo": 2.0})
    width: int = 16
    batch_max: int = 64
    weights: Path | None = None  # MULTIPLEXED: NAME.npy for every model
    room: int = 0  # MULTIPLEXED: models that may be in memory
    protocol: str = "http"  # or grpc


@dataclass(slots=True, frozen=True)
class Launch:
    """How to start a server that listens on 127.0.0.1:port."""

    argv: tuple[str, ...]
    dialect: Dialect
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # how it is configured, for the report
    leftovers: tuple[Path, ...] = ()  # folders outside the job's, to be removed afterwards


@dataclass(slots=True, frozen=True)
class Peer:
    """A server that ours is compared with."""

    name: str
    requirements: Requirements
    launch: Callable[[Job, Environment, int], Launch]  # raises CannotDo
    installed_as: str = ""  # the peer whose environment it shares


def only(peer: str, job: Job, *kinds: Kind, because: str) -> None:
    """Raise CannotDo unless the job is of one of these kinds."""
    if job.kind not in kinds:
        raise CannotDo(f"{peer} is not asked for '{job.kind.value}': {because}")
