"""Embeddings of text: what a folder says, and the vectors that come back."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Answer, Server

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import BadRequest, ModelError
from overcommit.runtime.front_end_messages import Route
from overcommit.server.asking import Tensor
from overcommit.server.embeddings import decode, inputs_of
from overcommit.server.limits import EMBEDDINGS_INPUTS_MAX
from overcommit.server.text_model import TextModel
from overcommit.server.text_recipe import Recipe, recipe_of

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "one", "two", "three", "four")
CLS, SEP, ONE, TWO = 1, 2, 4, 5


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.enable_padding(length=64)  # as some models ship theirs: it must not matter
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))


def spec(name: str, datatype: str = "INT64", rank: int = 2, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=(-1,) * rank, optional=optional)


def route(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = ()) -> Route:
    return Route(
        slot=1,
        name="m",
        version="1",
        state="ready",
        inputs=inputs or (spec("input_ids"), spec("attention_mask", "INT32")),
        outputs=outputs or (spec("last_hidden_state", "FP32", 3),),
        max_batch_size=8,
    )


# --- the folder -----------------------------------------------------------------------------------
def pooling(folder: Path, **modes: Any) -> None:
    steps = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


def test_a_bare_folder_is_averaged_and_scaled(tmp_path: Path) -> None:
    recipe = recipe_of(route(), tmp_path)
    assert (recipe.output, recipe.is_pooled) == ("last_hidden_state", False)
    assert (recipe.pooling, recipe.normalises) == ("mean", True)


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_the_files_of_sentence_transformers_are_followed(
    tmp_path: Path, modes: dict[str, Any], expected: str
) -> None:
    pooling(tmp_path, **modes)
    recipe = recipe_of(route(), tmp_path)
    assert (recipe.pooling, recipe.normalises) == (expected, False)


@pytest.mark.parametrize(
    ("modes", "step", "says"),
    [
        (
            {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
            "Pooling",
            "not supported",
        ),
        ({"pooling_mode_weightedmean_tokens": True}, "Pooling", "weightedmean"),
        ({"pooling_mode": "weighted"}, "Pooling", "not supported"),
        ({"pooling_mode_cls_token": True}, "Dense", "Dense"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    tmp_path: Path, modes: dict[str, Any], step: str, says: str
) -> None:
    pooling(tmp_path, **modes)
    text = (tmp_path / "modules.json").read_text().replace("models.Pooling", f"models.{step}")
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(BadRequest, match=says):
        recipe_of(route(), tmp_path)


def test_a_folder_cannot_lead_outside(tmp_path: Path) -> None:
    pooling(tmp_path)
    text = (tmp_path / "modules.json").read_text().replace("1_Pooling", "../../etc")
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(BadRequest, match="outside"):
        recipe_of(route(), tmp_path)


def test_the_least_of_all_limits_counts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    config = {"max_position_embeddings": 514, "model_type": "xlm-roberta", "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recipe_of(route(), tmp_path).tokens_max == 512
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    assert recipe_of(route(), tmp_path).tokens_max == 128


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((spec("x", "FP32"),), ()),
        ((spec("input_ids"), spec("pixel_values", "FP32", 4)), ()),
        ((spec("input_ids", "FP32"),), ()),
        ((spec("input_ids"),), (spec("logits", "FP32"),)),
        ((spec("input_ids"),), (spec("a", "FP32", 3), spec("b", "FP32", 3))),
    ],
)
def test_what_embeds_no_text_says_so(
    tmp_path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    with pytest.raises(BadRequest, match="model 'm'"):
        recipe_of(route(*inputs, outputs=outputs), tmp_path)


def test_a_pooled_output_is_taken_as_it_is(tmp_path: Path) -> None:
    outputs = (spec("last_hidden_state", "FP32", 3), spec("sentence_embedding", "FP16"))
    recipe = recipe_of(route(spec("input_ids"), outputs=outputs), tmp_path)
    assert (recipe.output, recipe.is_pooled) == ("sentence_embedding", True)


# --- tokens and vectors ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("text")
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 5}')
    return TextModel.load(route(), folder)


def test_texts_are_neither_padded_nor_cut_by_the_tokenizer(model: TextModel) -> None:
    found = model.tokens(["one two three", "one nonsense"], False)
    assert [each.tolist() for each in found] == [[CLS, 4, 5, 6, SEP], [CLS, 4, 3, SEP]]


def test_a_long_text_is_refused_or_cut_before_its_end(model: TextModel) -> None:
    with pytest.raises(BadRequest, match="input 1 has 6 tokens, the limit is 5"):
        model.tokens(["one", "one two three four"], False)
    (found,) = model.tokens(["one two three four"], True)
    assert found.tolist() == [CLS, 4, 5, 6, SEP]
    (found,) = model.tokens([[4, 5, 6, 7, 4, 5]], True)
    assert found.tolist() == [4, 5, 6, 7, 4]


@pytest.mark.parametrize("ids", [[], [-1], [len(WORDS)]])
def test_ids_that_are_none_are_refused(model: TextModel, ids: list[int]) -> None:
    with pytest.raises(BadRequest, match="input 1"):
        model.tokens([[ONE], ids], False)


def test_inputs_have_the_types_that_the_model_takes(model: TextModel) -> None:
    ids, mask = model.tensors(np.array([CLS, ONE, SEP]))
    assert (ids.name, ids.datatype, ids.shape) == ("input_ids", "INT64", (1, 3))
    assert np.frombuffer(ids.data, np.int64).tolist() == [CLS, ONE, SEP]
    assert (mask.name, mask.datatype) == ("attention_mask", "INT32")
    assert np.frombuffer(mask.data, np.int32).tolist() == [1, 1, 1]


HIDDEN = np.array([[[1.0, -2.0], [3.0, 0.0], [-1.0, 8.0]]], np.float32)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("cls", [1, -2]), ("mean", [1, 2]), ("max", [3, 8]), ("last", [-1, 8])],
)
def test_hidden_states_are_pooled(model: TextModel, pooling: str, expected: list[float]) -> None:
    model = TextModel(model.route, None, Recipe("h", False, pooling, normalises=False))
    answer = [Tensor("h", "FP32", HIDDEN.shape, HIDDEN.tobytes())]
    assert model.vector(answer, None).tolist() == expected
    (first,) = model.vector(answer, 1).tolist()  # what is left of a cut vector has length 1
    assert first == np.sign(expected[0])
    with pytest.raises(BadRequest, match="dimensions is 3"):
        model.vector(answer, 3)


def test_half_precision_is_read(model: TextModel) -> None:
    model = TextModel(model.route, None, Recipe("e", True, normalises=True))
    half = np.array([[3.0, 4.0]], np.float16)
    bits = (np.array([[3.0, 4.0]], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for datatype, data in (("FP16", half), ("BF16", bits)):
        vector = model.vector([Tensor("e", datatype, (1, 2), data.tobytes())], None)
        np.testing.assert_allclose(vector, [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2), (1, 0, 2), (1, 1, 1, 2)])
def test_an_answer_of_another_shape_is_the_models_fault(
    model: TextModel, shape: tuple[int, ...]
) -> None:
    data = np.zeros(shape, np.float32)
    with pytest.raises(ModelError, match="last_hidden_state"):
        model.vector([Tensor("last_hidden_state", "FP32", shape, data.tobytes())], None)


# --- requests -------------------------------------------------------------------------------------
def asked(value: Any) -> Any:
    return inputs_of(decode(json.dumps({"model": "m", "input": value}).encode()))


def test_every_form_of_input_is_understood() -> None:
    assert asked("one") == ["one"]
    assert asked(["one", "two"]) == ["one", "two"]
    assert asked([1, 2]) == [[1, 2]]
    assert asked([[1, 2], [3]]) == [[1, 2], [3]]


@pytest.mark.parametrize(
    "value", [[], ["one", 1], [1, [2]], [["one"]], None, 1, ["x"] * (EMBEDDINGS_INPUTS_MAX + 1)]
)
def test_other_forms_are_refused(value: Any) -> None:
    with pytest.raises(BadRequest):
        asked(value)


# --- the server -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import torch
    from transformers import BertConfig, BertModel

    root = tmp_path_factory.mktemp("embeddings")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(root / "models" / "text")
    BertModel(config, add_pooling_layer=False).save_pretrained(root / "models" / "mute")
    write_tokenizer(root / "models" / "text")
    with Server(root / "models", cache=root / "cache") as running:
        yield running


def embed(server: Server, value: Any, model: str = "text", **more: Any) -> Answer:
    return server.post("/v1/embeddings", {"model": model, "input": value, **more})


@pytest.fixture(scope="module")
def reference(server: Server) -> Callable[[list[int]], np.ndarray[Any, Any]]:
    """The vector of a list of ids, from the model's own hidden states."""

    def vector(ids: list[int]) -> np.ndarray[Any, Any]:
        inputs = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
        (output,) = server.infer("text", inputs).json()["outputs"]
        hidden = np.array(output["data"]).reshape(output["shape"])[0]
        mean: np.ndarray[Any, Any] = hidden.mean(axis=0)
        return mean / np.linalg.norm(mean)

    return vector


def test_a_client_gets_the_vectors_of_its_texts_in_order(
    server: Server, reference: Callable[[list[int]], np.ndarray[Any, Any]]
) -> None:
    texts = ["one", "one two three four one two three", "two"]
    tokens = [[CLS, 4, SEP], [CLS, 4, 5, 6, 7, 4, 5, 6, SEP], [CLS, 5, SEP]]
    answer = embed(server, texts)
    assert answer.status == 200, answer.body
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", "text")
    assert body["usage"] == {"prompt_tokens": 15, "total_tokens": 15}
    for number, (row, ids) in enumerate(zip(body["data"], tokens, strict=True)):
        assert (row["index"], row["object"]) == (number, "embedding")
        np.testing.assert_allclose(row["embedding"], reference(ids), atol=1e-5)
    coded = embed(server, tokens, encoding_format="base64", dimensions=4).json()["data"]
    for row, ids in zip(coded, tokens, strict=True):
        vector = np.frombuffer(base64.b64decode(row["embedding"]), np.float32)
        cut = reference(ids)[:4]
        np.testing.assert_allclose(vector, cut / np.linalg.norm(cut), atol=1e-5)


def test_more_texts_than_may_be_on_their_way_at_a_time(server: Server) -> None:
    body = embed(server, ["one", "two"] * 300).json()
    vectors = np.array([row["embedding"] for row in body["data"]])
    np.testing.assert_allclose(vectors[::2], np.tile(vectors[0], (300, 1)), atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("value", "model", "status", "says"),
    [
        ("one", "nobody", 404, "'nobody'"),
        ("one", "mute", 400, "tokenizer.json"),
        ("one " * 100, "text", 400, "the limit is 16"),
        ([], "text", 400, "input"),
    ],
)
def test_refusals_are_as_clients_of_this_api_read_them(
    server: Server, value: Any, model: str, status: int, says: str
) -> None:
    answer = embed(server, value, model)
    assert answer.status == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


def test_models_are_listed_and_retrieved(server: Server) -> None:
    body = server.get("/v1/models").json()
    assert [row["id"] for row in body["data"]] == ["mute", "text"]
    for row in body["data"]:
        assert server.get(f"/v1/models/{row['id']}").json() == row
    gone = server.get("/v1/models/nobody")
    assert (gone.status, gone.json()["error"]["code"]) == (404, "not_found")
