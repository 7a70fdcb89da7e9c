"""Arrays of batches of sequences: rows, controls, states, and what of them comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from overcommit.runtime import payload
from overcommit.runtime.config import (
    Batching,
    Control,
    ModelConfig,
    Sequence,
    SequenceState,
    TensorSpec,
)
from overcommit.runtime.errors import ImageError, ModelError, RepositoryError
from overcommit.runtime.sequence_batch import Seat, SequenceBatch, warm_inputs
from overcommit.runtime.sequence_signature import SequenceSignature
from overcommit.runtime.sequence_terms import (
    ASK_BYTES,
    Ask,
    check_found,
    encode,
    key_problem,
    with_all_tensors,
)
from overcommit.runtime.sequences import Sequences

Array = np.ndarray[Any, Any]
CONTROLS = (
    Control(kind="start", name="START", datatype="FP32", values=(-1, 2)),
    Control(kind="end", name="END", datatype="BOOL"),
    Control(kind="ready", name="READY", datatype="INT32"),
    Control(kind="corrid", name="ID", datatype="BYTES"),
)
STATE = SequenceState(input="in", output="out", datatype="FP32", shape=(-1, -1), initial=(2,))


def config_of(
    *,
    batch: int = 4,
    strategy: Any = "direct",
    controls: tuple[Control, ...] = CONTROLS,
    states: tuple[SequenceState, ...] = (STATE,),
    inputs: tuple[TensorSpec, ...] | None = None,
) -> ModelConfig:
    first = (-1,) if batch else ()
    x = TensorSpec(name="x", datatype="INT32", shape=(*first, 2))
    y = TensorSpec(name="y", datatype="INT32", shape=(*first, 2))
    return with_all_tensors(
        ModelConfig(
            inputs=(x,) if inputs is None else inputs,
            outputs=(y,),
            batching=Batching(max_batch_size=batch),
            sequence=Sequence(strategy=strategy, controls=controls, states=states),
        )
    )


class World:
    """A version's batches, and blocks as a front end writes them."""

    def __init__(self, config: ModelConfig) -> None:
        self.batch = SequenceBatch(config)
        self.signature = SequenceSignature(config, Sequences("m", 4, 1000))
        self.batches = config.batching.max_batch_size > 0

    def block(self, values: list[int], ask: Ask) -> memoryview:
        shape: tuple[int, ...] = (1, 2) if self.batches else (2,)
        ask_shape = (1, ASK_BYTES) if self.batches else (ASK_BYTES,)
        data = [np.array(values, np.int32).tobytes(), encode(ask)]
        places, total = payload.plan([(0, "INT32", 8, shape), (1, "UINT8", ASK_BYTES, ask_shape)])
        block = memoryview(bytearray(total))
        payload.encode(block, places)
        for place, each in zip(places, data, strict=True):
            block[place.offset : place.offset + place.nbytes] = each
        return block

    def inputs(self, *asked: tuple[int, Ask, tuple[Array, ...]]) -> dict[str, Array]:
        blocks = [self.block([row, row], ask) for row, ask, _ in asked]
        forms = [self.signature.read(block) for block in blocks]
        assert [form.ask for form in forms] == [ask for _, ask, _ in asked]
        return self.batch.inputs(self.signature, forms, blocks, [Seat(*each) for each in asked])


START = Ask("a", is_start=True)
END = Ask(9, is_start=True, is_end=True)


def test_in_direct_batches_each_request_has_the_row_of_its_slot() -> None:
    inputs = World(config_of()).inputs((3, START, ()), (1, END, (np.ones(2, np.float32),)))
    assert inputs["x"].tolist() == [[0, 0], [1, 1], [0, 0], [3, 3]]
    assert inputs["START"].tolist() == [[-1], [2], [-1], [2]]
    assert inputs["END"].tolist() == [[False], [True], [False], [False]]
    assert inputs["READY"].tolist() == [[0], [1], [0], [1]]
    assert inputs["ID"].tolist() == [[b""], [b"9"], [b""], [b"a"]]
    assert inputs["in"].tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]
    assert inputs["START"].dtype == np.float32
    assert set(inputs) == {"x", "START", "END", "READY", "ID", "in"}


def test_in_other_batches_rows_are_requests() -> None:
    inputs = World(config_of(strategy="oldest")).inputs((0, START, ()), (1, END, ()))
    assert inputs["x"].tolist() == [[0, 0], [1, 1]]
    assert inputs["READY"].tolist() == [[1], [1]]


def test_a_version_that_does_not_batch_has_no_row_in_front() -> None:
    state = SequenceState(input="in", output="out", datatype="FP32", shape=(2,))
    world = World(config_of(batch=0, states=(state,)))
    inputs = world.inputs((0, START, ()))
    assert {name: array.shape for name, array in inputs.items()} == {
        "x": (2,),
        "START": (1,),
        "END": (1,),
        "READY": (1,),
        "ID": (1,),
        "in": (2,),
    }
    given = {"y": np.zeros(2, np.int32), "out": np.full(2, 5, np.float32)}
    mine, states = world.batch.outputs(world.signature, given, [Seat(0, START, ())])
    assert mine["y"].shape == (2,)
    assert states[0][0].tolist() == [5, 5]


def test_answers_and_states_are_those_of_each_requests_row() -> None:
    world = World(config_of())
    seats = [Seat(3, START, ()), Seat(1, END, ())]
    out = np.arange(12, dtype=np.float32).reshape(4, 3)
    given = {"y": np.arange(8, dtype=np.int32).reshape(4, 2), "out": out}
    mine, states = world.batch.outputs(world.signature, given, seats)
    assert mine["y"].tolist() == [[6, 7], [2, 3]]
    assert [state[0].tolist() for state in states] == [[9, 10, 11], [3, 4, 5]]
    out[:] = 0
    assert states[0][0].tolist() == [9, 10, 11], "a state is a copy"
    assert "out" not in mine
    # It has grown: it shares no batch with first states.
    assert world.batch.group(states[0]) == ((3,),)
    assert world.batch.group((np.zeros(2, np.float32),)) == ()


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"y": np.zeros((1, 2), np.int32)}, "no output 'out'"),
        ({"out": np.zeros((1, 2), np.float32)}, "no output 'y'"),
        ({"y": np.zeros((2, 2), np.int32), "out": np.zeros((1, 2), np.float32)}, "batch of 1 rows"),
        ({"y": np.zeros((1, 2), np.int32), "out": np.zeros((1, 2))}, "state 'out' is float64"),
    ],
)
def test_outputs_that_are_not_what_was_said_fail(outputs: dict[str, Array], text: str) -> None:
    world = World(config_of())
    with pytest.raises(ModelError, match=text):
        world.batch.outputs(world.signature, outputs, [Seat(0, START, ())])


def test_a_first_state_is_what_its_file_holds_and_a_file_of_another_size_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "first"
    np.array([3, 4], np.float32).tofile(path)
    state = SequenceState(input="in", output="out", datatype="FP32", shape=(-1, 2), file=str(path))
    assert World(config_of(states=(state,))).inputs((0, START, ()))["in"].tolist() == [[3, 4]]
    path.write_bytes(b"123")
    with pytest.raises(ImageError, match="has 3 bytes"):
        SequenceBatch(config_of(states=(state,)))
    path.unlink()
    with pytest.raises(ImageError, match="first state 'in'"):
        SequenceBatch(config_of(states=(state,)))


def test_warm_up_is_a_sequence_of_one_request() -> None:
    inputs = {
        "START": np.zeros((1, 1), np.float32),
        "END": np.zeros((1, 1), np.bool_),
        "READY": np.zeros((1, 1), np.int32),
        "ID": np.full((1, 1), b"", object),
    }
    warm = warm_inputs(config_of(), inputs)
    assert (warm["START"], warm["END"], warm["READY"]) == (2, True, 1)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"controls": (CONTROLS[0], CONTROLS[0])}, "'start' is there twice"),
        ({"controls": (Control(kind="start", name="s", datatype="INT64"),)}, "it must be INT32"),
        (
            {"controls": (Control(kind="corrid", name="x", datatype="UINT64"),)},
            "more than one input",
        ),
        ({"states": (STATE, msgspec.structs.replace(STATE, input="b"))}, "two states come out"),
        (
            {"states": (SequenceState(input="a", output="b", datatype="FP32", shape=(2,)),)},
            "its first axis is the batch",
        ),
        (
            {
                "states": (
                    SequenceState(
                        input="a", output="b", datatype="FP32", shape=(-1, 2), initial=(3,)
                    ),
                )
            },
            "begins as",
        ),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(
    more: dict[str, Any], text: str
) -> None:
    with pytest.raises(RepositoryError, match=text):
        config_of(**more)


def test_a_model_without_the_inputs_that_are_named_is_refused() -> None:
    config = config_of(inputs=())
    assert config.inputs == (), "they are found by trials"
    found = (TensorSpec(name="START", datatype="INT32", shape=(-1, 1)),)
    with pytest.raises(RepositoryError, match=r"'START' \(FP32\), which the model has as INT32"):
        check_found("model 'm'", config, found)


def test_an_id_fits_the_control_that_it_goes_into() -> None:
    def problem(datatype: str, key: int | str) -> str | None:
        return key_problem(Control(kind="corrid", name="c", datatype=datatype), key)

    assert problem("UINT64", 2**64 - 1) is None
    assert problem("BYTES", 7) is None
    assert "does not fit INT32" in str(problem("INT32", 2**31))
    assert "is a text" in str(problem("UINT64", "a"))
