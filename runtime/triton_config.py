"""Triton's `config.pbtxt`: what of it is served, in the words of `model.toml`.

The messages are in `triton_model`.  What has no meaning here is ignored with a note; what would change
answers if it were ignored makes the model one that cannot be served, with the reason.

Invariants
 1. Every field of the file is read, noted, or refused.
 2. Shapes are whole: with a `max_batch_size` above 0 a leading -1 stands for the batch, as in `model.toml`.
 3. Without a version policy the highest version alone is served, as Triton does.

Pure.  Called by `model_files`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from overcommit.runtime import triton_json, triton_sequence
from overcommit.runtime.config import BATCH_SIZE_LIMIT
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.text_format import parse
from overcommit.runtime.triton_model import (
    QueuePolicy,
    Step,
    Tensor,
    TritonModel,
    VersionPolicy,
    Warmup,
    datatype,
)

FILE_NAME: Final = "config.pbtxt"
_ENVIRONMENT: Final = "EXECUTION_ENV_PATH"

# None: found from the files.
_BACKENDS: Final[dict[str, str | None]] = {
    "onnxruntime": "onnx",
    "pytorch": None,
    "python": "python",
    "ensemble": "ensemble",
}
_PLATFORMS: Final[dict[str, str | None]] = {
    "onnxruntime_onnx": "onnx",
    "pytorch_libtorch": None,
    "torch_aoti": "aoti",
    "ensemble": "ensemble",
}


def read(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return a table as `model.toml` has it, and what is ignored.

    Raises RepositoryError when the file is broken, or asks for what cannot be served.
    """
    return _read(*parse(content, TritonModel, FILE_NAME))


def read_json(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return what a configuration says that a client gives with a load, as `read` does."""
    return _read(*triton_json.parse(content, TritonModel, "the configuration"))


def _read(model: TritonModel, unknown: list[str]) -> tuple[dict[str, Any], list[str]]:
    outer = [name for name in unknown if not name.startswith(("optimization.", *_OPAQUE))]
    notes = [f"unknown field '{name}'" for name in outer]
    for problem in _unsupported(model):
        raise RepositoryError(f"{FILE_NAME}: {problem}")
    notes += _ignored(model)
    table: dict[str, Any] = {}
    engine = _engine(model)
    if engine is not None:
        table["engine"] = engine
    if engine == "python":
        # This very line of the model's own asks for its code to run; the server's flag is needed too.
        table["allow_code"] = True
        table["python"] = _python(model, notes)
    if model.default_model_filename:
        table["entry"] = model.default_model_filename
    batches = _batching(model, table, notes)
    for kind, tensors in (("input", model.input), ("output", model.output)):
        if tensors:
            table[kind] = [_tensor(kind, tensor, batches, notes) for tensor in tensors]
    table["versions"] = _versions(model.version_policy)
    if model.parameters:
        table["parameters"] = {key: each.string_value for key, each in model.parameters.items()}
    if model.model_warmup:
        table["warmup"] = [_warmup(each) for each in model.model_warmup]
    if model.sequence_batching is not None:
        table["sequence"] = triton_sequence.read(model.sequence_batching, batches)
        more = triton_sequence.batching(model.sequence_batching)
        table["batching"] = {**table.get("batching", {}), **more}
        notes += triton_sequence.ignored(model.sequence_batching)
    if model.ensemble_scheduling is not None:
        table["ensemble"] = {"step": [_step(step) for step in model.ensemble_scheduling.step]}
    return table, notes


_OPAQUE: Final = (
    "model_metrics.",
    "version_policy.all.",
    *("model_repository_agents.", "model_operations.", "batch_input.", "batch_output."),
    *(
        "instance_group.rate_limiter",
        "instance_group.secondary_devices",
    ),
    *("instance_group.profile", "instance_group.passive", "instance_group.host_policy"),
)


def _unsupported(model: TritonModel) -> Iterator[str]:
    if model.batch_input or model.batch_output:
        yield "batch_input and batch_output are not supported: the model would lack inputs"
    if model.model_operations is not None:
        yield "model_operations (libraries of operators) are not supported"
    if model.model_transaction_policy is not None and model.model_transaction_policy.decoupled:
        yield "decoupled models, which answer never or often, are not supported"
    for tensor in (*model.input, *model.output):
        if tensor.is_shape_tensor or tensor.is_non_linear_format_io:
            yield f"'{tensor.name}' is a tensor of TensorRT alone; export the model to ONNX"
    sequence = model.sequence_batching
    if sequence is not None:
        yield from triton_sequence.unsupported(sequence)
    schedulers = ("dynamic_batching", "sequence_batching", "ensemble_scheduling")
    if sum(getattr(model, name) is not None for name in schedulers) > 1:
        yield f"at most one of {', '.join(schedulers)} can be there"


def _ignored(model: TritonModel) -> Iterator[str]:
    if model.optimization is not None:
        yield "optimization: hints for Triton's backends"
    if model.instance_group:
        yield "instance_group: the server's workers run every model (--workers)"
    for name in ("runtime", "cc_model_filenames", "metric_tags", "model_metrics"):
        if getattr(model, name):
            yield f"{name}: it has no meaning here"
    if model.model_repository_agents is not None:
        yield "model_repository_agents: none are run"
    if model.response_cache is not None and model.response_cache.enable:
        yield "response_cache: every request is computed"


def _engine(model: TritonModel) -> str | None:
    for given, known, field in (
        (model.platform, _PLATFORMS, "platform"),
        (model.backend, _BACKENDS, "backend"),
    ):
        if given:
            if given not in known:
                raise RepositoryError(
                    f"{FILE_NAME}: {field} '{given}' is not served; known are "
                    f"{', '.join(known)}: export the model to ONNX or with torch.export"
                )
            return known[given]
    return "ensemble" if model.ensemble_scheduling is not None else None


def _python(model: TritonModel, notes: list[str]) -> dict[str, Any]:
    """Each model is a process there, whose packages may come with it."""
    given = model.parameters.get(_ENVIRONMENT)
    if given is None:
        return {"process": True}
    path = given.string_value.replace("$$TRITON_MODEL_DIRECTORY/", "../")
    if path.endswith((".tar.gz", ".tgz")):
        raise RepositoryError(
            f"{FILE_NAME}: {_ENVIRONMENT} '{given.string_value}' is an archive, which is not unpacked "
            f"here: unpack it, and name its folder by [python] venv in a model.toml"
        )
    notes.append(f"parameters.{_ENVIRONMENT}: the Python that it holds in bin/ is used")
    return {"process": True, "venv": path}


def _batching(model: TritonModel, table: dict[str, Any], notes: list[str]) -> bool:
    """Fill in how requests are gathered; return whether shapes lack the batch."""
    size = model.max_batch_size
    if size is None and not model.input and not model.output:
        return False  # everything is found out by trials, as Triton completes such a file
    batching: dict[str, Any] = {"max_batch_size": min(size or 0, BATCH_SIZE_LIMIT)}
    if size is not None and size > BATCH_SIZE_LIMIT:
        notes.append(f"max_batch_size: {size} is above the limit of {BATCH_SIZE_LIMIT}")
    dynamic = model.dynamic_batching
    if dynamic is not None:
        batching["max_queue_delay_us"] = dynamic.max_queue_delay_microseconds
        if dynamic.preferred_batch_size:
            batching["preferred_sizes"] = sorted(set(dynamic.preferred_batch_size))
        if dynamic.priority_levels:
            batching["priority_levels"] = dynamic.priority_levels
            batching["default_priority"] = dynamic.default_priority_level
            batching["levels"] = [
                {"level": level, **_queue_policy("priority_queue_policy", policy, notes)}
                for level, policy in sorted(dynamic.priority_queue_policy.items())
            ]
        if dynamic.preserve_ordering:
            notes.append("dynamic_batching.preserve_ordering: every request has its own answer")
        policy = dynamic.default_queue_policy
        if policy is not None:
            batching |= _queue_policy("default_queue_policy", policy, notes)
    table["batching"] = batching
    return bool(size)


def _queue_policy(name: str, policy: QueuePolicy, notes: list[str]) -> dict[str, Any]:
    where = f"dynamic_batching.{name}"
    batching: dict[str, Any] = {}
    if policy.max_queue_size:
        batching["max_queue_size"] = min(policy.max_queue_size, 1_000_000)
    if policy.default_timeout_microseconds:
        batching["queue_timeout_us"] = policy.default_timeout_microseconds
    if policy.timeout_action == "DELAY":
        batching["timeout_action"] = "delay"
    if policy.allow_timeout_override:
        notes.append(f"{where}.allow_timeout_override: a request's own timeout always counts")
    return batching


def _tensor(kind: str, tensor: Tensor, batches: bool, notes: list[str]) -> dict[str, Any]:
    if not tensor.dims:
        raise RepositoryError(f"{FILE_NAME}: {kind} '{tensor.name}' has no dims")
    row: dict[str, Any] = {
        "name": tensor.name,
        "datatype": datatype(tensor.name, tensor.data_type),
        "shape": [-1, *tensor.dims] if batches else list(tensor.dims),
    }
    if tensor.reshape is not None:
        own = tensor.reshape.shape
        row["reshape"] = [-1, *own] if batches else list(own)
    if tensor.optional:
        row["optional"] = True
    if tensor.label_filename:
        row["labels"] = tensor.label_filename
    if tensor.allow_ragged_batch:
        notes.append(f"input '{tensor.name}': requests of different shapes run one after another")
    if tensor.format != "FORMAT_NONE":
        notes.append(f"{kind} '{tensor.name}': format is a hint")
    return row


def _versions(policy: VersionPolicy | None) -> dict[str, Any]:
    if policy is None:
        return {"latest": 1}
    given = [name for name in ("latest", "all", "specific") if getattr(policy, name) is not None]
    if len(given) > 1:
        raise RepositoryError(f"{FILE_NAME}: version_policy has {' and '.join(given)}; give one")
    if policy.specific is not None:
        return {"specific": list(policy.specific.versions)}
    return (
        {"all": True}
        if policy.all is not None
        else {"latest": max(1, policy.latest.num_versions) if policy.latest is not None else 1}
    )


def _warmup(warmup: Warmup) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for name, given in warmup.inputs.items():
        row: dict[str, Any] = {
            "datatype": datatype(name, given.data_type),
            "shape": list(given.dims),
        }
        if given.input_data_file:
            row |= {"data": "file", "file": f"warmup/{given.input_data_file}"}
        elif given.random_data:
            row["data"] = "random"
        inputs[name] = row
    return {
        "name": warmup.name,
        "batch_size": max(1, warmup.batch_size),
        "count": max(1, warmup.count),
        "inputs": inputs,
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "model": step.model_name,
        "version": "" if step.model_version < 0 else str(step.model_version),
        "inputs": step.input_map,
        "outputs": step.output_map,
    }
