"""MLServer's `model-settings.json`: what of it is served, in the words of `model.toml`.

Invariants
 1. Every key of the file is read, noted, or refused.
 2. A name of its own becomes an alias of the folder's name, and a version that is no whole number what the
    version is called.
 3. Models of scikit-learn, XGBoost and LightGBM take one tensor of numbers, whatever it is called, and answer
    columns, as MLServer has it; what the file says of their tensors decides nothing there, nor here.

Pure.  Called by `model_files`.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, Final

import msgspec

from overcommit.runtime.config import BATCH_SIZE_LIMIT
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.model_names import VERSION

FILE_NAME: Final = "model-settings.json"
SERVER_FILE_NAME: Final = "settings.json"

_ENGINES: Final = {
    "mlserver_sklearn.SKLearnModel": "sklearn",
    "mlserver_xgboost.XGBoostModel": "xgboost",
    "mlserver_lightgbm.LightGBMModel": "lightgbm",
    "mlserver_huggingface.HuggingFaceRuntime": "torch",
    "mlserver_onnx.OnnxModel": "onnx",
}
_LIBRARIES: Final = frozenset({"sklearn", "xgboost", "lightgbm"})
_VERSION: Final = re.compile(VERSION)


class _Parameters(msgspec.Struct):
    uri: str | None = None
    version: str | int | None = None
    environment_path: str | None = None
    environment_tarball: str | None = None
    inference_pool_gid: str | None = None
    autogenerate_inference_pool_gid: bool = False
    format: str | None = None
    content_type: str | None = None
    extra: dict[str, Any] | None = None


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...] = ()
    parameters: dict[str, Any] | None = None
    tags: dict[str, Any] | None = None


class _Model(msgspec.Struct):
    name: str = ""
    implementation: str = ""
    platform: str = ""
    versions: tuple[str, ...] = ()
    inputs: tuple[_Tensor, ...] = ()
    outputs: tuple[_Tensor, ...] = ()
    parallel_workers: int | None = None
    warm_workers: bool | None = None
    max_batch_size: int = 0
    max_batch_time: float = 0.0
    cache_enabled: bool = False
    parameters: _Parameters | None = None


def read(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return a table as `model.toml` has it, and what is ignored.

    Raises RepositoryError when the file is broken, or asks for what cannot be served.
    """
    try:
        raw = msgspec.json.decode(content, type=dict[str, Any])
        model = msgspec.convert(raw, _Model)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RepositoryError(f"{FILE_NAME}: {error}".replace("`$.", "`")) from error
    notes = [f"unknown key '{key}'" for key in raw if key not in _Model.__struct_fields__]
    notes += [
        f"{key}: the server's workers run every model (--workers)"
        for key in ("parallel_workers", "warm_workers")
        if getattr(model, key) is not None
    ]
    if model.cache_enabled:
        notes.append("cache_enabled: every request is computed")
    if model.platform or model.versions:
        notes.append("platform, versions: they follow from the files and folders")
    table: dict[str, Any] = {}
    if model.implementation:
        table["engine"] = _engine(model.implementation)
    is_library = table.get("engine") in _LIBRARIES
    if is_library:
        table["adapts"] = True
    if table.get("engine") == "sklearn":
        # This very line of the model's own asks for a pickle to be read; the server's flag is needed too.
        table["allow_code"] = True
    parameters = model.parameters or _Parameters()
    _parameters(parameters, table, notes)
    if model.name:
        version = str(parameters.version) if parameters.version is not None else ""
        table["aliases"] = {model.name: ""}
        if version and not _VERSION.fullmatch(version):
            table["called"] = version
    size = min(model.max_batch_size, BATCH_SIZE_LIMIT)
    if size > 1:
        delay_us = round(model.max_batch_time * 1e6)
        table["batching"] = {"max_batch_size": size, "max_queue_delay_us": delay_us}
    for kind, tensors in (("input", model.inputs), ("output", model.outputs)):
        if tensors and is_library:
            notes.append(f"{kind}s: the library's file says what it takes and gives")
        elif tensors:
            table[kind] = [_tensor(kind, tensor, notes) for tensor in tensors]
    return table, notes


def _engine(implementation: str) -> str:
    engine = _ENGINES.get(implementation)
    if engine is None:
        raise RepositoryError(
            f"{FILE_NAME}: the implementation '{implementation}' is not served; known are "
            f"{', '.join(_ENGINES)}: export the model to ONNX or with torch.export"
        )
    return engine


def _parameters(given: _Parameters, table: dict[str, Any], notes: list[str]) -> None:
    if given.uri is not None:
        path = PurePosixPath(given.uri)
        if "://" in given.uri or path.is_absolute() or ".." in path.parts:
            raise RepositoryError(
                f"{FILE_NAME}: parameters.uri '{given.uri}' leads out of the model's folder: copy the "
                f"model into it"
            )
        if path.parts and table.get("engine") == "torch":
            raise RepositoryError(
                f"{FILE_NAME}: parameters.uri '{given.uri}': a model of HuggingFaceRuntime is served from "
                f"the folder of {FILE_NAME} itself: move config.json and *.safetensors there and leave uri "
                f"out. It takes and gives tensors: pipelines and their tasks are not run"
            )
        if path.parts:
            table["entry"] = str(path)
    for name in ("environment_path", "environment_tarball"):
        if getattr(given, name):
            notes.append(f"parameters.{name}: models run in the server's own environment")
    if given.inference_pool_gid or given.autogenerate_inference_pool_gid:
        notes.append("parameters.inference_pool_gid: the server's workers run every model")
    if given.content_type:
        notes.append("parameters.content_type: tensors are taken by their datatypes")
    extra: dict[str, Any] = {} if given.format is None else {"format": given.format}
    for key, value in (given.extra or {}).items():
        if isinstance(value, str | int | float | bool):
            extra[key] = value
        else:
            notes.append(f"parameters.extra.{key}: only texts and numbers are handed on")
    if extra:
        table["parameters"] = extra


def _tensor(kind: str, tensor: _Tensor, notes: list[str]) -> dict[str, Any]:
    if tensor.parameters or tensor.tags:
        notes.append(f"{kind} '{tensor.name}': its parameters and tags")
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
