"""The words of sequences: what a request says of its own, and what of a model's tensors clients see.

A model with state takes, besides what clients send, controls (is this request a sequence's first, its
last, whose it is) and states (what the request before gave).  `ModelConfig` lists all of them among its
inputs and outputs, as the program has them; clients send and get the rest.

To a worker a request says which sequence it is of by one more tensor, the ask: always as long, so that
requests of any sequences share a layout.

    flags, kind, length of the id (2 bytes), 4 bytes of nothing, when it was sent (8 bytes), the id

Invariants
 1. `decode(encode(ask))` is the same; bytes of a peer that are no ask raise ProtocolError.
 2. A number and the text of its digits are different ids.

Pure.  Called by the scan, the packer, the front ends and the workers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from overcommit.runtime.config import (
    SEQUENCE_ID_BYTES_MAX,
    Control,
    ModelConfig,
    Sequence,
    TensorSpec,
)
from overcommit.runtime.errors import ProtocolError, RepositoryError
from overcommit.runtime.payload import align

Key = int | str  # a correlation id; 0 and "" are none

ASK_NAME: Final = ""  # no client's tensor is called that
_HEAD: Final = struct.Struct("<BBH4xQ")
ASK_BYTES: Final = _HEAD.size + SEQUENCE_ID_BYTES_MAX
ASK_ROOM_BYTES: Final = align(ASK_BYTES)  # it is the last tensor of its block
_START: Final = 1
_END: Final = 2
_AGAIN: Final = 4
_NUMBER: Final = 1
_TEXT: Final = 2
_UINT64: Final = struct.Struct("<Q")

# Integers that a correlation id may be, by datatype: the highest.
_HIGHEST: Final = {
    "INT32": 2**31 - 1,
    "UINT32": 2**32 - 1,
    "INT64": 2**63 - 1,
    "UINT64": 2**64 - 1,
}
CORRID_TYPES: Final = (*_HIGHEST, "BYTES")
FLAG_TYPES: Final = ("INT32", "FP32", "BOOL")


class Ask(NamedTuple):
    """What a request says of its sequence."""

    key: Key
    is_start: bool = False
    is_end: bool = False
    is_again: bool = False  # it has run; only its answer did not fit its block
    sent_ns: int = 0  # it was not idle while it waited in a ring


def encode(ask: Ask) -> bytes:
    """Write an ask.  The id must fit: `SEQUENCE_ID_BYTES_MAX` bytes, or 64 bits."""
    flags = _START * ask.is_start | _END * ask.is_end | _AGAIN * ask.is_again
    if isinstance(ask.key, int):
        kind, data = _NUMBER, _UINT64.pack(ask.key)
    else:
        kind, data = _TEXT, ask.key.encode()
    assert len(data) <= SEQUENCE_ID_BYTES_MAX, "ids are checked where they come in"
    return (_HEAD.pack(flags, kind, len(data), ask.sent_ns) + data).ljust(ASK_BYTES, b"\0")


def decode(data: bytes | memoryview) -> Ask:
    """Read an ask that a peer has written.  Raises ProtocolError."""
    if len(data) != ASK_BYTES:
        raise ProtocolError(f"a sequence's ask has {len(data)} bytes, not {ASK_BYTES}")
    flags, kind, length, sent_ns = _HEAD.unpack_from(data)
    text = bytes(data[_HEAD.size : _HEAD.size + length])
    try:
        key: Key = _UINT64.unpack(text)[0] if kind == _NUMBER else text.decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise ProtocolError(f"a sequence's ask holds no id: {error}") from error
    if kind not in (_NUMBER, _TEXT) or not key:
        raise ProtocolError(f"a sequence's ask is of kind {kind}, for no sequence")
    return Ask(key, bool(flags & _START), bool(flags & _END), bool(flags & _AGAIN), sent_ns)


def mark_again(block: memoryview) -> None:
    """Say in the ask at the end of a filled block that its request has run."""
    block[len(block) - ASK_ROOM_BYTES] |= _AGAIN


def ask_spec(batches: bool) -> TensorSpec:
    """The ask as one more input."""
    shape = (-1, ASK_BYTES) if batches else (ASK_BYTES,)
    return TensorSpec(name=ASK_NAME, datatype="UINT8", shape=shape)


def ask_shape(batches: bool) -> tuple[int, ...]:
    """The ask's shape in a request."""
    return (1, ASK_BYTES) if batches else (ASK_BYTES,)


# --- what clients see ---------------------------------------------------------------------------
def visible_inputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """What clients send: neither controls nor states."""
    sequence = config.sequence
    if sequence is None:
        return config.inputs
    hidden = {control.name for control in sequence.controls}
    hidden |= {state.input for state in sequence.states}
    return tuple(spec for spec in config.inputs if spec.name not in hidden)


def visible_outputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """What clients get: no states, but those that the model's file lists as outputs too."""
    sequence = config.sequence
    if sequence is None:
        return config.outputs
    hidden = {state.output for state in sequence.states if not state.is_shown}
    return tuple(spec for spec in config.outputs if spec.name not in hidden)


def asked_of_workers(config: ModelConfig) -> ModelConfig:
    """What a worker's blocks hold: what clients send and get, and the ask behind the inputs."""
    batches = config.batching.max_batch_size > 0
    return msgspec.structs.replace(
        config,
        inputs=(*visible_inputs(config), ask_spec(batches)),
        outputs=visible_outputs(config),
    )


def slots_of(config: ModelConfig) -> int:
    """How many sequences may be open in one worker."""
    sequence = config.sequence
    assert sequence is not None, "a model with sequences"
    if sequence.strategy == "oldest":
        return sequence.candidates
    return max(1, config.batching.max_batch_size)


# --- what a model's file says -------------------------------------------------------------------
def with_all_tensors(config: ModelConfig) -> ModelConfig:
    """List controls and states among the inputs and outputs that a file gives.

    Where it gives none, they are found with all others.  Raises RepositoryError.
    """
    sequence = config.sequence
    if sequence is None:
        return config
    batches = _batches(config)
    for problem in _problems(config, sequence, batches):
        raise RepositoryError(f"[sequence]: {problem}")
    shown = {spec.name for spec in config.outputs}
    states = tuple(
        msgspec.structs.replace(state, is_shown=state.output in shown) for state in sequence.states
    )
    inputs, outputs = list(config.inputs), list(config.outputs)
    if inputs:
        shape = (-1, 1) if batches else (1,)
        inputs += [
            TensorSpec(name=control.name, datatype=control.datatype, shape=shape)
            for control in sequence.controls
        ]
        inputs += [
            TensorSpec(name=state.input, datatype=state.datatype, shape=state.shape)
            for state in states
        ]
    if outputs:
        outputs += [
            TensorSpec(name=state.output, datatype=state.datatype, shape=state.shape)
            for state in states
            if not state.is_shown
        ]
    return msgspec.structs.replace(
        config,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        sequence=msgspec.structs.replace(sequence, states=states),
    )


def check_found(where: str, config: ModelConfig, inputs: tuple[TensorSpec, ...]) -> None:
    """Look for controls and states among the inputs of the model itself.  Raises RepositoryError."""
    if config.sequence is None:
        return
    found = {spec.name: spec.datatype for spec in inputs}
    named = [(control.name, control.datatype) for control in config.sequence.controls]
    named += [(state.input, state.datatype) for state in config.sequence.states]
    for name, datatype in named:
        if found.get(name) != datatype:
            is_there = f"as {found[name]}" if name in found else "not"
            raise RepositoryError(
                f"{where}: its [sequence] names the input '{name}' ({datatype}), which the model "
                f"has {is_there}"
            )


def _batches(config: ModelConfig) -> bool:
    """Whether the shapes of a file have the batch in front."""
    rows = [spec.shape[:1] == (-1,) for spec in config.inputs]
    return config.batching.max_batch_size > 0 and all(rows)


def _problems(config: ModelConfig, sequence: Sequence, batches: bool) -> Iterator[str]:
    kinds = [control.kind for control in sequence.controls]
    for kind in {kind for kind in kinds if kinds.count(kind) > 1}:
        yield f"the control '{kind}' is there twice"
    for control in sequence.controls:
        types = CORRID_TYPES if control.kind == "corrid" else FLAG_TYPES
        if control.datatype not in types:
            yield f"control '{control.name}' is {control.datatype}, it must be {' or '.join(types)}"
    names = [spec.name for spec in config.inputs]
    names += [control.name for control in sequence.controls]
    names += [state.input for state in sequence.states]
    for name in {name for name in names if names.count(name) > 1}:
        yield f"'{name}' is more than one input; an input, control or state has a name of its own"
    outputs = [state.output for state in sequence.states]
    for name in {name for name in outputs if outputs.count(name) > 1}:
        yield f"two states come out of the output '{name}'"
    for state in sequence.states:
        if batches and (not state.shape or state.shape[0] != -1):
            yield (
                f"state '{state.input}' has shape {list(state.shape)}; where the model batches, its "
                f"first axis is the batch, -1"
            )
        row = state.shape[1:] if batches else state.shape
        if state.initial and (
            len(state.initial) != len(row)
            or any(want not in (-1, size) for want, size in zip(row, state.initial, strict=True))
        ):
            yield f"state '{state.input}' begins as {list(state.initial)}, it must fit {list(row)}"


# --- ids ----------------------------------------------------------------------------------------
def key_problem(control: Control, key: Key) -> str | None:
    """Why a model cannot be told this id; None: it can."""
    highest = _HIGHEST.get(control.datatype)
    if highest is None:
        return None  # a number is told by its digits
    if isinstance(key, str):
        return f"its sequence id is a text, the model takes a number ({control.datatype})"
    if key > highest:
        return f"its sequence id {key} does not fit {control.datatype}, which the model takes"
    return None
