"""The arrays of a batch of sequences: what clients sent, controls and states in; answers and states out.

    direct   a request's row is its sequence's slot; rows between that are nobody's now are zeros, and
             their READY says no
    oldest   a row for each request

A version that does not batch gets one request, and its arrays have no row in front.

Invariants
 1. Every row that is somebody's has the state that its last request left, or the first one's.
 2. What is returned as a state is a copy: it shares nothing with what the model gave.

Pure but for the files of first states.  Called by the runner of sequences.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from overcommit.runtime.assembly import gather
from overcommit.runtime.config import (
    BODY_BYTES_MAX,
    Control,
    ModelConfig,
    SequenceState,
    TensorSpec,
    smallest,
)
from overcommit.runtime.errors import ImageError, ModelError
from overcommit.runtime.sequence_terms import ASK_NAME, Ask
from overcommit.runtime.signature import NUMPY_TYPES, Form, Signature

Array = np.ndarray[Any, Any]
States = tuple[Array, ...]
_BYTES: Final = np.dtype(object)


@dataclass(slots=True, frozen=True)
class Seat:
    """One request of a batch: its row, what it says, and the states before it; () the first ones."""

    row: int
    ask: Ask
    states: States


class SequenceBatch:
    """How the batches of one version are made."""

    def __init__(self, config: ModelConfig) -> None:
        """Read the files of first states.  Raises ImageError."""
        sequence = config.sequence
        assert sequence is not None, "a version with sequences"
        self.batches = config.batching.max_batch_size > 0
        self.is_direct = sequence.strategy == "direct"
        specs = {spec.name: spec for spec in config.inputs}
        self._controls = [(each, specs[each.name]) for each in sequence.controls]
        self._states = sequence.states
        self._first = tuple(_first(state, self.batches) for state in sequence.states)

    @property
    def has_states(self) -> bool:
        """Whether what a sequence leaves is kept here, not by the model itself."""
        return bool(self._states)

    # --- in -------------------------------------------------------------------------------------
    def inputs(
        self,
        signature: Signature,
        forms: Several[Form],
        blocks: Several[memoryview],
        seats: Several[Seat],
    ) -> dict[str, Array]:
        """Make the arrays of a batch, as `assembly.gather`, with controls and states."""
        arrays = gather(signature, forms, blocks)
        del arrays[ASK_NAME]
        rows = self._rows(seats)
        if rows != len(seats) or any(seat.row != at for at, seat in enumerate(seats)):
            index = [seat.row for seat in seats]
            arrays = {name: _scattered(array, index, rows) for name, array in arrays.items()}
        for control, spec in self._controls:
            arrays[control.name] = self._control(control, spec, seats, rows)
        for number, state in enumerate(self._states):
            arrays[state.input] = self._state(number, state, seats, rows)
        return arrays

    def _rows(self, seats: Several[Seat]) -> int:
        return 1 + max(seat.row for seat in seats) if self.is_direct else len(seats)

    def _control(
        self, control: Control, spec: TensorSpec, seats: Several[Seat], rows: int
    ) -> Array:
        kind = NUMPY_TYPES[spec.datatype]
        shape = tuple(max(1, size) for size in spec.shape)
        if self.batches:
            shape = (rows, *shape[1:])
        if control.kind == "corrid":
            array = np.full(shape, b"", _BYTES) if kind == _BYTES else np.zeros(shape, kind)
        else:
            array = np.full(shape, control.values[0], kind)
        for seat in seats:
            value: object = control.values[1]
            if control.kind == "corrid":
                value = str(seat.ask.key).encode() if kind == _BYTES else seat.ask.key
            elif not _is_true(control, seat.ask):
                continue
            array[seat.row if self.batches else ...] = value
        return array

    def _state(self, number: int, state: SequenceState, seats: Several[Seat], rows: int) -> Array:
        each = [seat.states[number] if seat.states else self._first[number] for seat in seats]
        if not self.batches:
            return each[0].copy()
        array = _empty((rows, *each[0].shape), NUMPY_TYPES[state.datatype])
        for seat, mine in zip(seats, each, strict=True):
            array[seat.row] = mine
        return array

    # --- out ------------------------------------------------------------------------------------
    def outputs(
        self, signature: Signature, outputs: dict[str, Array], seats: Several[Seat]
    ) -> tuple[dict[str, Array], list[States]]:
        """Return each request's rows of what clients get, and the states that each leaves.

        Raises ModelError for outputs that are not what the version says.
        """
        index = [seat.row for seat in seats]
        rows = self._rows(seats)
        for name in {
            *(spec.name for spec in signature.outputs),
            *(each.output for each in self._states),
        }:
            array = outputs.get(name)
            if array is None:
                raise ModelError(f"the model returned no output '{name}'")
            if self.batches and array.shape[:1] != (rows,):
                raise ModelError(
                    f"output '{name}' has shape {list(array.shape)} for a batch of {rows} rows"
                )
        states: list[States] = [() for _ in seats]
        if self._states:
            kept = [self._kept(state, outputs[state.output]) for state in self._states]
            if self.batches:
                states = [tuple(array[row].copy() for array in kept) for row in index]
            else:
                states = [tuple(array.copy() for array in kept)]
        mine = {spec.name: outputs[spec.name] for spec in signature.outputs}
        if self.batches and (rows != len(index) or index != list(range(rows))):
            mine = {name: array[index] for name, array in mine.items()}
        return mine, states

    def group(self, states: States) -> tuple[tuple[int, ...], ...]:
        """What states must have in common to share a batch; (): as the first ones have it."""
        shapes = tuple(array.shape for array in states)
        return () if shapes == tuple(array.shape for array in self._first) else shapes

    @staticmethod
    def _kept(state: SequenceState, array: Array) -> Array:
        if array.dtype != NUMPY_TYPES[state.datatype] or array.ndim != len(state.shape):
            raise ModelError(
                f"state '{state.output}' is {array.dtype} {list(array.shape)}, the model's config says "
                f"{state.datatype} {list(state.shape)}"
            )
        return array


def warm_inputs(config: ModelConfig, inputs: dict[str, Array]) -> dict[str, Array]:
    """Make the controls of warm-up inputs say that it is a sequence of one request."""
    if config.sequence is None:
        return inputs
    changed = dict(inputs)
    for control in config.sequence.controls:
        if control.kind != "corrid":
            changed[control.name] = np.full_like(inputs[control.name], control.values[1])
    return changed


def _is_true(control: Control, ask: Ask) -> bool:
    if control.kind == "start":
        return ask.is_start
    return control.kind == "ready" or ask.is_end


def _empty(shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    return np.full(shape, b"", _BYTES) if kind == _BYTES else np.zeros(shape, kind)


def _scattered(array: Array, index: list[int], rows: int) -> Array:
    whole = _empty((rows, *array.shape[1:]), array.dtype)
    whole[index] = array
    return whole


def _first(state: SequenceState, batches: bool) -> Array:
    """Make a row of a sequence's first state."""
    row = state.shape[1:] if batches else state.shape
    shape = state.initial or smallest(row)
    kind = NUMPY_TYPES[state.datatype]
    if not state.file:
        return _empty(shape, kind)
    expected = int(np.prod(shape)) * kind.itemsize
    try:
        size = os.stat(state.file).st_size
        if kind == _BYTES or size != expected or size > BODY_BYTES_MAX:
            raise ImageError(
                f"first state '{state.input}': {state.file} has {size} bytes, the shape {list(shape)} "
                f"of {state.datatype} needs {expected}"
            )
        return np.fromfile(state.file, kind).reshape(shape)
    except OSError as error:
        raise ImageError(f"first state '{state.input}': {error}") from error
