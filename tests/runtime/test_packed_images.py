"""Images whose weights are packed: on disk, in the pack index, and in a server that serves them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from image_rig import header_of
from mover_rig import bf16
from pack_rig import Opened
from safetensors.torch import save_file
from serving import Server

from overcommit.runtime.config import MIB, PACK_RATIO_MIN, ModelConfig, Settings, TensorSpec
from overcommit.runtime.container import read_stored
from overcommit.runtime.device_choice import with_packing
from overcommit.runtime.gpu import Gpu
from overcommit.runtime.image import (
    ImageHeader,
    is_there,
    read_header,
    read_payload,
    write_image,
)
from overcommit.runtime.pack_index import PackIndex
from overcommit.runtime.packer import pack
from overcommit.runtime.packer_messages import Pack, PackDone
from overcommit.runtime.parts import path_of

LAYERS, WIDTH = 6, 1024
MODEL = f"""
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda: torch.nn.Linear({WIDTH}, {WIDTH}, bias=False, dtype=torch.bfloat16)
        self.layers = torch.nn.ModuleList(linear() for _ in range({LAYERS}))
    def forward(self, x):
        y = x.to(torch.bfloat16)
        for layer in self.layers:
            y = layer(y)
        return {{"y": y.float()}}
"""
CONFIG = f"""allow_code = true
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, {WIDTH}]
"""


INPUT = TensorSpec(name="x", datatype="FP32", shape=(-1, WIDTH))
CONFIGURED = ModelConfig(allow_code=True, inputs=(INPUT,))


def add_bf16_model(root: Path, name: str, seed: int) -> Path:
    """A model of LAYERS x 2 MiB."""
    folder = root / name
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    weights = {
        f"layers.{k}.weight": (torch.randn(WIDTH, WIDTH) * 0.03).bfloat16() for k in range(LAYERS)
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "model.py").write_text(MODEL)
    (folder / "model.toml").write_text(CONFIG)
    return folder


def write(path: Path, tensors: dict[str, bytes], *, packs: bool = True) -> ImageHeader:
    facts = [
        (n, "parameter", True, "uint8", (len(b),), (1,), len(b), None) for n, b in tensors.items()
    ]
    header = header_of(facts)  # type: ignore[arg-type]
    given = [(entry, memoryview(tensors[entry.name])) for entry in header.tensors]
    return write_image(path, header, given, packs=packs)


def job(folder: Path, cache: Path, *, packs: bool) -> Pack:
    return Pack(
        job=1,
        name="subject",
        version="1",
        folder=str(folder),
        config=CONFIGURED,
        cache_dir=str(cache),
        allow_code=True,
        packs=packs,
    )


# --- images ---------------------------------------------------------------------------------------
def test_parts_and_what_is_private_are_packed_and_read_back_whole(tmp_path: Path) -> None:
    tensors = {"bert.w": bf16(9 * MIB), "classifier.w": bf16(200_000, seed=1)}
    raw = write(tmp_path / "raw" / "images" / "a.image", tensors, packs=False)
    path = tmp_path / "packed" / "images" / "a.image"
    header = write(path, tensors)
    assert read_header(path)[0] == header
    assert [part.digest for part in header.parts] == [part.digest for part in raw.parts]
    (part,) = header.parts
    assert 0 < part.packed_bytes < part.nbytes / PACK_RATIO_MIN
    assert 0 < header.packed_bytes < raw.stored_bytes
    assert raw.packed_bytes == 0
    assert read_payload(path)[1] == read_payload(tmp_path / "raw" / "images" / "a.image")[1]
    file = path_of(path, part.digest, is_packed=True)
    assert read_stored(file)[0].stored_bytes == part.packed_bytes
    assert not path_of(path, part.digest).exists()


def test_what_gets_hardly_smaller_stays_raw(tmp_path: Path) -> None:
    path = tmp_path / "images" / "a.image"
    header = write(path, {"bert.w": os.urandom(5 * MIB), "classifier.w": bf16(300_000)})
    (part,) = header.parts
    assert part.packed_bytes == 0
    assert header.packed_bytes > 0
    assert path_of(path, part.digest).exists()
    payload = read_payload(path)[1]
    assert payload[header.tensors[1].offset :][:300_000] == bf16(300_000)[:300_000]


def test_weights_that_look_good_in_the_sample_alone_stay_raw(tmp_path: Path) -> None:
    # Only the eight stretches that are looked at can be packed.
    data = bytearray(os.urandom(64 * MIB))
    for number in range(8):
        data[number * 8 * MIB : number * 8 * MIB + 256 * 1024] = bf16(256 * 1024)
    header = write(tmp_path / "images" / "a.image", {"bert.w": bytes(data), "head.w": b"x" * 5000})
    assert all(not part.packed_bytes for part in header.parts[1:])
    assert not list((tmp_path / "parts").glob(".packing-*"))


def test_a_packed_part_is_written_once_and_again_when_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "images" / "a.image"
    tensors = {"bert.w": bf16(3 * MIB), "classifier.w": b"a"}
    (info,) = write(path, tensors).parts
    file = path_of(path, info.digest, is_packed=True)
    inode = file.stat().st_ino
    assert write(path, tensors | {"classifier.w": b"b"}).parts == (info,)
    assert file.stat().st_ino == inode
    os.truncate(file, 1 * MIB)
    assert not is_there(path, info)
    write(path, tensors)
    assert is_there(path, info)


# --- packing --------------------------------------------------------------------------------------
def test_a_model_is_packed_in_either_form_and_the_second_is_made_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = add_bf16_model(tmp_path, "m", 0)
    done: dict[bool, PackDone] = {}
    for packs in (True, False):
        done[packs] = pack(job(folder, tmp_path / "cache", packs=packs), lambda done, total: None)
        assert done[packs].ok, done[packs].message
        # The other form needs no model to be built.
        monkeypatch.setattr("overcommit.runtime.real_modules._PREPARE", {})
    paths = {packs: each.image_path for packs, each in done.items()}
    assert paths[True] != paths[False]
    assert read_payload(paths[True])[1] == read_payload(paths[False])[1]
    stored = sum(part.packed_bytes or part.nbytes for part in done[True].parts)
    assert sum(part.nbytes for part in done[False].parts) >= 1.3 * stored
    x = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None]
    answers = [Opened(done[packs], allow_code=True).model.run({"x": x})["y"] for packs in done]
    assert answers[0].tobytes() == answers[1].tobytes()


def test_the_index_keeps_the_forms_apart(tmp_path: Path) -> None:
    folder = add_bf16_model(tmp_path, "m", 0)
    config = CONFIGURED
    for packs in (True, False):
        done = pack(job(folder, tmp_path, packs=packs), lambda done, total: None)
        PackIndex(tmp_path, packs=packs).add(str(folder), "0", config, done)
    for packs in (True, False):
        found = PackIndex(tmp_path, packs=packs).take(str(folder), "0", config)
        assert found is not None
        assert {bool(part.packed_bytes) for part in found.parts} == {packs}
        path = path_of(found.image_path, found.parts[0].digest, is_packed=packs)
        path.unlink()
        assert PackIndex(tmp_path, packs=packs).take(str(folder), "0", config) is None


# --- the choice -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "gain", "chosen"),
    [
        *(("auto", None, "off"), ("auto", 0.0, "off"), ("auto", 0.9, "off"), ("auto", 1.4, "on")),
        *(("off", 1.4, "off"), ("on", None, "on"), ("on", 0.0, "on")),
    ],
)
def test_auto_packs_where_that_was_measured_to_be_faster(
    asked: str, gain: float | None, chosen: str
) -> None:
    gpus = [None if gain is None else Gpu(device=n, unpack_gain=gain + n) for n in range(2)]
    settings = msgspec.structs.replace(Settings(), host_packing=asked)
    assert with_packing(settings, gpus).host_packing == chosen


# --- the whole server -------------------------------------------------------------------------------
def test_host_holds_more_models_and_they_answer_as_before(tmp_path: Path) -> None:
    count = 6
    for seed in range(count):
        add_bf16_model(tmp_path / "models", f"m{seed}", seed)
    x = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None].tolist()
    inputs = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": x}]}
    answers: dict[str, list[bytes]] = {}
    held: dict[str, int] = {}
    for mode in ("off", "on"):
        flags = ("--allow-code", "--host-packing", mode, "--device-memory", "14MiB")
        flags += ("--host-memory", "36MiB", "--verify", "always", "--no-prefetch")
        with Server(tmp_path / "models", cache=tmp_path / "cache", flags=flags) as server:
            answers[mode] = []
            for _ in range(2):
                for seed in range(count):
                    answer = server.post(f"/v2/models/m{seed}/infer", inputs)
                    assert answer.status == 200, answer.body
                    answers[mode].append(json.loads(answer.body)["outputs"])
            models = server.models()
            held[mode] = sum(bool(row["host_bytes"]) for row in models.values())
            status = server.status()["host"]
            assert status["packing"] == mode
            assert (status["packed_parts"] > 0) == (mode == "on")
            assert status["used"] <= status["capacity"]
            if mode == "on":
                assert status["ratio"] > 1.3
                metrics = server.get("/metrics").body.decode()
                assert "overcommit_host_packing_ratio 1.4" in metrics
    assert answers["on"] == answers["off"]
    assert (held["off"], held["on"]) == (3, 4)
