"""What packing needs to know about an ONNX file: its signature, its own answers, its program.

Invariants
 1. Answers that ours are held against are those of ONNX Runtime over the file as it is.
 2. A dimension is the batch only if it is the first of every input and has one name, or none.

Called by `foreign`, in the packer.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from overcommit.runtime import probes
from overcommit.runtime.config import KIB, ModelConfig, OnnxOptions, TensorSpec
from overcommit.runtime.engines import onnx_graph
from overcommit.runtime.engines.onnx_session import (
    DATATYPES,
    GRAPH_FILE,
    GRAPH_TENSOR,
    SessionCall,
    open_session,
    options_for,
    ort,
)
from overcommit.runtime.engines.store import save_once
from overcommit.runtime.errors import BadRequest, ModelError, RepositoryError
from overcommit.runtime.foreign import Candidate, Foreign
from overcommit.runtime.image import TensorFacts
from overcommit.runtime.packer_messages import Pack
from overcommit.runtime.sources import Source

log = logging.getLogger("overcommit.packer")

Array = np.ndarray[Any, Any]
# A graph that is long though it has no weights keeps them as attributes: trees, mostly.
GRAPH_BYTES_MAX: Final = 64 * KIB
_TEXT: Final = ("input_ids", "attention_mask", "token_type_ids")
_UNNAMED: Final = "unk__"  # what converters call a dimension that they know nothing of


def prepare(job: Pack, source: Source, scratch: Path) -> Foreign:
    """Look at an ONNX file.  Raises RepositoryError."""
    path = source.main
    onnx_graph.check(path)
    options = job.config.onnx or OnnxOptions()
    session = open_session(str(path), options_for("all", prepack=True))
    inputs = _inputs(session.get_inputs())
    outputs = _outputs(job.name, session.get_outputs())
    # A model that takes logarithms of almost nothing answers as its convolutions happen to round.
    plain = open_session(str(path), options_for("none"))
    return Foreign(
        known=probes.Known(inputs, _sizes(inputs)),
        run=_Reference(session, inputs, outputs).run,
        others=(_Reference(plain, inputs, outputs).run,),
        outputs=outputs,
        candidates=lambda: _candidates(path, scratch, fold=not options.keep_quantised),
    )


class _Reference:
    """ONNX Runtime over the file as it is."""

    def __init__(
        self, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self._session = session
        self._types = {spec.name: spec.datatype for spec in outputs}
        self._call = SessionCall(ModelConfig(inputs=tuple(inputs), outputs=tuple(outputs)))

    def run(self, inputs: probes.Arrays) -> tuple[probes.Arrays, dict[str, str]]:
        """Run one batch.  Raises ModelError."""
        try:
            answers = self._call(self._session, inputs)
        except BadRequest as error:
            raise ModelError(error.message) from error
        return {name: _tensor(value) for name, value in answers.items()}, self._types


def _tensor(value: Any) -> Array:
    """Make the tensor that a list of dictionaries (a ZipMap) was made of."""
    if isinstance(value, list):
        return np.array([list(row.values()) for row in value], np.float32)
    array: Array = value
    return array


# --- the signature --------------------------------------------------------------------------------
def _inputs(given: Sequence[Any]) -> tuple[TensorSpec, ...]:
    firsts = {_symbol(each.shape[0]) for each in given if each.shape and not _fixed(each.shape[0])}
    is_batch = len(firsts) == 1 and all(each.shape and not _fixed(each.shape[0]) for each in given)
    is_masked = {"input_ids", "attention_mask"} <= {each.name for each in given}
    specs = []
    for each in given:
        datatype = DATATYPES.get(each.type)
        if datatype is None:
            raise RepositoryError(
                f"input '{each.name}' is {each.type}, which no request can give; export the model "
                f"with tensors of plain types"
            )
        axes: list[str | None] = []
        for axis, size in enumerate(each.shape):
            if _fixed(size):
                axes.append(None)
            elif axis == 0 and is_batch:
                # Where it has no name, the graph does not say that they are equal.
                axes.append("batch" if _symbol(size) else None)
            else:
                # A second use of the batch's name, or of none at all, is a name of its own.
                name = _symbol(size) or f"{each.name}.{axis}"
                axes.append(f"{each.name}.{axis}" if name == "batch" and is_batch else name)
        specs.append(
            TensorSpec(
                name=each.name,
                datatype=datatype,
                shape=tuple(size if _fixed(size) else -1 for size in each.shape),
                axes=tuple(axes),
                pad=0 if is_masked and each.name in _TEXT else None,
            )
        )
    return tuple(specs)


def _outputs(name: str, given: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    for each in given:
        datatype = DATATYPES.get(each.type)
        shape: tuple[int, ...] = tuple(size if _fixed(size) else -1 for size in each.shape)
        if each.type.startswith("seq(map(") and each.type.endswith(",tensor(float)))"):
            datatype, shape = "FP32", (-1, -1)
        if datatype is None:
            log.warning(
                "model '%s': output '%s' is %s, no tensor: it is left out",
                *(name, each.name, each.type),
            )
            continue
        specs.append(TensorSpec(name=each.name, datatype=datatype, shape=shape))
    if not specs:
        raise RepositoryError(
            f"its outputs {[(each.name, each.type) for each in given]} are no tensors, and only "
            f"tensors can be answered; export it without them"
        )
    return tuple(specs)


def _fixed(size: object) -> bool:
    return isinstance(size, int) and size >= 0


def _symbol(size: object) -> str:
    text = size if isinstance(size, str) else ""
    return "" if text.startswith(_UNNAMED) else text


def _sizes(inputs: Sequence[TensorSpec]) -> probes.Sizes:
    """Choose two sizes for every axis that varies."""
    sizes: tuple[dict[str, int], dict[str, int]] = ({"batch": 1}, {"batch": 3})
    names = [name for spec in inputs for name in spec.axes if name not in (None, "batch")]
    for number, name in enumerate(dict.fromkeys(filter(None, names))):
        sizes[0][name], sizes[1][name] = 7 + number, 11 + 2 * number
    return sizes


# --- the program ----------------------------------------------------------------------------------
def _candidates(path: Path, scratch: Path, *, fold: bool) -> Iterator[Candidate]:
    version = ort().__version__
    for level in onnx_graph.LEVELS:
        folder = scratch / level
        folder.mkdir()
        parts = onnx_graph.take_apart(path, folder, level, fold=fold)
        program = {"kind": "onnx", "prepacked_bytes": str(parts.prepacked_bytes)}
        facts: list[TensorFacts] = parts.facts
        data = parts.data
        if not facts and len(parts.graph) > GRAPH_BYTES_MAX:
            program["graph"] = "image"
            shape = (len(parts.graph),)
            facts = [(GRAPH_TENSOR, "buffer", True, "uint8", shape, (1,), shape[0], None)]
            data = {GRAPH_TENSOR: memoryview(parts.graph)}
            digest = hashlib.blake2b(f"{version} image".encode(), digest_size=16).hexdigest()
            yield Candidate(level, program, facts, data, digest, _save_nothing)
            continue
        digest = hashlib.blake2b(parts.graph + version.encode(), digest_size=16).hexdigest()
        yield Candidate(level, program, facts, data, digest, _Saver(parts.graph))


def _save_nothing(folder: Path) -> Path:
    return save_once(folder / GRAPH_FILE, lambda: b"in the image")


class _Saver:
    """Writes a graph into its program's folder, and the empty file that stands for its weights."""

    def __init__(self, graph: bytes) -> None:
        self._graph = graph

    def __call__(self, folder: Path) -> Path:
        save_once(folder / onnx_graph.WEIGHTS_FILE, lambda: b"")
        return save_once(folder / GRAPH_FILE, lambda: self._graph)
