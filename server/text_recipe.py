"""What a model's folder says about embedding text: how its token vectors become one.

A model that embeds text ships a `tokenizer.json`.  How to pool is in the files of
sentence-transformers, if the folder has them; else token vectors are averaged and scaled to length 1,
as most such models want it.

    modules.json                 which steps follow the transformer
    1_Pooling/config.json        how to pool
    sentence_bert_config.json, tokenizer_config.json, config.json      the most tokens

Invariants
 1. What a folder asks for and this cannot do is refused, never left out.
 2. No file outside of the folder is read.

Called by `text_model`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from overcommit.runtime.errors import BadRequest
from overcommit.runtime.front_end_messages import Route
from overcommit.server.limits import TOKENS_MAX

IDS: Final = "input_ids"
_MADE: Final = frozenset((IDS, "attention_mask", "token_type_ids"))
_FLOATS: Final = frozenset(("BF16", "FP16", "FP32", "FP64"))
_POOLED: Final = ("sentence_embedding", "text_embeds", "embeddings")
_STEPS: Final = frozenset(("Transformer", "Pooling", "Normalize"))
_POOLINGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


@dataclass(slots=True, frozen=True)
class Recipe:
    """What is done with text, and with what the model says to it."""

    output: str  # the output that is read
    is_pooled: bool  # the model gives one vector already
    pooling: str = "mean"
    normalises: bool = True
    tokens_max: int = TOKENS_MAX


def recipe_of(route: Route, folder: Path) -> Recipe:
    """Read it.  Raises BadRequest that says why a model embeds no text."""
    inputs = {spec.name for spec in route.inputs}
    required = {spec.name for spec in route.inputs if not spec.optional}
    if IDS not in inputs or required - _MADE:
        raise BadRequest(
            f"model '{route.name}' embeds no text: it takes {sorted(inputs)}, and only "
            f"{sorted(_MADE)} are made of text"
        )
    wrong = [
        s.name for s in route.inputs if s.name in _MADE and s.datatype not in ("INT32", "INT64")
    ]
    if wrong:
        raise BadRequest(f"model '{route.name}': its input '{wrong[0]}' is not INT32 or INT64")
    output, is_pooled = _output(route)
    pooling, normalises = _steps(route.name, folder)
    return Recipe(output, is_pooled, pooling, normalises, _tokens_max(folder))


def _output(route: Route) -> tuple[str, bool]:
    """Which output is the embedding, and whether it is pooled."""
    floats = {
        spec.name: len(spec.shape)
        for spec in route.outputs
        if spec.datatype in _FLOATS and "logits" not in spec.name
    }
    for name in _POOLED:
        if floats.get(name) == 2:
            return name, True
    hidden = [name for name, rank in floats.items() if rank == 3]
    if "last_hidden_state" in hidden or len(hidden) == 1:
        return ("last_hidden_state" if "last_hidden_state" in hidden else hidden[0]), False
    pooled = [name for name, rank in floats.items() if rank == 2]
    if not hidden and len(pooled) == 1:
        return pooled[0], True
    raise BadRequest(
        f"model '{route.name}' embeds no text: none of its outputs {sorted(floats)} is known to be "
        f"hidden states [rows, tokens, width] or an embedding [rows, width]"
    )


def _steps(name: str, folder: Path) -> tuple[str, bool]:
    """How to pool, and whether to scale to length 1."""
    modules = _read(name, folder / "modules.json", list)
    if modules is None:
        return "mean", True
    kinds = {str(each.get("type", "")).rpartition(".")[2]: each for each in modules}
    if unknown := set(kinds) - _STEPS:
        raise BadRequest(
            f"model '{name}': its modules.json has steps that are not supported: {sorted(unknown)}"
        )
    if "Pooling" not in kinds:
        return "mean", "Normalize" in kinds
    where = (folder / str(kinds["Pooling"].get("path", "")) / "config.json").resolve()
    if not where.is_relative_to(folder.resolve()):
        raise BadRequest(f"model '{name}': its modules.json names a path outside of its folder")
    config = _read(name, where, dict) or {}
    modes = [
        key for key, value in config.items() if key.startswith("pooling_mode_") and value is True
    ]
    if not modes and isinstance(config.get("pooling_mode"), str):
        modes = [
            key
            for key, mode in _POOLINGS.items()
            if config["pooling_mode"] in (mode, f"{mode}token")
        ] or ["pooling_mode"]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise BadRequest(
            f"model '{name}': its way of pooling {modes} is not supported; those that are: "
            f"{sorted(_POOLINGS)}"
        )
    return _POOLINGS[modes[0]], "Normalize" in kinds


def _tokens_max(folder: Path) -> int:
    limits = [TOKENS_MAX]
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
        ("config.json", "max_position_embeddings"),
    ):
        found = _read("", folder / file, dict) or {}
        value = found.get(key)
        if isinstance(value, (int, float)) and 0 < value <= TOKENS_MAX:
            # Positions of this family begin behind the padding's.
            offset = key == "max_position_embeddings" and "roberta" in str(found.get("model_type"))
            padding = found.get("pad_token_id")
            limits.append(int(value) - ((padding or 0) + 1 if offset else 0))
    return max(1, min(limits))


def _read(name: str, path: Path, kind: type[Any]) -> Any:
    """Read a JSON file; None when there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest(f"model '{name}': {path.name} cannot be read: {error}") from error
    items = value if isinstance(value, list) else ()
    if not isinstance(value, kind) or not all(isinstance(each, dict) for each in items):
        raise BadRequest(f"model '{name}': {path.name} is not what it should be")
    return value
