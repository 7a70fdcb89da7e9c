"""An ONNX file taken apart: a graph without weights, and the weights for the image.

ONNX Runtime optimises the file first and says what it would compute: constants folded, layers fused.
So a session over the image has nothing left to compute or to copy when it is opened (9 ms for MiniLM).
Then every large initializer, those of `If` and `Loop` bodies too, moves to the top of the graph and out
of the file.

Invariants
 1. The graph holds no initializer of WEIGHT_BYTES_MIN bytes or more, of a type that an image can hold.
 2. Names of inputs and outputs are the file's own, in its order.  A ZipMap at the end (a list of
    dictionaries, what converters of scikit-learn make) becomes the tensor that it was made of.
 3. Only files inside the model's folder are read.

Called by `onnx_source`.  Needs the packages `onnx` and `onnxruntime`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from overcommit.runtime.engines.manifest import dense_stride
from overcommit.runtime.engines.onnx_session import ELEMENT_TYPES, options_for, ort
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.image import TensorFacts

Array = np.ndarray[Any, Any]

WEIGHT_BYTES_MIN: Final = 1024  # shape inference needs the small ones in the graph
WEIGHTS_FILE: Final = "weights"
# In this order; the first whose answers are those of the file is taken.
LEVELS: Final = ("extended", "basic", "none")
_PREPACKED: Final = ("MatMul", "Gemm", "Conv", "LSTM", "GRU", "RNN", "Attention")


@dataclass(slots=True, frozen=True)
class Parts:
    """A graph and its weights."""

    graph: bytes
    facts: list[TensorFacts]
    data: dict[str, memoryview]
    elements: dict[str, int]  # ONNX element type by name, where numpy has none
    prepacked_bytes: int  # of weights that ONNX Runtime would copy into a layout of its own


def check(path: Path) -> None:
    """Refuse a file that reads others outside its folder.  Raises RepositoryError."""
    model = _load(path)
    tensors = [tensor for graph in _graphs(model.graph) for tensor in _tensors(graph)]
    for tensor in tensors:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location != _onnx().TensorProto.EXTERNAL:
            continue
        location = fields.get("location", "")
        inside = path.parent / location
        if os.path.isabs(location) or ".." in Path(location).parts or not inside.is_file():
            raise RepositoryError(
                f"{path.name} keeps '{tensor.name}' in the file '{location}', which is not in the "
                f"model's folder; copy it there"
            )


def take_apart(path: Path, scratch: Path, level: str, *, fold: bool) -> Parts:
    """Optimise a file and take its weights out; `scratch` is an empty folder that may go afterwards.

    Raises RepositoryError when ONNX Runtime cannot load it.
    """
    runtime = ort()
    options = options_for(level)
    options.optimized_model_filepath = str(scratch / "optimised.onnx")
    prefix = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(f"{prefix}file_name", "optimised.bin")
    options.add_session_config_entry(f"{prefix}min_size_in_bytes", str(WEIGHT_BYTES_MIN))
    kept = [] if fold else ["ConstantFolding"]
    try:
        session = runtime.InferenceSession(
            str(path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=kept,
        )
    except Exception as error:  # its exceptions have no common base
        raise RepositoryError(f"{path.name} cannot be loaded by ONNX Runtime: {error}") from error
    model = _load(scratch / "optimised.onnx")
    names = {each.name for each in session.get_inputs()}
    # Old files list weights as inputs, and folding leaves the entries behind.
    _keep(model.graph.input, [each for each in model.graph.input if each.name in names])
    _replace_zip_maps(model.graph)
    _drop_non_tensors(model.graph)
    _lift(model.graph, model.graph, set(_names(model.graph)))
    return _strip(model, scratch / "optimised.bin")


# --- inside -------------------------------------------------------------------------------------
def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise RepositoryError(
            "packing an ONNX file needs the package onnx (pip install 'overcommit[onnx]')"
        ) from error
    return onnx


def _load(path: Path) -> Any:
    try:
        return _onnx().load(str(path), load_external_data=False)
    except RepositoryError:
        raise
    except Exception as error:  # protobuf raises its own
        raise RepositoryError(f"{path.name} is no ONNX file: {error}") from error


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)


def _bodies(node: Any) -> list[Any]:
    kinds = _onnx().AttributeProto
    bodies = [each.g for each in node.attribute if each.type == kinds.GRAPH]
    for each in node.attribute:
        if each.type == kinds.GRAPHS:
            bodies += each.graphs
    return bodies


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        yield from (each.t for each in node.attribute if each.HasField("t"))


def _names(graph: Any) -> Iterator[str]:
    for each in _graphs(graph):
        yield from (tensor.name for tensor in each.initializer)
        for node in each.node:
            yield from node.output


def _keep(field: Any, wanted: list[Any]) -> None:
    """Make a repeated field hold these of its elements."""
    copies = [type(each).FromString(each.SerializeToString()) for each in wanted]
    del field[:]
    field.extend(copies)


def _replace_zip_maps(graph: Any) -> None:
    onnx = _onnx()
    for node in graph.node:
        if node.op_type == "ZipMap":
            node.op_type, node.domain = "Identity", ""
            del node.attribute[:]
            for output in graph.output:
                if output.name == node.output[0]:
                    output.type.CopyFrom(
                        onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
                    )


def _drop_non_tensors(graph: Any) -> None:
    tensors = [each for each in graph.output if each.type.HasField("tensor_type")]
    if not tensors:
        raise RepositoryError(
            f"its outputs {[each.name for each in graph.output]} are no tensors, and only tensors "
            f"can be answered"
        )
    _keep(graph.output, tensors)


def _lift(top: Any, graph: Any, taken: set[str]) -> None:
    """Move the external initializers of bodies to the top, under names of their own."""
    external = _onnx().TensorProto.EXTERNAL
    for node in graph.node:
        for body in _bodies(node):
            _lift(top, body, taken)
            moved = [each for each in body.initializer if each.data_location == external]
            for tensor in moved:
                name, number = tensor.name, 0
                while name in taken and number < len(taken) + 1:
                    number += 1
                    name = f"{tensor.name}#{number}"
                taken.add(name)
                for inner in _graphs(body):
                    for user in inner.node:
                        for index, given in enumerate(user.input):
                            if given == tensor.name:
                                user.input[index] = name
                tensor.name = name
                top.initializer.append(tensor)
            _keep(
                body.initializer,
                [each for each in body.initializer if each.data_location != external],
            )


def _strip(model: Any, file: Path) -> Parts:
    external = _onnx().TensorProto.EXTERNAL
    stored = np.memmap(file, np.uint8, "r") if file.exists() and file.stat().st_size else None
    facts: list[TensorFacts] = []
    data: dict[str, memoryview] = {}
    elements: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != external:
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        shape = tuple(tensor.dims)
        known = ELEMENT_TYPES.get(tensor.data_type)
        assert stored is not None, "ONNX Runtime wrote what it says it wrote"
        start, length = int(fields.get("offset", "0")), int(fields["length"])
        values = stored[start : start + length]
        if known is None or math.prod(shape) * known.itemsize != length:
            tensor.raw_data = values.tobytes()  # four bits and the like stay in the graph
            tensor.data_location = _onnx().TensorProto.DEFAULT
            del tensor.external_data[:]
            continue
        facts.append(
            (tensor.name, "buffer", True, known.name, shape, dense_stride(shape), length, None)
        )
        data[tensor.name] = memoryview(values)  # type: ignore[arg-type]
        elements[tensor.name] = tensor.data_type
        for entry in tensor.external_data:
            if entry.key in ("location", "offset"):
                entry.value = WEIGHTS_FILE if entry.key == "location" else "0"
    return Parts(
        graph=model.SerializeToString(),
        facts=facts,
        data=data,
        elements=elements,
        prepacked_bytes=_prepacked_bytes(model.graph, data),
    )


def _prepacked_bytes(graph: Any, data: dict[str, memoryview]) -> int:
    used = {
        name
        for each in _graphs(graph)
        for node in each.node
        if any(word in node.op_type for word in _PREPACKED)
        for name in node.input[1:]
    }
    return sum(values.nbytes for name, values in data.items() if name in used)
