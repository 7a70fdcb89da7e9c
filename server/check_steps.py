"""Which ensembles of some folders could be asked, by what is known of their steps before anything is packed.

Invariants
 1. A name leads where the server's routing table would lead it: to the newest version that will be served,
    a model's own name before an alias.
 2. What is not known before packing is taken to fit.

Pure.  Called by `check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from overcommit.runtime.config import ModelConfig, Naming
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.sequence_terms import visible_inputs, visible_outputs
from overcommit.runtime.steps import verdict_of

# Of a version: its name and number, what is known of it, why it will not be served ("": it will).
Version = tuple[str, str, ModelConfig, str]
_NOTHING = Naming()


def step_problems(
    versions: Iterable[Version], aliases: Mapping[str, tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Return why ensembles could not be asked, by name and version; `aliases`: -> model, version or ""."""
    models: dict[str, list[tuple[Route, Naming]]] = {}
    for slot, (name, version, config, problem) in enumerate(versions):
        row = (_route(slot, name, version, config, problem), config.naming or _NOTHING)
        models.setdefault(name, []).append(row)

    def find(name: str, version: str) -> Route | None:
        if name not in models:
            name, pinned = aliases.get(name, (name, ""))
            version = version or pinned
        rows = models.get(name, [])
        if version:
            named = (r for r, naming in rows if version in (r.version, naming.called))
            return next(named, None)
        good = [route for route, _ in reversed(rows) if route.state == "ready"]
        shares = next((naming.weights for _, naming in reversed(rows)), {})
        whole = [route for route in good if route.version not in shares] or good
        return next(iter(whole), rows[-1][0] if rows else None)

    found = {}
    for route in (route for rows in models.values() for route, _ in rows):
        if route.steps and route.state == "ready" and (text := verdict_of(route, find).problem):
            found[route.name, route.version] = text
    return found


def _route(slot: int, name: str, version: str, config: ModelConfig, problem: str) -> Route:
    return Route(
        slot=slot,
        name=name,
        version=version,
        state="unavailable" if problem else "ready",
        reason=problem,
        inputs=visible_inputs(config),
        outputs=visible_outputs(config),
        steps=config.steps,
        adapts=config.adapts,
    )
