"""The aoti engine: compiled without weights, checked before it gets any, over the mapping.

One program is compiled for all tests: that takes seconds.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from pack_rig import Opened, packed, refused
from safetensors.torch import save_file

from overcommit.runtime import engines
from overcommit.runtime.engines import aoti, aoti_package
from overcommit.runtime.errors import ImageError, ModelError, RepositoryError
from overcommit.runtime.packer_messages import PackDone

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="compiling needs a C++ compiler"
)
ROWS = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)


class Net(torch.nn.Module):
    """Tensors of every kind; vectors so short that a compiler likes to write them into the code."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("shift", torch.randn(3))
        self.factor = torch.randn(3)
        self.scalar = torch.nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.linear(x)) + self.shift * self.factor
        return {"y": hidden * self.scalar, "sums": x.sum(1)}


def export(folder: Path, module: torch.nn.Module) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = torch.export.Dim("rows", min=1, max=16)
    exported = torch.export.export(
        module.eval(), (torch.randn(2, 4),), dynamic_shapes={"x": {0: rows}}
    )
    torch.export.save(exported, folder / "model.pt2")
    return folder / "model.pt2"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aoti")


@pytest.fixture(scope="module")
def first(work: Path) -> PackDone:
    export(work / "first", Net(1))
    return packed(work / "first", work / "cache", engine="aoti")


def wanted(seed: int) -> Any:
    with torch.inference_mode():
        return {name: value.numpy() for name, value in Net(seed)(torch.tensor(ROWS)).items()}


def check(model: Any, seed: int) -> None:
    answers = model.run({"x": ROWS})
    for name, value in wanted(seed).items():
        np.testing.assert_allclose(answers[name], value, rtol=1e-5, atol=1e-6)


def test_a_compiled_program_reads_every_weight_from_the_mapping(first: PackDone) -> None:
    assert first.engine == "aoti"
    assert [spec.axes for spec in first.config.inputs] == [("batch", None)]
    assert first.config.batching.max_batch_size == 16
    opened = Opened(first)
    assert {entry.name for entry in opened.header.tensors} == {
        *("linear.weight", "linear.bias", "shift", "factor", "scalar")
    }
    check(opened.model, 1)
    opened.memory[:] = bytes(opened.header.nbytes)
    answers = opened.model.run({"x": ROWS})
    assert not answers["y"].any()
    np.testing.assert_allclose(answers["sums"], ROWS.sum(1), rtol=1e-5)


def test_versions_share_the_compiled_program_and_not_their_weights(
    first: PackDone, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> bytes:
        raise AssertionError("it was compiled before")

    monkeypatch.setattr(aoti_package, "compile_program", never)
    export(work / "second", Net(2))
    second = packed(work / "second", work / "cache", engine="aoti")
    assert second.program_key == first.program_key
    one, two = Opened(first), Opened(second)
    assert one.program is two.program
    for _ in range(3):
        check(one.model, 1)
        check(two.model, 2)
    del one
    gc.collect()
    check(two.model, 2)


def test_sizes_that_it_was_not_compiled_for_never_reach_it(first: PackDone) -> None:
    model = Opened(first).model
    for shape in ((17, 4), (0, 4), (2, 5), (4,), (2, 4, 1)):
        with pytest.raises(ModelError, match="it was compiled for"):
            model.run({"x": np.zeros(shape, np.float32)})
    with pytest.raises(ModelError, match="'x' is missing"):
        model.run({})


def test_tensors_that_do_not_fit_are_refused_before_it_gets_one(first: PackDone) -> None:
    opened = Opened(first)
    path = Path(opened.header.program["file"])
    described = aoti_package.read_manifest((path.parent / "program.json").read_bytes())
    right = {
        name: torch.empty_strided(each.shape, each.stride, dtype=getattr(torch, each.dtype))
        for name, each in described.constants.items()
    }
    bad: tuple[tuple[torch.Tensor | None, str], ...] = (
        (None, "are not there"),
        (torch.zeros(4, 3), r"\[4, 3\]"),
        (torch.zeros(3, 4, dtype=torch.float64), "float64"),
        (torch.zeros(4, 3).t(), "strides"),
    )
    for tensor, problem in bad:
        given = {name: value for name, value in right.items() if name != "linear.weight"}
        if tensor is not None:
            given["linear.weight"] = tensor
        with pytest.raises(ImageError, match=problem):
            aoti.Call(aoti_package.open_library(path), described, given)
    entries = tuple(e for e in opened.header.tensors if e.name != "shift")
    header = msgspec.structs.replace(opened.header, tensors=entries)
    with pytest.raises(ImageError, match="shift"):
        opened.program.bind(header, memoryview(opened.memory))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"torch": "1.0"}, "torch 1.0"),
        ({"cpu_flags": ("avx9",)}, "avx9"),
        ({"format": 0}, "format"),
    ],
)
def test_a_program_for_another_torch_or_cpu_is_refused(
    first: PackDone, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    opened = Opened(first)
    folder = Path(opened.header.program["file"]).parent
    shutil.copytree(folder, tmp_path / "program")
    described = aoti_package.read_manifest((folder / "program.json").read_bytes())
    changed = msgspec.structs.replace(described, **change)
    (tmp_path / "program" / "program.json").write_bytes(msgspec.json.encode(changed))
    program = {**opened.header.program, "file": str(tmp_path / "program" / "program.so")}
    header = msgspec.structs.replace(opened.header, program=program, program_key=problem)
    with pytest.raises(ImageError, match=problem):
        engines.load_program(header, allow_code=False)


# --- packages -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def package(first: PackDone, work: Path) -> Path:
    """A folder with a package, made of the program that is compiled already, and weights."""
    program = Path(Opened(first).header.program["file"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aoti_package, "compile_program", lambda *_: program.read_bytes())
        (work / "package").mkdir()
        aoti_package.write_package(work / "first" / "model.pt2", work / "package" / "net.aoti")
    module = Net(4)
    weights = {**module.state_dict(), "factor": module.factor, "another": torch.zeros(2)}
    save_file(weights, work / "package" / "model.safetensors")
    return work / "package"


def test_a_package_is_served_with_weights_beside_it_where_code_may_run(
    package: Path, work: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aoti_package, "open_library", lambda *_: pytest.fail("native code has run"))
        message = refused(package, work / "no")
        assert "allow_code" in message
        assert "allow_code" in refused(package, work / "no", server_allows=True)
    done = packed(package, work / "cache", server_allows=True, allow_code=True)
    assert done.engine == "aoti"
    check(Opened(done, allow_code=True).model, 4)


def test_a_package_with_weights_that_do_not_fit_is_refused(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "net")
    module = Net(4)
    weights = {**module.state_dict(), "factor": torch.zeros(9)}
    save_file(weights, tmp_path / "net" / "model.safetensors")
    allowed = {"server_allows": True, "allow_code": True}
    assert "'factor' is float32 [9]" in refused(tmp_path / "net", tmp_path / "no", **allowed)
    (tmp_path / "net" / "net.aoti").write_bytes(b"PK no package")
    assert "is no package" in refused(tmp_path / "net", tmp_path / "no", **allowed)


# --- what is refused --------------------------------------------------------------------------------
class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return x + self.seen


def test_a_program_that_writes_to_its_weights_is_refused(tmp_path: Path) -> None:
    export(tmp_path / "counting", Counting())
    message = refused(tmp_path / "counting", tmp_path / "cache", engine="aoti")
    assert "writes to ['seen']" in message


def test_without_a_compiler_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder

    def missing(*_: object) -> str:
        raise cpp_builder.exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    exported = torch.export.load(export(tmp_path / "net", Net(1)))
    with pytest.raises(RepositoryError, match="install g"):
        aoti_package.compile_program(exported, aoti_package.manifest_of(exported)[0])
