"""The files that say how a model is served: `config.pbtxt`, `model-settings.json`, `model.toml`.

Where a folder has several, each is laid over the ones before it in this order, key by key, so our own
file wins; a version folder's file is laid over the model folder's of the same name.

Invariants
 1. All of them become one table in the words of `model.toml`, and are checked by its rules alone.
 2. A broken file names itself.

Pure.  Called by `known_configs` and `server/check.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from overcommit.runtime import mlserver_config, model_toml, triton_config
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.model_toml import merge, to_config

_Reader = Callable[[bytes], tuple[dict[str, Any], list[str]]]
# The later one wins.
READERS: Final[dict[str, _Reader]] = {
    triton_config.FILE_NAME: triton_config.read,
    mlserver_config.FILE_NAME: mlserver_config.read,
    model_toml.FILE_NAME: lambda content: (model_toml.parse(content), []),
}
RANKS: Final = {name: rank for rank, name in enumerate(READERS)}


def read(files: Iterable[tuple[str, bytes]]) -> tuple[ModelConfig, list[str]]:
    """Return what (name, content) of a model's files say, and what of it is ignored.

    Files of equal names come in the order in which they are laid over each other.  Raises
    RepositoryError.
    """
    table: dict[str, object] = {}
    notes: list[str] = []
    names: list[str] = []
    for name, content in sorted(files, key=lambda file: RANKS[file[0]]):
        above, remarks = READERS[name](content)
        table = merge(table, above)
        notes += [f"{name}: {remark}" for remark in remarks]
        names.append(name)
    if not names:
        return ModelConfig(), notes
    return to_config(table, " with ".join(dict.fromkeys(names))), notes
