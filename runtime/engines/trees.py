"""Engines `lightgbm`, `xgboost` and `sklearn`: models that their own libraries read.

The file lies in the image as it is, so the budgets count it; what the library makes of it is a private
copy, counted and bounded (`private_copies`), and made again from the mapping when it was dropped.

    lightgbm   *.txt, *.lgb, *.bst    Booster.save_model
    xgboost    *.ubj, *.json, *.bst   Booster.save_model, XGBModel.save_model
    sklearn    *.joblib, *.pkl        a pickle, which runs code: only where operator and model allow it

Input `input`, FP32 or FP64 [rows, features]; outputs `predict` and, where a classifier has it,
`predict_proba`; of what only transforms, `transform`.  A file of XGBClassifier predicts classes, one of a
Booster what its objective gives.

Invariants
 1. Nothing is unpickled but by `sklearn`, and by that only what was allowed.
 2. A model takes as many threads as a batch may.
 3. A model that adapts gives columns: a row for each row, [rows, 1] at least, as MLServer does.

Called by the packer and by workers.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from overcommit.runtime import engines
from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.engines.private_copies import PrivateCopy
from overcommit.runtime.errors import ImageError, ModelError, RepositoryError, said_by
from overcommit.runtime.image import ImageHeader

Array = np.ndarray[Any, Any]

FILE_TENSOR: Final = "file"
INPUT: Final = "input"


class Loaded:
    """A model as its library has it."""

    def __init__(self, features: int, run: Callable[[Array], dict[str, Array]]) -> None:
        self.features = features
        self.run = run


def library(name: str) -> Any:
    """Import a library.  Raises RepositoryError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RepositoryError(
            f"the model needs the package {name} (pip install 'overcommit[trees]'): {error}"
        ) from error


def load(engine: str, content: bytes) -> Loaded:
    """Read a model.  For `sklearn` the caller has seen to it that code may run.

    Raises RepositoryError.
    """
    try:
        return _LOADERS[engine](content)
    except RepositoryError:
        raise
    except Exception as error:  # each library raises its own
        text = said_by(error)
        raise RepositoryError(f"{engine} cannot read the model: {text}") from error


def _load_lightgbm(content: bytes) -> Loaded:
    booster: Any = library("lightgbm").Booster(model_str=content.decode())
    threads = engines.batch_threads()

    def run(rows: Array) -> dict[str, Array]:
        return {"predict": np.asarray(booster.predict(rows, num_threads=threads))}

    return Loaded(booster.num_feature(), run)


def _load_xgboost(content: bytes) -> Loaded:
    package = library("xgboost")
    booster: Any = package.Booster({"nthread": engines.batch_threads()})
    booster.load_model(bytearray(content))
    kind = _estimator_of(booster)
    if kind in ("classifier", "regressor"):
        return _load_estimator(package, kind, content)

    def run(rows: Array) -> dict[str, Array]:
        # A name for each column would have to be asked for; the order is what counts.
        return {"predict": np.asarray(booster.inplace_predict(rows, validate_features=False))}

    return Loaded(booster.num_features(), run)


def _estimator_of(booster: Any) -> str:
    """Return what a file says of the estimator that it was saved by: classifier, regressor, or ""."""
    try:
        return str(json.loads(booster.attr("scikit_learn") or "{}").get("_estimator_type", ""))
    except (ValueError, AttributeError):
        return ""


def _load_estimator(package: Any, kind: str, content: bytes) -> Loaded:
    library("sklearn")
    known = {"classifier": package.XGBClassifier, "regressor": package.XGBRegressor}
    model: Any = known[kind](n_jobs=engines.batch_threads())
    model.load_model(bytearray(content))
    return Loaded(int(model.n_features_in_), lambda rows: _predictions(model, rows))


def _load_sklearn(content: bytes) -> Loaded:
    library("sklearn")
    model: Any = library("joblib").load(io.BytesIO(content))
    if not hasattr(model, "predict") and not hasattr(model, "transform"):
        raise RepositoryError(
            f"the pickle holds a {type(model).__name__}, which neither predicts nor transforms"
        )
    features = int(getattr(model, "n_features_in_", 0))
    return Loaded(features, lambda rows: _predictions(model, rows))


def _predictions(model: Any, rows: Array) -> dict[str, Array]:
    if not hasattr(model, "predict"):
        return {"transform": np.asarray(model.transform(rows))}
    outputs = {"predict": _plain(model.predict(rows))}
    if hasattr(model, "predict_proba"):
        outputs["predict_proba"] = np.asarray(model.predict_proba(rows))
    return outputs


def _plain(labels: Any) -> Array:
    """Make texts of labels that are texts."""
    array: Array = np.asarray(labels)
    if array.dtype.kind not in "SUO":
        return array
    texts = np.empty(array.shape, object)
    texts.reshape(-1)[:] = [str(label).encode() for label in array.reshape(-1)]
    return texts


_LOADERS: Final = {
    "lightgbm": _load_lightgbm,
    "xgboost": _load_xgboost,
    "sklearn": _load_sklearn,
}


class TreesProgram:
    """A library."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        library(header.engine)  # the slow part

    def bind(self, header: ImageHeader, memory: Memory) -> TreesModel:
        """Read a version's file out of the mapping.  Raises ImageError, RepositoryError."""
        if not isinstance(memory, memoryview):
            raise ImageError(f"the {header.engine} engine runs on the CPU alone")
        return TreesModel(header, memory)

    def mixed(self, header: ImageHeader) -> None:
        """A library runs one model."""
        return


class TreesModel:
    """One version."""

    def __init__(self, header: ImageHeader, memory: memoryview) -> None:
        (entry,) = header.tensors
        self._names = [spec.name for spec in header.config.outputs]
        self._columns = header.config.adapts

        def make() -> Loaded:
            return load(header.engine, bytes(memory[entry.offset : entry.offset + entry.nbytes]))

        self._copy = PrivateCopy(entry.nbytes, make)
        if not self._copy.fits:
            raise ImageError(f"its {entry.nbytes} bytes are more than a worker may copy")
        self._copy.get()

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises ModelError."""
        outputs = run(self._copy.get(), inputs, columns=self._columns)
        return {name: outputs[name] for name in self._names}


def run(loaded: Loaded, inputs: dict[str, Array], *, columns: bool = False) -> dict[str, Array]:
    """Run one batch; `columns`: answer [rows, 1] for [rows].  Raises ModelError."""
    (rows,) = inputs.values()
    try:
        outputs = {name: np.ascontiguousarray(array) for name, array in loaded.run(rows).items()}
    except Exception as error:  # each library raises its own
        raise ModelError.of(error) from error
    if not columns:
        return outputs
    return {
        name: array.reshape(-1, 1) if array.ndim == 1 else array for name, array in outputs.items()
    }
