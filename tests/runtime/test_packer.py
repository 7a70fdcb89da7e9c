"""Packing: from a model's folder to an image that serves, and clear words where it cannot."""

from __future__ import annotations

import errno
import json
import mmap
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_rig import try_pack
from safetensors.torch import save_file
from torch import nn

from overcommit.runtime import engines, packer
from overcommit.runtime.config import Batching, ModelConfig, TensorSpec
from overcommit.runtime.errors import Forbidden
from overcommit.runtime.image import read_header, read_payload
from overcommit.runtime.packer import pack
from overcommit.runtime.packer_messages import Pack, PackDone

IDS = np.array([[5, 17, 3, 99], [7, 8, 9, 10]])


def job(folder: Path, cache: Path, server_allows: bool = False, **config: Any) -> Pack:
    return Pack(
        job=1,
        name="subject",
        version="1",
        folder=str(folder),
        config=ModelConfig(**config),
        cache_dir=str(cache),
        allow_code=server_allows,
    )


def packed(folder: Path, cache: Path, server_allows: bool = False, **config: Any) -> PackDone:
    done = pack(job(folder, cache, server_allows, **config), lambda done, total: None)
    assert done.ok, done.message
    return done


def refused(folder: Path, cache: Path, server_allows: bool = False, **config: Any) -> str:
    done = pack(job(folder, cache, server_allows, **config), lambda done, total: None)
    assert not done.ok
    images = cache / "images"
    assert not images.exists() or list(images.iterdir()) == []
    return done.message


def open_bound(done: PackDone, allow_code: bool = False) -> engines.BoundModel:
    header, payload = read_payload(done.image_path)
    memory = mmap.mmap(-1, header.nbytes)
    memory[:] = payload
    program = engines.load_program(header, allow_code=allow_code)
    return program.bind(header, memoryview(memory).toreadonly())


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)
        self.register_buffer("shift", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.shift


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    module = Scale().eval()
    folder = tmp_path / "exported"
    folder.mkdir()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (torch.randn(2, 16),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, str(folder / "model.pt2"))
    return folder, module


def test_a_hugging_face_folder_is_bit_equal_to_transformers(
    tmp_path: Path, make_bert: Any, bert_reference: Any
) -> None:
    folder = tmp_path / "bert"
    make_bert(folder, 1)
    done = packed(folder, tmp_path / "cache")
    assert done.engine == "torch"
    names = [spec.name for spec in done.config.inputs]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    output = done.config.outputs[0]
    assert (output.name, output.shape) == ("last_hidden_state", (-1, -1, 32))
    assert output.axes == ("batch", "sequence", None)
    assert done.config.batching.max_batch_size > 0
    got = open_bound(done).run({"input_ids": IDS, "attention_mask": np.ones_like(IDS)})
    assert np.array_equal(got["last_hidden_state"], bert_reference(folder, IDS.tolist()))


def test_extra_checkpoint_keys_are_tolerated_and_missing_ones_are_named(
    tmp_path: Path, make_bert: Any
) -> None:
    from safetensors.torch import load_file

    folder, cache = tmp_path / "bert", tmp_path / "cache"
    make_bert(folder, 1)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "embeddings.position_ids": torch.arange(64)[None]},
        folder / "model.safetensors",
    )
    packed(folder, cache)
    del tensors["embeddings.word_embeddings.weight"]
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder, tmp_path / "other")
    assert "embeddings.word_embeddings.weight" in message


def test_variants_share_a_program_and_an_equal_source_shares_the_image(
    tmp_path: Path, make_bert: Any
) -> None:
    cache = tmp_path / "cache"
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        make_bert(tmp_path / name, seed)
    one, two, same = (packed(tmp_path / name, cache) for name in "abc")
    assert one.program_key == two.program_key
    assert one.image_path != two.image_path
    assert one.image_path == same.image_path
    assert len(list((cache / "images").iterdir())) == 2


def test_a_damaged_image_is_packed_again(tmp_path: Path, make_bert: Any) -> None:
    make_bert(tmp_path / "bert", 1)
    done = packed(tmp_path / "bert", tmp_path / "cache")
    whole = Path(done.image_path).read_bytes()
    Path(done.image_path).write_bytes(whole[:100])
    packed(tmp_path / "bert", tmp_path / "cache")
    assert Path(done.image_path).read_bytes() == whole


def test_an_exported_program_is_stripped_and_bound(
    tmp_path: Path, exported: tuple[Path, nn.Module]
) -> None:
    folder, module = exported
    done = packed(folder, tmp_path / "cache")
    assert done.engine == "torch_export"
    assert done.config.inputs[0].shape == (-1, 16)
    assert done.config.outputs[0].shape == (-1, 4)
    program = tmp_path / "cache" / "programs" / done.program_key / "program.pt2"
    with zipfile.ZipFile(program) as archive:
        weights = [i for i in archive.infolist() if "weights/weight" in i.filename]
        assert sum(i.file_size for i in weights) == 0
    header, _ = read_header(done.image_path)
    assert {e.name for e in header.tensors} >= {"linear.weight", "linear.bias", "shift"}
    bound = open_bound(done)
    for rows in (1, 5, 64):
        x = np.random.default_rng(rows).normal(size=(rows, 16)).astype(np.float32)
        with torch.inference_mode():
            want = module(torch.from_numpy(x)).numpy()
        (got,) = bound.run({"x": x}).values()
        assert np.array_equal(got, want)


def test_an_archive_that_needs_pickle_is_refused_before_it_is_read(
    tmp_path: Path, exported: tuple[Path, nn.Module]
) -> None:
    folder, _ = exported
    path = folder / "model.pt2"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    config = next(name for name in content if name.endswith("weights_config.json"))
    changed = json.loads(content[config])
    for entry in changed.get("config", changed).values():
        entry["use_pickle"] = True
    content[config] = json.dumps(changed).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert "unpickling" in refused(folder, tmp_path / "cache")


CODE = """
import torch
class Twice(torch.nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.factor = factor
    def forward(self, x):
        return {"y": x * self.factor + self.weight}
"""


def user_folder(root: Path) -> Path:
    folder = root / "user"
    folder.mkdir()
    (folder / "model.py").write_text(CODE)
    save_file({"weight": torch.arange(4.0)}, folder / "model.safetensors")
    return folder


X = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))


def test_a_models_own_code_runs_only_where_both_allow_it(tmp_path: Path) -> None:
    folder, cache = user_folder(tmp_path), tmp_path / "cache"
    for server, model in ((False, False), (True, False), (False, True)):
        message = refused(folder, cache, server, allow_code=model, inputs=(X,))
        assert "allow_code = true" in message
        assert "--allow-code" in message
    done = pack(job(folder, cache, True, allow_code=True, inputs=(X,)), lambda a, b: None)
    assert done.ok, done.message
    x = np.ones((3, 4), np.float32)
    got = open_bound(done, allow_code=True).run({"x": x})["y"]
    assert np.array_equal(got, x * 2 + np.arange(4, dtype=np.float32))
    with pytest.raises(Forbidden):
        open_bound(done, allow_code=False)


def test_parameters_reach_the_constructor(tmp_path: Path) -> None:
    done = pack(
        job(
            user_folder(tmp_path),
            tmp_path / "cache",
            True,
            allow_code=True,
            inputs=(X,),
            parameters={"factor": 5.0},
        ),
        lambda a, b: None,
    )
    assert done.ok, done.message
    got = open_bound(done, allow_code=True).run({"x": np.ones((1, 4), np.float32)})["y"]
    assert got[0, 0] == 5.0


def test_a_module_whose_rows_do_not_batch_is_served_one_by_one(tmp_path: Path) -> None:
    fixed = TensorSpec(name="x", datatype="FP32", shape=(4,))
    done = pack(
        job(
            user_folder(tmp_path),
            tmp_path / "cache",
            True,
            allow_code=True,
            inputs=(fixed,),
            batching=Batching(max_batch_size=8),
        ),
        lambda a, b: None,
    )
    assert done.ok, done.message
    assert done.config.batching.max_batch_size == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds nothing"),
        ({"weights.bin": b"x"}, "supported are"),
        ({"config.json": b"{", "model.safetensors": b""}, "cannot be read|no JSON"),
        ({"model.pt2": b"not a zip"}, "no .pt2 archive"),
        ({"model.pt": b"PK\x03\x04cut short"}, "model.pt is damaged: its end is missing"),
        ({"model.pt": b"\x80\x02old"}, "neither TorchScript nor"),
        (
            {
                "config.json": b'{"model_type": "os", "architectures": ["system"]}',
                "model.safetensors": None,
            },
            "transformers",
        ),
        (
            {
                "config.json": b'{"model_type": "../bert", "architectures": ["X"]}',
                "model.safetensors": None,
            },
            "model_type",
        ),
    ],
)
def test_a_folder_that_cannot_be_served_says_why(
    tmp_path: Path, files: dict[str, bytes | None], words: str
) -> None:
    import re

    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in files.items():
        if data is None:
            save_file({"x": torch.ones(1)}, folder / name)
        else:
            (folder / name).write_bytes(data)
    assert re.search(words, refused(folder, tmp_path / "cache"))


def test_progress_ends_at_the_images_size(tmp_path: Path, make_bert: Any) -> None:
    make_bert(tmp_path / "bert", 1)
    seen: list[tuple[int, int]] = []
    done = pack(job(tmp_path / "bert", tmp_path / "cache"), lambda a, b: seen.append((a, b)))
    assert done.ok
    assert seen == sorted(seen)
    assert seen[-1][1] == done.nbytes


def test_a_model_that_writes_to_its_weights_is_refused(tmp_path: Path) -> None:
    folder = user_folder(tmp_path)
    (folder / "model.py").write_text(
        CODE.replace("return {", "self.weight.data.add_(0); self.weight.add_(1); return {")
    )
    message = refused(folder, tmp_path / "cache", True, allow_code=True, inputs=(X,))
    assert "writes to its tensor 'weight'" in message


def test_an_exported_program_that_counts_is_refused(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)  # type: ignore[operator]
            return x + self.count

    folder = tmp_path / "counts"
    folder.mkdir()
    program = torch.export.export(Counts().eval(), (torch.randn(2, 4),))
    torch.export.save(program, folder / "model.pt2")
    assert "writes to its tensor 'count'" in refused(folder, tmp_path / "cache")


def test_whatever_a_library_raises_is_an_answer(tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    folder.mkdir()
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 31}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    message = refused(folder, tmp_path / "cache")
    assert "subject" in message
    assert "multiple of the number of attention heads" in message


def test_a_changed_configuration_or_file_makes_another_image(
    tmp_path: Path, make_bert: Any
) -> None:
    folder, cache = tmp_path / "bert", tmp_path / "cache"
    make_bert(folder, 1)
    one = packed(folder, cache)
    two = packed(folder, cache, batching=Batching(max_batch_size=4))
    assert one.content_key != two.content_key
    assert one.program_key == two.program_key
    assert two.config.batching.max_batch_size == 4


def test_an_entry_that_names_no_file_is_refused(tmp_path: Path) -> None:
    folder = user_folder(tmp_path)
    for entry in ("other.py:Twice", "../model.py:Twice", "model.py:Thrice"):
        message = refused(
            folder, tmp_path / "cache", True, allow_code=True, inputs=(X,), entry=entry
        )
        assert "entry" in message


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("write failed: No space left on device"),
    ],
)
def test_a_full_disk_is_said_with_its_folder_and_may_pass(
    tmp_path: Path, make_bert: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    make_bert(tmp_path / "m", 0)

    def write(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(packer, "write_image", write)
    monkeypatch.setattr(packer.tempfile, "gettempdir", lambda: str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    done = try_pack(tmp_path / "m", tmp_path / "cache")
    assert done.may_pass
    assert done.is_full
    assert f"no room left on the disk of {tmp_path / 'cache'}" in done.message
    assert "make room there" in done.message
    assert "--cache-dir" in done.message


def test_a_pickled_module_is_told_from_torchscript(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save(nn.Linear(2, 2), folder / "model.pt")
    message = refused(folder, tmp_path / "cache")
    assert "holds pickled objects (torch.save)" in message
    assert "torch.export.save" in message


def test_code_that_exits_is_an_answer(tmp_path: Path) -> None:
    folder = user_folder(tmp_path)
    (folder / "model.py").write_text("raise SystemExit(4)")
    message = refused(folder, tmp_path / "cache", True, allow_code=True, inputs=(X,))
    assert "model.py cannot be run: SystemExit: 4" in message


def test_an_entry_that_a_library_does_not_find_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "typo"
    folder.mkdir()
    (folder / "mymodel.joblib").write_bytes(b"x")
    message = refused(folder, tmp_path / "cache", engine="sklearn", entry="typo.joblib")
    assert "holds no typo.joblib" in message
    assert "it holds mymodel.joblib" in message
