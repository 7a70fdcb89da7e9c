"""What the supervisor knows of a version's work and of its configuration, as front ends ask for it.

The numbers as they are: how a protocol shows them is the front end's part (`server/statistics.py`,
`server/model_config.py`).

Called by administration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.errors import BadRequest, NotFound
from overcommit.runtime.front_end_messages import Admin
from overcommit.runtime.labels import with_labels
from overcommit.runtime.ledger import FIELDS, BatchRow

if TYPE_CHECKING:  # front ends import this room, and none of the supervisor's
    from overcommit.runtime.house import House


class Account(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One version's counts; times are sums in nanoseconds, as in `ModelCounters`."""

    name: str
    version: str
    counts: tuple[int, ...]  # in the order of ledger.FIELDS
    batches: dict[int, BatchRow]  # by rows
    last_used_ms: int  # since 1970; 0: never
    device_bytes: int
    host_bytes: int

    def count(self, name: str) -> int:
        """Return one of the counts."""
        return self.counts[FIELDS.index(name)]


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """One version's configuration."""

    name: str
    version: str
    engine: str
    config: ModelConfig


class Accounts:
    """Answers the operations `statistics` and `config`."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.operations: dict[str, Callable[[Admin], bytes]] = {
            "statistics": self._statistics,
            "config": self._config,
        }

    def _statistics(self, request: Admin) -> bytes:
        """Accounts of a version, of a model's versions, of all; only of those that serve."""
        name = str(request.arguments.get("name") or "")
        version = str(request.arguments.get("version") or "")
        registry = self._house.registry
        if not name:
            serving: Iterable[Entry] = (e for e in registry.entries() if e.state is State.READY)
            return msgspec.json.encode([self._account(entry) for entry in serving])
        entries = registry.versions(name) if registry.has(name) else []
        ready = [entry for entry in entries if entry.state is State.READY]
        if not ready:
            raise BadRequest(f"requested model '{name}' is not available")
        chosen = [entry for entry in ready if not version or entry.version == version]
        if not chosen:
            raise BadRequest(f"requested model version is not available for model '{name}'")
        return msgspec.json.encode([self._account(entry) for entry in chosen])

    def _account(self, entry: Entry) -> Account:
        house = self._house
        last_ns = house.usage(entry.slot).last_used_ns
        last_ms = 0
        if last_ns:
            last_ms = int(time.time() * 1000) - (time.monotonic_ns() - last_ns) // 1_000_000
        view = house.view(entry.slot)
        return Account(
            name=entry.name,
            version=entry.version,
            counts=house.ledger.get(entry.slot),
            batches=house.ledger.batches(entry.slot),
            last_used_ms=last_ms,
            device_bytes=view.device_bytes if view is not None else 0,
            host_bytes=view.host_bytes if view is not None else 0,
        )

    def _config(self, request: Admin) -> bytes:
        """Describe a version that is known; without one, the newest of those that serve, or of all."""
        name = str(request.arguments.get("name") or "")
        version = str(request.arguments.get("version") or "")
        entries = list(self._house.registry.versions(name))
        if version:
            entries = [entry for entry in entries if entry.version == version]
        if not entries:
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        ready = [entry for entry in entries if entry.state is State.READY]
        entry = (ready or entries)[-1]
        return msgspec.json.encode(
            Described(
                name=entry.name,
                version=entry.version,
                engine=entry.engine,
                config=_as_configured(entry),
            )
        )


def _as_configured(entry: Entry) -> ModelConfig:
    """What packing has found out, with what `model.toml` says and no image depends on."""
    config, source = with_labels(entry.config, entry.source_config), entry.source_config
    if source is None:
        return config
    return msgspec.structs.replace(config, naming=source.naming, warmup=source.warmup)
