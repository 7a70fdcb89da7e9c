"""Which models an ensemble brings along when it is loaded, and takes along when it is unloaded.

As Triton does: a load brings all models of its steps; an unload with `unload_dependents` takes those that
no client has loaded by name and that no other ensemble has among its steps.

Pure.  Called by administration.
"""

from __future__ import annotations

from collections.abc import Collection

from overcommit.runtime.entries import State
from overcommit.runtime.registry import Registry


def brought_along(registry: Registry, name: str) -> list[str]:
    """Return the models of an ensemble's steps, and of those that are ensembles; [] of others."""
    found: dict[str, None] = {}
    waiting = [name]
    while waiting:
        for model in _steps(registry, waiting.pop()):
            if model not in found and model != name:
                found[model] = None
                waiting.append(model)
    return list(found)


def taken_along(registry: Registry, name: str, kept: Collection[str]) -> list[str]:
    """Return the models that go when an ensemble does; `kept`: loaded by name, or in use otherwise."""
    if not _steps(registry, name):
        return []
    users: dict[str, set[str]] = {}  # model -> ensembles that are in service
    for entry in registry.with_hidden():
        if entry.config.steps and entry.state is not State.UNLOADED and not entry.retired:
            for step in entry.config.steps:
                users.setdefault(step.model, set()).add(entry.name)
    gone = {name: None}
    waiting = [name]
    while waiting:
        for model in _steps(registry, waiting.pop()):
            is_free = users.get(model, set()) <= gone.keys()
            if model not in gone and model not in kept and is_free:
                gone[model] = None
                waiting.append(model)
    return [model for model in gone if model != name]


def _steps(registry: Registry, name: str) -> list[str]:
    """Of its versions, and of those that wait to take their places: they wait for these models."""
    versions = registry.with_successors(name) if registry.has(name) else ()
    return [step.model for entry in versions for step in entry.config.steps]
