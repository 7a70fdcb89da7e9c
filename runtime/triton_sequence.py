"""Triton's `sequence_batching`, in the words of `model.toml`.

Invariants
 1. What would change a sequence's answers is read or refused.

Pure.  Called by `triton_config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from overcommit.runtime.config import SEQUENCE_CANDIDATES_MAX
from overcommit.runtime.triton_model import Control, Sequence, SequenceState, datatype

FOLDER: Final = "initial_state"  # of the model, where Triton has the files of first states


def unsupported(sequence: Sequence) -> Iterator[str]:
    """What cannot be served."""
    if sequence.iterative_sequence:
        yield "sequence_batching.iterative_sequence is not supported: answers come once for a request"
    if sequence.direct is not None and sequence.oldest is not None:
        yield "sequence_batching has direct and oldest; give one"
    for state in sequence.state:
        if not (state.input_name and state.output_name):
            yield "a state of sequence_batching lacks its input_name or output_name"
        if len(state.initial_state) > 1:
            yield f"state '{state.input_name}' has {len(state.initial_state)} initial states; give one"


def ignored(sequence: Sequence) -> Iterator[str]:
    """What has no meaning here."""
    if sequence.oldest is not None and sequence.oldest.preserve_ordering:
        yield "sequence_batching.oldest.preserve_ordering: every request has its own answer"
    if any(
        each.use_same_buffer_for_input_output or each.use_growable_memory for each in sequence.state
    ):
        yield "sequence_batching.state: hints for Triton's buffers"


def read(sequence: Sequence, batches: bool) -> dict[str, Any]:
    """Return the table `[sequence]`."""
    table: dict[str, Any] = {
        "controls": [
            _control(given.name, control)
            for given in sequence.control_input
            for control in given.control
        ],
        "states": [_state(state, batches) for state in sequence.state],
    }
    if sequence.max_sequence_idle_microseconds:
        table["idle_us"] = sequence.max_sequence_idle_microseconds
    if sequence.oldest is not None:
        table["strategy"] = "oldest"
        if sequence.oldest.max_candidate_sequences:
            count = sequence.oldest.max_candidate_sequences
            table["candidates"] = min(count, SEQUENCE_CANDIDATES_MAX)
    elif sequence.direct is not None and sequence.direct.minimum_slot_utilization:
        table["utilization"] = sequence.direct.minimum_slot_utilization
    return table


def batching(sequence: Sequence) -> dict[str, Any]:
    """What of it belongs into `[batching]`."""
    table: dict[str, Any] = {}
    strategy = sequence.oldest or sequence.direct
    if strategy is not None and strategy.max_queue_delay_microseconds:
        table["max_queue_delay_us"] = strategy.max_queue_delay_microseconds
    if sequence.oldest is not None and sequence.oldest.preferred_batch_size:
        table["preferred_sizes"] = sorted(set(sequence.oldest.preferred_batch_size))
    return table


def _control(name: str, control: Control) -> dict[str, Any]:
    kind = control.kind.removeprefix("CONTROL_SEQUENCE_").lower()
    if kind == "corrid":
        return {"kind": kind, "name": name, "datatype": datatype(name, control.data_type)}
    row: dict[str, Any] = {"kind": kind, "name": name, "datatype": "INT32"}
    for kind_of, values in (
        ("INT32", control.int32_false_true),
        ("FP32", control.fp32_false_true),
        ("BOOL", control.bool_false_true),
    ):
        if values:
            row |= {"datatype": kind_of, "values": [float(value) for value in values]}
    return row


def _state(state: SequenceState, batches: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "input": state.input_name,
        "output": state.output_name,
        "datatype": datatype(state.input_name, state.data_type),
        "shape": [-1, *state.dims] if batches else list(state.dims),
    }
    for first in state.initial_state:
        row["initial"] = list(first.dims)
        if first.data_file:
            row["file"] = f"{FOLDER}/{first.data_file}"
    return row
