"""Models with code of their own: what reaches it, what it may hold, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_rig import Opened, packed, refused
from safetensors.torch import save_file

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.engines import torch_module
from overcommit.runtime.errors import ImageError, ModelError

HEAD = "import torch\nfrom torch import nn\n"
X = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))


def user(folder: Path, code: str, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(HEAD + code)
    save_file(tensors or {"weight": torch.arange(4.0)}, folder / "model.safetensors")
    return folder


def opened_user(folder: Path, cache: Path, **config: Any) -> Opened:
    config = {"inputs": (X,), **config}
    done = packed(folder, cache, server_allows=True, allow_code=True, **config)
    return Opened(done, allow_code=True)


def module(body: str, init: str = "") -> str:
    return (
        "class M(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.zeros(4))\n"
        f"        {init or 'pass'}\n"
        "    def forward(self, x):\n"
        f"        {body}\n"
    )


ONES = {"x": np.ones((2, 4), np.float32)}


def test_a_tensor_that_is_a_plain_attribute_is_part_of_the_image(tmp_path: Path) -> None:
    folder = user(tmp_path / "m", module("return x * self.scale", "self.scale = torch.arange(4.)"))
    opened = opened_user(folder, tmp_path / "cache")
    assert "scale" in {entry.name for entry in opened.header.tensors}
    got = opened.model.run(ONES)["output"]
    assert np.array_equal(got, np.tile(np.arange(4, dtype=np.float32), (2, 1)))


def test_a_constructor_that_needs_values_is_run_for_real(tmp_path: Path) -> None:
    init = "self.rates = torch.arange(4.).tolist()"
    folder = user(tmp_path / "m", module("return x * self.rates[1] + self.weight", init))
    opened = opened_user(folder, tmp_path / "cache")
    assert opened.header.program["skeleton"] == "real"
    assert np.array_equal(opened.model.run(ONES)["output"][0], [1, 2, 3, 4])


def test_tensors_inside_a_list_are_found_to_be_out_of_reach(tmp_path: Path) -> None:
    init = "self.tables = [torch.arange(4.)]"
    folder = user(tmp_path / "m", module("return x + self.tables[0]", init))
    # On meta nothing could put them in place; built for real they are the constructor's.
    opened = opened_user(folder, tmp_path / "cache")
    assert opened.header.program["skeleton"] == "real"
    assert np.array_equal(opened.model.run(ONES)["output"][0], [1, 2, 3, 4])


def test_variants_do_not_share_what_a_forward_pass_remembers(tmp_path: Path) -> None:
    code = module(
        "self.memory.setdefault('w', self.weight); return x * self.memory['w']", "self.memory = {}"
    )
    one = opened_user(user(tmp_path / "1", code), tmp_path / "cache")
    two = opened_user(
        user(tmp_path / "2", code, {"weight": torch.full((4,), 9.0)}), tmp_path / "cache"
    )
    assert one.program is two.program
    assert one.model.run(ONES)["output"][0, 3] == 3
    assert two.model.run(ONES)["output"][0, 3] == 9


def test_a_list_of_modules_follows_the_clone(tmp_path: Path) -> None:
    init = "self.a = nn.Linear(4, 4); self.chain = [self.a, self.a]; self.act = self.a.forward"
    body = "return self.act(self.chain[1](x)) * self.weight"
    tensors = {"weight": torch.ones(4), "a.weight": torch.eye(4) * 3, "a.bias": torch.zeros(4)}
    opened = opened_user(user(tmp_path / "m", module(body, init), tensors), tmp_path / "cache")
    assert opened.header.program["skeleton"] == "meta"
    assert (opened.model.run(ONES)["output"] == 9).all()


def test_what_a_worker_runs_is_what_was_packed(tmp_path: Path) -> None:
    folder = user(tmp_path / "m", module("return x + self.weight"))
    opened = opened_user(folder, tmp_path / "cache")
    (folder / "model.py").write_text("raise RuntimeError('changed')")
    assert opened.model.run(ONES)["output"][0, 1] == 2
    copy = Path(opened.header.program["file"])
    assert copy.is_relative_to(tmp_path / "cache")
    copy.write_text("raise RuntimeError('changed')")
    with pytest.raises(ImageError, match="has changed since"):
        torch_module.build(opened.header.program)


def test_texts_reach_a_model_as_objects_and_leave_it_as_bytes(tmp_path: Path) -> None:
    body = (
        "return {'upper': [t.decode().upper() for t in x], 'n': torch.tensor([len(t) for t in x])}"
    )
    spec = TensorSpec(name="x", datatype="BYTES", shape=(-1,))
    opened = opened_user(user(tmp_path / "m", module(body)), tmp_path / "cache", inputs=(spec,))
    assert [(s.name, s.datatype, s.shape) for s in opened.header.config.outputs] == [
        ("upper", "BYTES", (-1,)),
        ("n", "INT64", (-1,)),
    ]
    got = opened.model.run({"x": np.array([b"one", b"three"], object)})
    assert got["upper"].tolist() == ["ONE", "THREE"]
    assert got["n"].tolist() == [3, 5]


def test_what_a_model_raises_is_a_model_error_with_its_text(tmp_path: Path) -> None:
    body = "assert x.shape[0] != 5, 'five is too many'; return x + self.weight"
    opened = opened_user(user(tmp_path / "m", module(body)), tmp_path / "cache")
    with pytest.raises(ModelError, match="AssertionError: five is too many"):
        opened.model.run({"x": np.ones((5, 4), np.float32)})


def test_a_constructor_that_raises_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    for error in ("ValueError", "SystemExit"):
        folder = user(tmp_path / error, module("return x", f"raise {error}('no licence')"))
        message = refused(
            folder, tmp_path / "cache", server_allows=True, allow_code=True, inputs=(X,)
        )
        assert f"{error}: no licence" in message
