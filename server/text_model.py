"""Text to token ids, and a model's hidden states to one vector.

    texts --tokens--> ids --tensors--> a request of one row --the model--> vector

Invariants
 1. Ids are checked against the tokenizer's vocabulary and the recipe's limit before a model sees them.
 2. Nothing of the model's folder is run.

Pure but for `load`, which reads the folder.  Called by `embeddings`; `load` and `tokens` in a thread,
because they take long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from overcommit.runtime.errors import BadRequest, ModelError, Unavailable
from overcommit.runtime.front_end_messages import Route
from overcommit.server.asking import Tensor
from overcommit.server.text_recipe import IDS, Recipe, recipe_of

Array = np.ndarray[Any, Any]
_NUMPY: Final = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


class TextModel:
    """One version's tokenizer and recipe."""

    def __init__(self, route: Route, tokenizer: Any, recipe: Recipe) -> None:
        self.route = route
        self.recipe = recipe
        self._tokenizer = tokenizer
        self._inputs = {spec.name: spec.datatype for spec in route.inputs}

    @classmethod
    def load(cls, route: Route, folder: Path) -> TextModel:
        """Read a model's folder.  Raises BadRequest, Unavailable."""
        recipe = recipe_of(route, folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadRequest(
                f"model '{route.name}': its folder has no tokenizer.json, so it takes no text; send "
                f"token ids to /v2/models/{route.name}/infer, or put the tokenizer there"
            )
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Unavailable(
                "embeddings of text need the package tokenizers: "
                "pip install 'overcommit[huggingface]'"
            ) from error
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # whatever the package raises: it has one type for all
            raise BadRequest(f"model '{route.name}': its tokenizer.json: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(route, tokenizer, recipe)

    # --- text -> tokens -------------------------------------------------------------------------
    def tokens(
        self, texts: Sequence[str] | Sequence[Sequence[int]], truncates: bool
    ) -> list[Array]:
        """Return the ids of each text, or of lists of ids as they are.  Raises BadRequest."""
        encoded: list[list[int]]
        if isinstance(texts[0], str):
            encoded = [each.ids for each in self._tokenizer.encode_batch(list(texts))]
        else:
            encoded = [[int(token) for token in each] for each in texts]
        limit = self.recipe.tokens_max
        found: list[Array] = []
        for index, ids in enumerate(encoded):
            if not ids:
                raise BadRequest(f"model '{self.route.name}': input {index} is empty")
            if len(ids) > limit:
                if not truncates:
                    raise BadRequest(
                        f"model '{self.route.name}': input {index} has {len(ids)} tokens, the limit "
                        f'is {limit}; send less, or "truncate": true'
                    )
                ids = _cut(ids, limit, isinstance(texts[0], str))
            if min(ids) < 0 or max(ids) >= self._tokenizer.get_vocab_size():
                raise BadRequest(
                    f"model '{self.route.name}': input {index} holds token ids outside of 0 to "
                    f"{self._tokenizer.get_vocab_size() - 1}"
                )
            found.append(np.asarray(ids, np.int64))
        return found

    def tensors(self, ids: Array) -> list[Tensor]:
        """Make the inputs of a request of one row."""
        rows = {
            IDS: ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        shape = (1, len(ids))
        return [
            Tensor(
                name,
                self._inputs[name],
                shape,
                row.astype("<i4" if self._inputs[name] == "INT32" else "<i8").tobytes(),
            )
            for name, row in rows.items()
            if name in self._inputs
        ]

    # --- hidden states -> vector ----------------------------------------------------------------
    def vector(self, tensors: Sequence[Tensor], dimensions: int | None) -> Array:
        """Pool a model's answer to one row: FP32 `[width]`.  Raises ModelError, BadRequest."""
        recipe, name = self.recipe, self.route.name
        tensor = next((each for each in tensors if each.name == recipe.output), None)
        rank = 2 if recipe.is_pooled else 3
        if tensor is None or len(tensor.shape) != rank or 0 in tensor.shape:
            shape = None if tensor is None else list(tensor.shape)
            raise ModelError(f"model '{name}': output '{recipe.output}' has shape {shape}")
        values = _floats(tensor).reshape(tensor.shape)[0]
        if not recipe.is_pooled:
            values = _pool(values, recipe.pooling)
        if dimensions is not None:
            if not 1 <= dimensions <= len(values):
                raise BadRequest(
                    f"model '{name}': dimensions is {dimensions}, its embeddings have {len(values)}"
                )
            values = values[:dimensions]
        if recipe.normalises or dimensions is not None:
            length = float(np.linalg.norm(values))
            values = values / max(length, 1e-12)
        return np.asarray(values, "<f4")


def _cut(ids: Sequence[int], limit: int, is_text: bool) -> list[int]:
    # A tokenizer puts its closing token last, and a model expects it there.
    return [*ids[: limit - 1], ids[-1]] if is_text and limit > 1 else list(ids[:limit])


def _floats(tensor: Tensor) -> Array:
    if tensor.datatype == "BF16":
        bits = np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32)
    return np.frombuffer(tensor.data, _NUMPY[tensor.datatype]).astype(np.float32)


def _pool(values: Array, pooling: str) -> Array:
    """`[tokens, width]` -> `[width]`."""
    if pooling == "cls":
        return np.asarray(values[0])
    if pooling == "last":
        return np.asarray(values[-1])
    if pooling == "max":
        return np.asarray(values.max(axis=0))
    return np.asarray(values.mean(axis=0, dtype=np.float64))
