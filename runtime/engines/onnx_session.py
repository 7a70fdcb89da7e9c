"""The `onnx` engine: an ONNX Runtime session whose weights lie in the mapping.

A session is bound once per version.  It keeps the addresses of the weights, which stay valid when the
version is evicted and comes back elsewhere; it holds none of them itself:

    add_initializer over the mapping, prepacking off     3 MiB a session, weights read in place
    add_external_initializers                            copies everything (measured: not used)
    prepacking on                                        copies what matrix products read, about half

Prepacking is worth 1.5x at batch 1 (bench/LOG.md) and is a model's choice, `[onnx] prepack = true`; its
copies are counted in `private_copies`, and a model that would not fit there runs without.

Invariants
 1. Every weight of the graph is given from the mapping: the file beside it that ONNX Runtime insists on
    is empty.
 2. A session computes on the thread that runs it and on one pool that all sessions share.

Called by the packer and by workers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from overcommit.runtime import engines
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.engines.private_copies import PrivateCopy
from overcommit.runtime.errors import BadRequest, ImageError, ModelError, RepositoryError, said_by
from overcommit.runtime.image import ImageHeader, TensorEntry

Array = np.ndarray[Any, Any]

GRAPH_FILE: Final = "graph.onnx"
GRAPH_TENSOR: Final = "graph"  # the whole file, where the weights are attributes of its nodes


@dataclass(slots=True, frozen=True)
class Element:
    """An element type: torch's name, numpy's."""

    name: str
    numpy: str

    @property
    def itemsize(self) -> int:
        """Bytes of one."""
        return np.dtype(self.numpy).itemsize


# By ONNX's number (TensorProto.DataType); what is not here stays in the graph.
ELEMENT_TYPES: Final[dict[int, Element]] = {
    1: Element("float32", "float32"),
    2: Element("uint8", "uint8"),
    3: Element("int8", "int8"),
    4: Element("uint16", "uint16"),
    5: Element("int16", "int16"),
    6: Element("int32", "int32"),
    7: Element("int64", "int64"),
    9: Element("bool", "bool"),
    10: Element("float16", "float16"),
    11: Element("float64", "float64"),
    12: Element("uint32", "uint32"),
    13: Element("uint64", "uint64"),
    16: Element("bfloat16", "uint16"),
}
_NUMBERS: Final = {element.name: number for number, element in ELEMENT_TYPES.items()}
# ONNX Runtime's names of tensors -> V2.
DATATYPES: Final = {
    "tensor(float)": "FP32",
    "tensor(float16)": "FP16",
    "tensor(double)": "FP64",
    "tensor(bool)": "BOOL",
    "tensor(string)": "BYTES",
    **{f"tensor(int{bits})": f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"tensor(uint{bits})": f"UINT{bits}" for bits in (8, 16, 32, 64)},
}

_pool_lock = threading.Lock()
_has_made_pool = False


def ort() -> Any:
    """Return the package.  Raises RepositoryError when it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RepositoryError(
            "an ONNX model needs the package onnxruntime (pip install 'overcommit[onnx]')"
        ) from error
    return onnxruntime


def _has_pool() -> bool:
    """Whether there is the one pool of threads; it must be there before the first session.

    Where a batch has one thread there is none: a session of one thread has no pool of its own either.
    """
    global _has_made_pool
    threads = engines.batch_threads()
    with _pool_lock:
        if threads > 1 and not _has_made_pool:
            _has_made_pool = True
            ort().set_global_thread_pool_sizes(threads, 1)
    return threads > 1


def options_for(level: str, *, prepack: bool = False) -> Any:
    """Return session options for a level of optimisation: "all", "extended", "basic" or "none"."""
    runtime = ort()
    options = runtime.SessionOptions()
    if _has_pool():
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = options.inter_op_num_threads = 1
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "none": levels.ORT_DISABLE_ALL,
        "all": levels.ORT_ENABLE_ALL,
    }[level]
    options.log_severity_level = 4  # it writes each failed request to stderr
    # An arena of a session's own keeps the memory of the largest batch it ever ran.
    options.enable_cpu_mem_arena = False
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


class OnnxProgram:
    """One graph without weights."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        ort()
        self._path = header.program["file"]
        if not Path(self._path).is_file():
            raise ImageError(f"its graph {self._path} is gone; pack the model again")

    def bind(self, header: ImageHeader, memory: Memory) -> OnnxModel:
        """Bind a version's weights.  Raises ImageError."""
        if not isinstance(memory, memoryview):
            raise ImageError("the onnx engine runs on the CPU alone; export the model for torch")
        return OnnxModel(self._path, header, memory)

    def mixed(self, header: ImageHeader) -> None:
        """A session runs one version."""
        return


class OnnxModel:
    """One version: a session over its weights."""

    def __init__(self, path: str, header: ImageHeader, memory: memoryview) -> None:
        self._weights = {entry.name: _value(entry, memory) for entry in header.tensors}
        self._path = path
        self._memory = memory
        self._call = SessionCall(header.config)
        self._session: Any = None
        self._copy: PrivateCopy[Any] | None = None
        graph = next((entry for entry in header.tensors if entry.name == GRAPH_TENSOR), None)
        if header.program.get("graph") == "image" and graph is not None:
            nbytes, self._graph = graph.nbytes, graph
            self._copy = PrivateCopy(nbytes, self._parse)
            if not self._copy.fits:
                raise ImageError(f"its graph of {nbytes} bytes is more than a worker may copy")
            self._copy.get()
            return
        self._session = self._open(prepack=False)
        if header.config.onnx is not None and header.config.onnx.prepack:
            copy = PrivateCopy(
                int(header.program.get("prepacked_bytes", "0")), lambda: self._open(prepack=True)
            )
            self._copy = copy if copy.fits else None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises BadRequest for sizes that the graph does not take, ModelError."""
        session = self._session if self._copy is None else self._copy.get()
        return self._call(session, inputs)

    @property
    def addresses(self) -> list[int]:
        """Where the weights lie, for tests: in the mapping."""
        return [value.data_ptr() for value in self._weights.values()]

    def _open(self, *, prepack: bool) -> Any:
        options = options_for("none", prepack=prepack)
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        return open_session(self._path, options)

    def _parse(self) -> Any:
        graph = self._graph
        content = bytes(self._memory[graph.offset : graph.offset + graph.nbytes])
        return open_session(content, options_for("none"))


def open_session(source: str | bytes, options: Any) -> Any:
    """Open a session.  Raises ImageError."""
    try:
        return ort().InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ImageError(f"ONNX Runtime cannot open its graph: {error}") from error


def _value(entry: TensorEntry, memory: memoryview) -> Any:
    """Make an OrtValue over the mapping, without a copy."""
    number = _NUMBERS.get(entry.dtype)
    if number is None:
        raise ImageError(f"tensor '{entry.name}' has the unknown type '{entry.dtype}'")
    element = ELEMENT_TYPES[number]
    count = math.prod(entry.shape)
    if (
        count * element.itemsize != entry.nbytes
        or not 0 <= entry.offset <= len(memory) - entry.nbytes
    ):
        raise ImageError(f"tensor '{entry.name}' does not fit its entry in the image")
    array = np.frombuffer(memory, element.numpy, count, entry.offset).reshape(entry.shape)
    values = ort().OrtValue
    if element.name == "bfloat16":
        value = values.ortvalue_from_numpy_with_onnx_type(array, number)
    else:
        value = values.ortvalue_from_numpy(array)
    if count and value.data_ptr() != array.ctypes.data:
        raise ImageError(f"this ONNX Runtime copies tensor '{entry.name}'; upgrade it")
    return value


class SessionCall:
    """Runs sessions with named arrays."""

    def __init__(self, config: ModelConfig) -> None:
        self._texts = [spec.name for spec in config.inputs if spec.datatype == "BYTES"]
        self._names = [spec.name for spec in config.outputs]

    def __call__(self, session: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises BadRequest, ModelError."""
        if self._texts:
            inputs = {**inputs, **{name: _decoded(inputs[name]) for name in self._texts}}
        try:
            results = session.run(self._names, inputs)
        except Exception as error:  # its exceptions have no common base
            text = said_by(error)
            if type(error).__name__ == "InvalidArgument" or isinstance(error, ValueError):
                raise BadRequest(text) from error
            raise ModelError(text) from error
        return dict(zip(self._names, results, strict=True))


def _decoded(array: Array) -> Array:
    """ONNX Runtime's texts are str."""
    texts = np.empty(array.shape, object)
    try:
        flat = [bytes(text).decode() for text in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise BadRequest("a text is not valid UTF-8, which ONNX models take") from error
    texts.reshape(-1)[:] = flat
    return texts
