"""What the names of models mean beyond their versions: aliases, shares of a rollout, versions on trial.

A model's files say it (`[aliases]`, `[rollout]`); what an operator says over the admin calls goes before
that, is written to the cache folder, and lasts until it is taken back.

Invariants
 1. Front ends are told of a model again exactly when what they were told is no longer so.
 2. A torn or foreign file of the operator's is no file.

Called by the catalogue and by administration, from the supervisor's one thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from overcommit.runtime.config import ALIASES_MAX, NAME_CHARS_MAX, Naming
from overcommit.runtime.errors import BadRequest
from overcommit.runtime.front_end_messages import ModelNames
from overcommit.runtime.model_names import VERSION, name_error
from overcommit.runtime.registry import Registry

log = logging.getLogger("overcommit.rollout")

FILE_NAME: Final = "rollout.json"
_NOTHING: Final = Naming()
_Version = Annotated[str, Meta(pattern=f"^{VERSION}$")]
_Weights = Annotated[dict[_Version, Annotated[float, Meta(ge=0, le=100)]], Meta(max_length=64)]
_Aliases = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)],
        Annotated[str, Meta(pattern=f"^(|latest|{VERSION})$")],
    ],
    Meta(max_length=ALIASES_MAX),
]


def no_shares(versions: Iterable[str]) -> str:
    """What is said where versions with sequences have shares."""
    return (
        f"the rollout's weights of version {', '.join(versions)} mean nothing: requests of a sequence stay "
        f"with one version; ask for the version by number or alias, or leave the weights out"
    )


class Said(msgspec.Struct, omit_defaults=True):
    """What an operator said of one model; None: what its files say."""

    weights: dict[str, float] | None = None
    aliases: dict[str, str] | None = None


class Rollout:
    """What front ends are to know of names."""

    def __init__(self, cache_dir: str, registry: Registry) -> None:
        self._path = Path(cache_dir) / FILE_NAME
        self._registry = registry
        self._told: dict[str, ModelNames] = {}
        self._by_alias: dict[str, tuple[str, str]] | None = None  # None: to be made anew
        self._said: dict[str, Said] = {}
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self._said = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Said])

    def told(self) -> Iterable[ModelNames]:
        """Everything that a new front end must know."""
        return self._told.values()

    def alias(self, name: str) -> tuple[str, str]:
        """Return the model that a further name means, and a version or ""; else the name itself."""
        if self._by_alias is None:
            told = reversed(self._told.values())  # who was first keeps it
            self._by_alias = {a: (each.name, v) for each in told for a, v in each.aliases.items()}
        return self._by_alias.get(name, (name, ""))

    def weights(self, name: str) -> Collection[str]:
        """Return the versions of a model that have shares of their own."""
        named = self._told.get(name)
        return () if named is None else named.weights

    def changes(self, names: Iterable[str]) -> list[ModelNames]:
        """Return what is no longer as front ends were told."""
        changed = []
        for name in dict.fromkeys(names):
            if self._is_plain(name):
                continue
            self._by_alias = None
            now = self._now(name)
            if now == self._told.get(name, ModelNames(name=name)):
                continue
            changed.append(now)
            if shares := self._stateful_shares(name, now.weights):
                log.warning("model '%s': %s", name, no_shares(shares))
            if now == ModelNames(name=name):
                del self._told[name]
            else:
                self._told[name] = now
        return changed

    def _is_plain(self, name: str) -> bool:
        """Whether there is nothing to tell of a name, and never was: so it is of nearly all."""
        if name in self._told or name in self._said or not self._registry.has(name):
            return False
        return not any(
            entry.on_trial or (entry.source_config is not None and entry.source_config.naming)
            for entry in self._registry.versions(name)
        )

    def _stateful_shares(self, name: str, weights: Collection[str]) -> list[str]:
        """Versions with a share whose requests are of sequences."""
        entries = self._registry.versions(name) if weights and self._registry.has(name) else ()
        configs = {e.version: e.source_config for e in entries if e.source_config is not None}
        return [v for v in weights if v in configs and configs[v].sequence is not None]

    def _now(self, name: str) -> ModelNames:
        if not self._registry.has(name):
            return ModelNames(name=name)
        versions = self._registry.versions(name)
        configs = [entry.source_config for entry in versions if entry.source_config is not None]
        naming = (configs[-1].naming if configs else None) or _NOTHING
        said = self._said.get(name) or Said()
        return ModelNames(
            name=name,
            aliases=naming.aliases if said.aliases is None else said.aliases,
            weights=naming.weights if said.weights is None else said.weights,
            held=tuple(entry.version for entry in versions if entry.on_trial),
        )

    # --- what operators say ---------------------------------------------------------------------
    def say(self, name: str, weights: str | None = None, aliases: str | None = None) -> bytes:
        """Take over JSON from an admin call ("null": back to the files); return what holds now.

        Raises BadRequest and NotFound.
        """
        self._registry.find(name)
        said = self._said.get(name) or Said()
        try:
            if weights is not None:
                said.weights = msgspec.json.decode(weights, type=_Weights | None)
            if aliases is not None:
                said.aliases = msgspec.json.decode(aliases, type=_Aliases | None)
        except msgspec.MsgspecError as error:
            raise BadRequest(f"model '{name}': {error}") from error
        if said.weights is not None and sum(said.weights.values()) > 100:
            raise BadRequest(f"model '{name}': the weights add up to more than 100 percent")
        if shares := self._stateful_shares(name, said.weights or {}):
            raise BadRequest(f"model '{name}': {no_shares(shares)}")
        for alias, version in (said.aliases or {}).items():
            problem = name_error(alias)
            if problem is None and self._registry.has(alias):
                problem = f"'{alias}' is a model itself"
            if problem is not None:
                raise BadRequest(f"model '{name}': alias: {problem}")
            if version == "latest" and said.aliases is not None:
                said.aliases[alias] = ""
        self._said.pop(name, None)
        if said != Said():
            self._said[name] = said
        self._save()
        now = self._now(name)
        return msgspec.json.encode({"weights": now.weights, "aliases": now.aliases})

    def _save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(self._said))
            temporary.replace(self._path)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)
