"""Assembly: requests into arrays, outputs into answers; and what a signature lets share a batch."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import payload
from overcommit.runtime.assembly import gather, split
from overcommit.runtime.config import Batching, ModelConfig, TensorSpec
from overcommit.runtime.errors import BadRequest, ModelError, ProtocolError
from overcommit.runtime.signature import FORMS_MAX, NUMPY_TYPES, Form, Signature

Array = np.ndarray[Any, np.dtype[Any]]


def spec(name: str, shape: tuple[int, ...], datatype: str = "FP32", **fields: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, **fields)


def signature(
    inputs: list[TensorSpec], outputs: list[TensorSpec] | None = None, max_batch_size: int = 8
) -> Signature:
    return Signature(
        ModelConfig(
            inputs=tuple(inputs),
            outputs=tuple(outputs or ()),
            batching=Batching(max_batch_size=max_batch_size),
        )
    )


def raw(array: Array) -> bytes:
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(one)) + one for one in array.reshape(-1))
    return array.tobytes()


def block_of(*tensors: tuple[int, str, Array], dirt: int = 0) -> memoryview:
    """An ingress block as a front end writes it; `dirt` is what lay there before."""
    datas = [raw(array) for _, _, array in tensors]
    places, length = payload.plan(
        [(i, t, len(data), a.shape) for (i, t, a), data in zip(tensors, datas, strict=True)]
    )
    block = memoryview(bytearray([dirt]) * length)
    payload.encode(block, places)
    for place, data in zip(places, datas, strict=True):
        block[place.offset : place.offset + place.nbytes] = data
    return block


def read_answer(block: memoryview, length: int) -> list[Array]:
    view = block[:length]
    arrays = []
    for place in payload.decode(view):
        data = view[place.offset : place.offset + place.nbytes]
        if place.datatype == "BYTES":
            arrays.append(np.array(bytes(data), dtype=object))
        else:
            arrays.append(np.frombuffer(data, NUMPY_TYPES[place.datatype]).reshape(place.shape))
    return arrays


def egress(count: int, capacity: int = 4096) -> list[memoryview]:
    return [memoryview(bytearray(capacity)) for _ in range(count)]


IDS = spec("ids", (-1, -1), "INT64", axes=("batch", "sequence"), pad=0)
MASK = spec("mask", (-1, -1), "INT64", axes=("batch", "sequence"), pad=0)
HIDDEN = spec("hidden", (-1, -1, 2), axes=("batch", "sequence", None))


def text_block(*sizes: int, value: int = 1) -> memoryview:
    ids = np.full((1, sizes[0]), value, np.int64)
    mask = np.ones((1, sizes[-1]), np.int64)
    return block_of((0, "INT64", ids), (1, "INT64", mask))


# --- what can share a batch ---------------------------------------------------------------------
def keys(one: Signature, *blocks: memoryview) -> list[int]:
    return [one.read(block).key for block in blocks]


def test_requests_of_equal_shape_share_a_batch_whatever_their_rows() -> None:
    both = signature([spec("x", (-1, 4))])
    first, second = (
        both.read(block_of((0, "FP32", np.ones((rows, 4), np.float32)))) for rows in (1, 3)
    )
    assert first.key == second.key
    assert (first.rows, second.rows) == (1, 3)
    assert second.row_bytes == 16


def test_a_padded_axis_may_differ() -> None:
    one = signature([IDS, MASK], [HIDDEN])
    assert one.ragged == ("sequence",)
    short, long = keys(one, text_block(3), text_block(9))
    assert short == long


def test_an_axis_may_not_differ_when_one_input_that_has_it_has_no_pad() -> None:
    mask = spec("mask", (-1, -1), "INT64", axes=("batch", "sequence"))
    short, long = keys(signature([IDS, mask], [HIDDEN]), text_block(3), text_block(9))
    assert short != long


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([spec("ids", (-1, -1), "INT64", pad=0)], [spec("y", (-1, 2))]),
        ([IDS], [spec("y", (-1, -1))]),
    ],
    ids=["an input's axis", "an output's axis"],
)
def test_nothing_is_padded_that_could_not_be_told_from_the_answer(
    inputs: list[TensorSpec], outputs: list[TensorSpec]
) -> None:
    one = signature(inputs, outputs)
    blocks = [block_of((0, "INT64", np.ones((1, size), np.int64))) for size in (3, 4)]
    first, second = keys(one, *blocks)
    assert first != second


def test_requests_with_and_without_an_optional_input_do_not_mix() -> None:
    one = signature([spec("x", (-1, 2)), spec("bias", (-1, 2), optional=True)])
    x = np.ones((1, 2), np.float32)
    first, second = keys(one, block_of((0, "FP32", x)), block_of((0, "FP32", x), (1, "FP32", x)))
    assert first != second


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([(0, "FP64", np.ones((1, 4)))], "is FP64, the model takes FP32"),
        ([(0, "FP32", np.ones((1, 5), np.float32))], "has shape"),
        ([(0, "FP32", np.ones(4, np.float32))], "has shape"),
        ([(7, "FP32", np.ones((1, 4), np.float32))], "unknown or given twice"),
        ([(0, "FP32", np.ones((1, 4), np.float32))] * 2, "unknown or given twice"),
        ([], "'x' is missing"),
    ],
)
def test_tensors_that_the_version_does_not_take_are_refused(
    tensors: list[tuple[int, str, Array]], reason: str
) -> None:
    with pytest.raises(BadRequest, match=reason):
        signature([spec("x", (-1, 4))]).read(block_of(*tensors))


def test_inputs_must_agree_on_the_batch_and_on_a_ragged_axis() -> None:
    one = signature([IDS, MASK], [HIDDEN])
    with pytest.raises(BadRequest, match=r"axis 1 .'sequence'. of input 'mask' has size 4"):
        one.read(text_block(3, 4))
    two_rows = np.ones((2, 3), np.int64)
    with pytest.raises(BadRequest, match="first axis"):
        one.read(block_of((0, "INT64", two_rows), (1, "INT64", two_rows[:1])))


def test_a_remembered_header_is_found_whatever_lies_behind_it() -> None:
    one = signature([spec("x", (-1, 4))])
    x = np.ones((1, 4), np.float32)
    first = one.read(block_of((0, "FP32", x)))
    assert one.read(block_of((0, "FP32", 2 * x), dirt=0xEE)) is first


def test_a_remembered_header_does_not_excuse_a_block_that_is_too_short() -> None:
    one = signature([spec("x", (-1, 4))])
    block = block_of((0, "FP32", np.ones((64, 4), np.float32)))
    one.read(block)
    with pytest.raises(ProtocolError):
        one.read(block[:-64])


def test_what_is_remembered_is_bounded_and_a_key_is_not_given_twice() -> None:
    one = signature([spec("x", (-1, -1))])
    blocks = [
        block_of((0, "FP32", np.ones((1, size), np.float32))) for size in range(FORMS_MAX + 9)
    ]
    assert len(set(keys(one, *blocks))) == len(blocks)
    assert one.read(blocks[0]).key >= len(blocks)


# --- gather -------------------------------------------------------------------------------------
def gathered(one: Signature, *blocks: memoryview) -> tuple[dict[str, Array], list[Form]]:
    forms = [one.read(block) for block in blocks]
    return gather(one, forms, blocks), forms


def test_a_batch_is_its_requests_one_after_the_other() -> None:
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    one = signature([spec("x", (-1, 4))])
    blocks = [block_of((0, "FP32", x[a:b])) for a, b in ((0, 1), (1, 4), (4, 6))]
    inputs, _ = gathered(one, *blocks)
    np.testing.assert_array_equal(inputs["x"], x)


@pytest.mark.parametrize("count", [1, 2])
def test_arrays_are_writable_and_share_nothing_with_a_block(count: int) -> None:
    blocks = [block_of((0, "FP32", np.ones((1, 4), np.float32))) for _ in range(count)]
    before = bytes(blocks[0])
    inputs, _ = gathered(signature([spec("x", (-1, 4))]), *(b.toreadonly() for b in blocks))
    inputs["x"][:] = 7
    assert bytes(blocks[0]) == before
    assert inputs["x"].flags.c_contiguous


def test_ragged_requests_are_padded_to_the_longest() -> None:
    inputs, _ = gathered(signature([IDS, MASK], [HIDDEN]), text_block(2), text_block(4))
    assert inputs["ids"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert inputs["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("datatype", "pad", "bits"), [("BF16", 1.0, 0x3F80), ("FP16", 1.0, 1.0), ("INT8", -1.0, -1)]
)
def test_the_pad_value_is_of_the_tensor_s_datatype(datatype: str, pad: float, bits: float) -> None:
    one = signature(
        [spec("x", (-1, -1), datatype, axes=("batch", "n"), pad=pad)], [spec("y", (-1, 1))]
    )
    zeros = [np.zeros((1, size), NUMPY_TYPES[datatype]) for size in (1, 2)]
    inputs, _ = gathered(one, *(block_of((0, datatype, zero)) for zero in zeros))
    assert inputs["x"].dtype == NUMPY_TYPES[datatype]
    assert inputs["x"].tolist() == [[0, bits], [0, 0]]


def test_a_bool_is_true_or_false_whatever_the_client_s_byte() -> None:
    block = block_of((0, "BOOL", np.array([[0, 1, 2, 255]], np.uint8)))
    inputs, _ = gathered(signature([spec("x", (-1, 4), "BOOL")]), block)
    assert inputs["x"].dtype == np.bool_
    assert inputs["x"].view(np.uint8).tolist() == [[0, 1, 1, 1]]


def test_bytes_become_objects() -> None:
    one = signature([spec("x", (-1, 2), "BYTES")])
    words = np.array([[b"a", b""], [b"ccc", b"d"]], dtype=object)
    inputs, _ = gathered(one, *(block_of((0, "BYTES", words[i : i + 1])) for i in range(2)))
    assert inputs["x"].tolist() == words.tolist()


@pytest.mark.parametrize("data", [b"\x05\0\0\0ab", b"\x01\0", struct.pack("<I", 1) + b"x"])
def test_malformed_bytes_are_the_client_s_fault(data: bytes) -> None:
    places, length = payload.plan([(0, "BYTES", len(data), (1, 2))])
    block = memoryview(bytearray(length))
    payload.encode(block, places)
    block[places[0].offset : places[0].offset + len(data)] = data
    with pytest.raises(BadRequest, match="input 'x'"):
        gathered(signature([spec("x", (-1, 2), "BYTES")]), block)


def test_a_model_that_does_not_batch_gets_its_input_as_it_is() -> None:
    scalar = block_of((0, "FP32", np.array(3, np.float32)))
    inputs, forms = gathered(signature([spec("x", ())], max_batch_size=0), scalar)
    assert inputs["x"].shape == ()
    assert forms[0].rows == 1


# --- split --------------------------------------------------------------------------------------
def test_each_request_gets_its_rows_back() -> None:
    one = signature([spec("x", (-1, 4))], [spec("y", (-1, 2)), spec("z", (-1,), "INT32")])
    blocks = [block_of((0, "FP32", np.ones((rows, 4), np.float32))) for rows in (1, 2)]
    _, forms = gathered(one, *blocks)
    y = np.arange(6, dtype=np.float32).reshape(3, 2)
    outs = egress(2)
    needs = split(one, {"y": y, "z": np.arange(3, dtype=np.int32)}, forms, outs)
    answers = [read_answer(out, need) for out, need in zip(outs, needs, strict=True)]
    np.testing.assert_array_equal(answers[0][0], y[:1])
    np.testing.assert_array_equal(answers[1][0], y[1:])
    assert answers[1][1].tolist() == [1, 2]


def test_what_was_padded_is_cut_from_the_answers() -> None:
    one = signature([IDS, MASK], [HIDDEN, spec("pooled", (-1, 1))])
    _, forms = gathered(one, text_block(2), text_block(4))
    hidden = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    outs = egress(2)
    needs = split(one, {"hidden": hidden, "pooled": hidden[:, 0, :1]}, forms, outs)
    short, long = (read_answer(out, need) for out, need in zip(outs, needs, strict=True))
    np.testing.assert_array_equal(short[0], hidden[:1, :2])
    np.testing.assert_array_equal(long[0], hidden[1:])
    assert long[1].tolist() == [[8.0]]


def test_a_block_that_is_too_short_is_not_touched_and_the_others_are_written() -> None:
    one = signature([spec("x", (-1, 4))], [spec("y", (-1, 4))])
    blocks = [block_of((0, "FP32", np.ones((1, 4), np.float32))) for _ in range(2)]
    _, forms = gathered(one, *blocks)
    outs = [memoryview(bytearray(b"\xaa" * 32)), *egress(1)]
    needs = split(one, {"y": np.ones((2, 4), np.float32)}, forms, outs)
    assert needs[0] > 32
    assert bytes(outs[0]) == b"\xaa" * 32
    assert read_answer(outs[1], needs[1])[0].tolist() == [[1, 1, 1, 1]]


def test_an_output_that_is_not_contiguous_is_written_in_order() -> None:
    one = signature([spec("x", (-1, 2))], [spec("y", (-1, 2))])
    _, forms = gathered(one, block_of((0, "FP32", np.ones((2, 2), np.float32))))
    outs = egress(1)
    needs = split(one, {"y": np.array([[1, 2], [3, 4]], np.float32).T}, forms, outs)
    assert read_answer(outs[0], needs[0])[0].tolist() == [[1, 3], [2, 4]]


def test_bytes_and_strings_are_written_with_their_lengths() -> None:
    one = signature([spec("x", (-1, 1))], [spec("y", (-1, 1), "BYTES")])
    blocks = [block_of((0, "FP32", np.ones((1, 1), np.float32))) for _ in range(2)]
    _, forms = gathered(one, *blocks)
    outs = egress(2)
    needs = split(one, {"y": np.array([[b"ab"], ["\u00fc"]], dtype=object)}, forms, outs)
    assert read_answer(outs[0], needs[0])[0].item() == b"\x02\0\0\0ab"
    assert read_answer(outs[1], needs[1])[0].item() == b"\x02\0\0\0\xc3\xbc"


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({}, "no output 'y'"),
        ({"y": np.ones((2, 4))}, "is float64"),
        ({"y": np.ones((1, 4), np.float32)}, "cannot be split"),
        ({"y": np.float32(1).reshape(())}, "cannot be split"),
    ],
)
def test_outputs_that_do_not_fit_are_the_model_s_fault(
    outputs: dict[str, Array], reason: str
) -> None:
    one = signature([spec("x", (-1, 4))], [spec("y", (-1, 4))])
    blocks = [block_of((0, "FP32", np.ones((1, 4), np.float32))) for _ in range(2)]
    _, forms = gathered(one, *blocks)
    with pytest.raises(ModelError, match=reason):
        split(one, outputs, forms, egress(2))


@pytest.mark.parametrize("rows", [0, 2])
def test_one_request_gets_as_many_rows_as_it_has(rows: int) -> None:
    answer = {"y": np.ones((rows, 4), np.float32)}
    one = signature([spec("x", (-1, 4))], [spec("y", (-1, 4))])
    _, forms = gathered(one, block_of((0, "FP32", np.ones((1, 4), np.float32))))
    with pytest.raises(ModelError, match=rf"\[{rows}, 4\] for a batch of 1 rows"):
        split(one, answer, forms, egress(1))
    # What does not batch gives what it likes.
    one = signature([spec("x", (-1, 4))], [spec("y", (-1, 4))], max_batch_size=0)
    _, forms = gathered(one, block_of((0, "FP32", np.ones((1, 4), np.float32))))
    outs = egress(1)
    assert read_answer(outs[0], split(one, answer, forms, outs)[0])[0].shape == (rows, 4)


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("shape", [(2,), (4, 1), ()])
def test_an_answer_has_the_shape_that_the_configuration_declares(
    requests: int, shape: tuple[int, ...]
) -> None:
    output = spec("y", (-1, 4), declared=(-1, 4))
    one = signature([spec("x", (-1, 4))], [output, spec("free", (-1, 4))])
    blocks = [block_of((0, "FP32", np.ones((1, 4), np.float32))) for _ in range(requests)]
    _, forms = gathered(one, *blocks)
    right, wrong = np.ones((requests, 4), np.float32), np.ones((requests, *shape), np.float32)
    # Of what trials alone have shown nobody has said that it holds for all values.
    assert len(split(one, {"y": right, "free": wrong}, forms, egress(requests))) == requests
    with pytest.raises(ModelError, match=r"output 'y' has shape .* config says \[-1, 4\]"):
        split(one, {"y": wrong, "free": right}, forms, egress(requests))


def test_an_axis_that_is_declared_to_vary_varies() -> None:
    output = spec("y", (-1, 4, 2), declared=(-1, -1, 2))
    one = signature([spec("x", (-1, 4))], [output])
    _, forms = gathered(one, block_of((0, "FP32", np.ones((1, 4), np.float32))))
    outs = egress(1)
    needs = split(one, {"y": np.ones((1, 9, 2), np.float32)}, forms, outs)
    assert read_answer(outs[0], needs[0])[0].shape == (1, 9, 2)


def test_an_output_that_was_not_padded_with_its_inputs_is_not_guessed_at() -> None:
    one = signature([IDS, MASK], [HIDDEN])
    _, forms = gathered(one, text_block(2), text_block(4))
    with pytest.raises(ModelError, match="cannot be cut back"):
        split(one, {"hidden": np.ones((2, 5, 2), np.float32)}, forms, egress(2))


# --- both ---------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=6))
def test_a_batch_gives_each_request_what_it_would_get_alone(sizes: list[tuple[int, int]]) -> None:
    inputs = [
        spec("ids", (-1, -1), "INT64", axes=("batch", "n"), pad=0),
        spec("scale", (-1, 2)),
    ]
    outputs = [spec("wide", (-1, -1, 2), axes=("batch", "n", None)), spec("sum", (-1,), "INT64")]
    one = signature(inputs, outputs)
    rng = np.random.default_rng(1)

    def run(arrays: dict[str, Array]) -> dict[str, Array]:
        ids, scale = arrays["ids"], arrays["scale"]
        wide = (ids[:, :, None] * scale[:, None, :]).astype(np.float32)
        return {"wide": wide, "sum": ids.sum(axis=1)}

    blocks = [
        block_of(
            (0, "INT64", rng.integers(1, 9, (rows, n))),
            (1, "FP32", rng.random((rows, 2)).astype(np.float32)),
        )
        for rows, n in sizes
    ]
    arrays, forms = gathered(one, *blocks)
    together = egress(len(blocks))
    needs = split(one, run(arrays), forms, together)
    for block, form, out, need in zip(blocks, forms, together, needs, strict=True):
        (alone,) = egress(1)
        assert split(one, run(gather(one, [form], [block])), [form], [alone]) == [need]
        for mine, theirs in zip(read_answer(out, need), read_answer(alone, need), strict=True):
            np.testing.assert_array_equal(mine, theirs)
