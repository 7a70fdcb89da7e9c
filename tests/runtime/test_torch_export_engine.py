"""The `torch_export` engine: stripped programs over mapped weights, constants included."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_rig import Opened, packed, refused
from torch import nn

from overcommit.runtime.engines import manifest, torch_export
from overcommit.runtime.errors import ImageError, ModelError

BATCH = torch.export.Dim("batch", min=1, max=64)


class Net(nn.Module):
    """A parameter, a buffer of each kind, and a tensor that export lifts into a constant."""

    def __init__(self, seed: int = 0, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("table", torch.arange(3.0) + shift, persistent=False)
        self.loose = torch.full((3,), shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + self.table + self.loose


def export(
    folder: Path,
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    shapes: Any = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(module.eval(), arguments, keywords, dynamic_shapes=shapes)
    torch.export.save(program, folder / "model.pt2")
    return folder


def net(folder: Path, seed: int = 0, shift: float = 0.0) -> tuple[Path, nn.Module]:
    module = Net(seed, shift).eval()
    return export(folder, module, (torch.randn(2, 4),), shapes={"x": {0: BATCH}}), module


def rows(count: int, width: int = 4) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).normal(size=(count, width)).astype(np.float32)


def answer(module: nn.Module, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        result: np.ndarray[Any, Any] = module(torch.from_numpy(array)).numpy()
    return result


def bound_tensors(opened: Opened) -> Sequence[tuple[str, torch.Tensor]]:
    module = opened.model._call._module  # type: ignore[attr-defined]
    return [(name, tensor) for name, _, _, tensor in manifest.registered(module)]


def test_any_number_of_rows_is_bit_equal(tmp_path: Path) -> None:
    folder, module = net(tmp_path / "net")
    opened = Opened(packed(folder, tmp_path / "cache"))
    for count in (1, 2, 5, 64):
        got = opened.model.run({"x": rows(count)})["output"]
        assert np.array_equal(got, answer(module, rows(count)))


def test_every_tensor_lies_in_the_mapping_and_none_is_on_meta(tmp_path: Path) -> None:
    opened = Opened(packed(net(tmp_path / "net")[0], tmp_path / "cache"))
    start = torch.frombuffer(memoryview(opened.memory), dtype=torch.uint8).data_ptr()
    tensors = bound_tensors(opened)
    assert {name for name, _ in tensors} == {
        *("linear.weight", "linear.bias", "scale", "table", "loose"),
    }
    for name, tensor in tensors:
        assert not tensor.is_meta
        assert start <= tensor.data_ptr() < start + opened.header.nbytes, name


def test_variants_with_other_weights_and_constants_share_a_program(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    sources = [net(tmp_path / str(i), seed=i, shift=10.0 * i) for i in range(3)]
    opened = [Opened(packed(folder, cache)) for folder, _ in sources]
    assert len({id(each.program) for each in opened}) == 1
    assert len(list(cache.glob("programs/*"))) == 1
    # All are bound at once, and each gives its own answer: constants are not the first one's.
    for (_, module), each in zip(sources, opened, strict=True):
        assert np.array_equal(each.model.run({"x": rows(3)})["output"], answer(module, rows(3)))


def test_other_weights_at_the_same_address_are_the_other_models_answers(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (one, _), (two, other) = (net(tmp_path / str(i), seed=i, shift=i) for i in range(2))
    opened, second = Opened(packed(one, cache)), Opened(packed(two, cache))
    opened.memory[:] = second.payload
    assert np.array_equal(opened.model.run({"x": rows(2)})["output"], answer(other, rows(2)))


def test_the_stripped_program_has_no_weights(tmp_path: Path) -> None:
    wide = export(tmp_path / "wide", nn.Linear(512, 512), (torch.randn(2, 512),))
    done = packed(wide, tmp_path / "cache")
    (program,) = (tmp_path / "cache").glob("programs/*/program.pt2")
    assert program.stat().st_size < 64 << 10 < done.nbytes
    with zipfile.ZipFile(program) as archive:
        names = [n for n in archive.namelist() if "/weights/weight_" in n]
        assert all(archive.getinfo(name).file_size == 0 for name in names)


def test_an_image_whose_program_is_gone_is_packed_again(tmp_path: Path) -> None:
    folder, module = net(tmp_path / "net")
    packed(folder, tmp_path / "cache")
    (program,) = (tmp_path / "cache").glob("programs/*/program.pt2")
    program.unlink()
    opened = Opened(packed(folder, tmp_path / "cache"))
    assert program.exists()
    assert np.array_equal(opened.model.run({"x": rows(2)})["output"], answer(module, rows(2)))


def test_a_missing_program_file_is_an_image_error(tmp_path: Path) -> None:
    header = Opened(packed(net(tmp_path / "net")[0], tmp_path / "cache")).header
    header.program["file"] = str(tmp_path / "nowhere.pt2")
    with pytest.raises((ImageError, RuntimeError)):
        torch_export.ExportProgram(header)


def test_programs_load_in_several_threads_at_once(tmp_path: Path) -> None:
    class Other(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    other = export(tmp_path / "other", Other(), (torch.randn(2, 4),), shapes={"x": {0: BATCH}})
    folders = [net(tmp_path / "net")[0], other]
    headers = [Opened(packed(folder, tmp_path / "cache")).header for folder in folders]
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def load(index: int) -> None:
        barrier.wait()
        try:
            torch_export.ExportProgram(headers[index % 2])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # torch alone: "AssertionError: _CURRENT_DESERIALIZER is already set".
    assert errors == []


# --- what programs take and give ----------------------------------------------------------------
class Pair(nn.Module):
    def forward(self, x: torch.Tensor, *, y: torch.Tensor, times: int = 2) -> dict[str, Any]:
        return {"sum": x + y * times, "parts": (x, y)[0] * 1}


def test_keyword_inputs_and_constants_go_where_they_were_exported(tmp_path: Path) -> None:
    shapes = {"x": {0: BATCH}, "y": {0: BATCH}, "times": None}
    keywords = {"y": torch.randn(2, 4), "times": 3}
    folder = export(tmp_path / "pair", Pair(), (torch.randn(2, 4),), keywords, shapes)
    opened = Opened(packed(folder, tmp_path / "cache"))
    assert [spec.name for spec in opened.header.config.inputs] == ["x", "y"]
    x, y = rows(3), rows(3) * 2
    assert np.array_equal(opened.model.run({"x": x, "y": y})["sum"], x + y * 3)
    with pytest.raises(ModelError, match="'y' is missing"):
        opened.model.run({"x": x})


class Nested(nn.Module):
    def forward(self, both: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return both["a"] + 1, both["b"] * 2


def test_nested_inputs_are_flat_to_clients_and_tuples_get_names(tmp_path: Path) -> None:
    both = {"a": torch.randn(2, 4), "b": torch.randn(2, 4)}
    shapes = {"both": {"a": {0: BATCH}, "b": {0: BATCH}}}
    folder = export(tmp_path / "nested", Nested(), (both,), shapes=shapes)
    opened = Opened(packed(folder, tmp_path / "cache"))
    names = [spec.name for spec in opened.header.config.inputs]
    got = opened.model.run({names[0]: rows(2), names[1]: rows(2)})
    assert list(got) == ["output0", "output1"]
    assert np.array_equal(got["output1"], rows(2) * 2)


def test_the_exported_range_limits_the_batch(tmp_path: Path) -> None:
    small = torch.export.Dim("small", min=1, max=4)
    folder = export(tmp_path / "net", Net(), (torch.randn(2, 4),), shapes={"x": {0: small}})
    config = packed(folder, tmp_path / "cache").config
    assert config.batching.max_batch_size == 4
    assert config.inputs[0].axes == ("batch", None)


def test_a_program_of_fixed_size_does_not_batch(tmp_path: Path) -> None:
    folder = export(tmp_path / "net", Net(), (torch.randn(2, 4),))
    config = packed(folder, tmp_path / "cache").config
    assert config.batching.max_batch_size == 0
    assert config.inputs[0].shape == (2, 4)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, ::8] * 2


def test_a_length_that_must_be_a_multiple_is_tried_with_multiples(tmp_path: Path) -> None:
    length = 8 * torch.export.Dim("eighth", min=1, max=16)
    folder = export(
        tmp_path / "halves", Halves(), (torch.randn(2, 16),), shapes={"x": {0: BATCH, 1: length}}
    )
    config = packed(folder, tmp_path / "cache").config
    assert config.inputs[0].shape == (-1, -1)
    assert config.outputs[0].shape == (-1, -1)
    assert config.outputs[0].axes == ("batch", None)


def test_a_program_with_transformers_outputs_needs_no_model_class(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 99, (2, 8))
    length = torch.export.Dim("length", min=2, max=512)
    keywords = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = {name: {0: BATCH, 1: length} for name in keywords}
    folder = export(tmp_path / "bert", model, (), keywords, shapes)
    opened = Opened(packed(folder, tmp_path / "cache"))
    assert opened.header.program["modules"] == "transformers.modeling_outputs"
    for shape in ((1, 7), (3, 20)):
        tokens = torch.randint(0, 99, shape)
        inputs = {"input_ids": tokens.numpy(), "attention_mask": np.ones(shape, np.int64)}
        with torch.inference_mode():
            want = model(tokens, torch.ones_like(tokens)).last_hidden_state.numpy()
        assert np.array_equal(opened.model.run(inputs)["last_hidden_state"], want)


def test_two_archives_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder, _ = net(tmp_path / "net")
    (folder / "second.pt2").write_bytes((folder / "model.pt2").read_bytes())
    assert "2 .pt2 files" in refused(folder, tmp_path / "cache")


def test_what_a_graph_makes_itself_it_makes_where_the_process_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight + torch.arange(4)

    exported = torch.export.export(Positions(), (torch.ones(2, 4),))
    torch_export.strip(exported)
    moved = torch_export.moved(exported, "meta")
    (node,) = (node for node in moved.graph.nodes if "arange" in node.name)
    assert str(node.kwargs["device"]) == "meta"
    assert torch_export.moved(exported, "cpu") is exported
