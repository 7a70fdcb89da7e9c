"""`overcommit check`: what will be served, what is ignored, what is not supported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from sequence_rig import add_adder
from tests.runtime.test_repository import make_model, settle
from tests.runtime.test_triton_config import CONFIG
from typer.testing import CliRunner

from overcommit.runtime.errors import ConfigurationError
from overcommit.server import cli
from overcommit.server.check import Checker, Report


def check(*roots: Path, allow_code: bool = False) -> Report:
    return Checker(None, allow_code).check([str(root) for root in roots])


def hugging_face(root: Path, path: str) -> Path:
    folder = make_model(root, path)
    (folder / "config.json").write_text("{}")
    settle(folder)
    return folder


def test_a_model_that_will_be_served_is_shown_with_what_is_known(tmp_path: Path) -> None:
    for version in ("1", "2"):
        folder = hugging_face(tmp_path, f"good/{version}")
    (folder.parent / "config.pbtxt").write_text(
        CONFIG.replace("onnxruntime_onnx", "pytorch_libtorch")
    )
    (model,) = check(tmp_path).models
    assert (model.name, model.left_out) == ("good", ("1",))
    (version,) = model.versions
    assert (version.version, version.engine, version.problem) == ("2", "torch", "")
    assert version.inputs[0].shape == (-1, 3, 224, 224)
    assert version.nbytes == sum(path.stat().st_size for path in folder.iterdir())
    assert any("optimization" in note for note in model.ignored)


def test_a_model_with_state_is_shown_with_its_sequences(tmp_path: Path) -> None:
    add_adder(tmp_path, "adder")
    (model,) = check(tmp_path).models
    (version,) = model.versions
    assert version.sequences == "direct: 4 sequences"
    assert model.ignored == ()
    (tmp_path / "adder" / "model.toml").write_text('[rollout]\nweights = { "1" = 10, "7" = 5 }\n')
    (model,) = check(tmp_path).models
    (note,) = model.ignored
    assert note.startswith("the rollout's weights of version 1 mean nothing")
    assert [spec.name for spec in (*version.inputs, *version.outputs)] == ["x", "y"]
    assert not version.problem


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.pbtxt", 'backend: "tensorrt"', "'tensorrt' is not served"),
        ("model.toml", 'engine = "magic"', "unknown engine 'magic'"),
        ("model.py", "", "--allow-code"),
        ("model.toml", "pin = 3", "pin"),
    ],
)
def test_what_will_not_be_served_says_why(
    tmp_path: Path, file: str, content: str, problem: str
) -> None:
    folder = make_model(tmp_path, "bad")
    (folder / file).write_text(content)
    report = check(tmp_path)
    assert report.counts() == (0, 1)
    assert problem in report.models[0].problems[0][1]


@pytest.mark.parametrize(
    ("settings", "file"),
    [("", "model.py"), ('engine = "python"', "model.py"), ('engine = "sklearn"', "m.joblib")],
)
def test_code_is_served_where_both_allow_it(tmp_path: Path, settings: str, file: str) -> None:
    folder = make_model(tmp_path, "own", f"allow_code = true\n{settings}")
    (folder / file).write_text("")
    assert check(tmp_path).counts() == (0, 1)
    assert check(tmp_path, allow_code=True).counts() == (1, 0)
    (folder / "model.toml").write_text(settings)
    assert check(tmp_path, allow_code=True).counts() == (0, 1)


def test_aliases_that_clash_and_settings_of_a_server_are_remarked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        hugging_face(tmp_path, name)
        (tmp_path / name / "model.toml").write_text('[aliases]\nbest = "latest"\nb = "1"')
    (tmp_path / "settings.json").write_text("{}")
    remarks = "\n".join(check(tmp_path).remarks)
    assert "settings.json" in remarks
    assert "b: its alias 'best' already means model 'a'" in remarks
    assert "a: its alias 'b' already means model 'b'" in remarks


ENSEMBLE = """
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
ensemble_scheduling { step {
  model_name: "%s" input_map { key: "a" value: "x" } output_map { key: "b" value: "y" } } }
"""
STEP = """
input { name: "%s" data_type: %s dims: [ 1 ] }
output { name: "b" data_type: TYPE_FP32 dims: [ 1 ] }
"""


def add_triton(root: Path, name: str, config: str) -> Path:
    folder = root / name
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    if "ensemble_scheduling" not in config:
        (folder / "1" / "model.onnx").write_bytes(b"x")
    return folder


def problems(root: Path) -> dict[str, str]:
    return {m.name: each.problem for m in check(root).models for each in m.versions}


def test_an_ensemble_whose_step_is_missing_will_not_be_served(tmp_path: Path) -> None:
    add_triton(tmp_path, "both", ENSEMBLE % "gone")
    report = check(tmp_path)
    assert report.models[0].versions[0].engine == "ensemble"
    assert report.counts() == (0, 1)
    ((_, problem),) = report.models[0].problems
    assert problem.startswith(
        "ensemble 'both', step 1 (model 'gone'): there is no model of this name"
    )
    add_triton(tmp_path, "real", STEP % ("a", "TYPE_FP32"))
    (tmp_path / "real" / "model.toml").write_text('[aliases]\ngone = "latest"\n')
    assert not any(problems(tmp_path).values())


def test_an_ensemble_whose_steps_do_not_fit_or_are_broken_will_not_be_served(
    tmp_path: Path,
) -> None:
    add_triton(tmp_path, "outer", ENSEMBLE.replace('"a"', '"x"').replace('"b"', '"y"') % "typed")
    for name, step in (
        ("fits", STEP % ("a", "TYPE_FP32")),
        ("named", STEP % ("z", "TYPE_FP32")),
        ("typed", STEP % ("a", "TYPE_INT64")),
        ("torn", "nonsense"),
        ("unsaid", 'platform: "onnxruntime_onnx"'),
    ):
        add_triton(tmp_path, f"{name}-step", step)
        add_triton(tmp_path, name, ENSEMBLE % f"{name}-step")
    found = problems(tmp_path)
    assert (found["fits"], found["unsaid"]) == ("", "")
    assert "it has no input 'a', but 'z'" in found["named"]
    assert "its input 'a' takes INT64 [1]" in found["typed"]
    assert found["torn-step"] in found["torn"]
    assert found["outer"] == f"ensemble 'outer', step 1 (model 'typed'): {found['typed']}"


WARMUP = """
model_warmup { name: "first" batch_size: 2 inputs { key: "%s" value: { %s dims: [ %s ] %s } } }
"""


@pytest.mark.parametrize(
    ("warmup", "text"),
    [
        (("a", "data_type: TYPE_FP32", "1", "zero_data: true"), ""),
        (("a", "data_type: TYPE_FP32", "1", 'input_data_file: "good"'), ""),
        (
            ("z", "data_type: TYPE_FP32", "1", "zero_data: true"),
            "input 'z': the model has no such input, but 'a': correct the name",
        ),
        (("a", "data_type: TYPE_FP64", "1", "zero_data: true"), "it is FP64, the model takes FP32"),
        (("a", "data_type: TYPE_FP32", "3", "zero_data: true"), "it is [2, 3], the model takes"),
        (
            ("a", "data_type: TYPE_FP32", "1", 'input_data_file: "long"'),
            "/warmup/long has 9 bytes, the shape [2, 1] of FP32 needs 8",
        ),
    ],
)
def test_a_warm_up_request_that_does_not_fit_is_a_fault(
    tmp_path: Path, warmup: tuple[str, ...], text: str
) -> None:
    config = "max_batch_size: 4" + STEP % ("a", "TYPE_FP32") + WARMUP % warmup
    folder = add_triton(tmp_path, "warm", config)
    (folder / "warmup").mkdir()
    (folder / "warmup" / "good").write_bytes(bytes(8))
    (folder / "warmup" / "long").write_bytes(bytes(9))
    report = check(tmp_path)
    assert report.counts() == (1, 0)
    assert report.faults() == bool(text)
    for fault in report.models[0].faults:
        assert fault.startswith(f"version 1: {folder}/config.pbtxt: model_warmup")
        assert text in fault


def test_a_file_of_a_warm_up_request_that_is_absent_is_a_problem(tmp_path: Path) -> None:
    given = ("a", "data_type: TYPE_FP32", "1", 'input_data_file: "absent"')
    folder = add_triton(tmp_path, "warm", STEP % ("a", "TYPE_FP32") + WARMUP % given)
    assert (
        f"'warmup/absent', which is not there: put it into {folder}" in problems(tmp_path)["warm"]
    )


def test_labels_that_are_absent_or_lie_elsewhere_are_faults(tmp_path: Path) -> None:
    labelled = (STEP % ("a", "TYPE_FP32")).replace('"b"', '"b" label_filename: "%s"')
    folder = add_triton(tmp_path, "labelled", labelled % "labels.txt")
    ((fault,),) = (model.faults for model in check(tmp_path).models)
    assert f"there is no file {folder}/1/labels.txt nor {folder}/labels.txt: put it there" in fault
    (folder / "labels.txt").write_text("cat\n")
    assert check(tmp_path).faults() == 0
    (folder / "config.pbtxt").write_text(labelled % "../labels.txt")
    ((fault,),) = (model.faults for model in check(tmp_path).models)
    assert "leads out of the model's folder" in fault


def test_versions_that_only_the_policy_knows_are_faults(tmp_path: Path) -> None:
    policy = "version_policy { specific { versions: [ 1, 3, 7 ] } }"
    folder = add_triton(tmp_path, "old", STEP % ("a", "TYPE_FP32") + policy)
    (folder / "2").mkdir()
    (folder / "2" / "model.onnx").write_bytes(b"x")
    report = check(tmp_path)
    ((fault,),) = (model.faults for model in report.models)
    assert fault.startswith(f"{folder}/config.pbtxt: ")
    assert f"names version 3, 7, which is not in {folder} (there is 1, 2)" in fault
    assert report.counts() == (1, 0)


def test_a_root_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        check(tmp_path / "absent")


def test_the_command_prints_json_and_its_status_says_whether_all_is_well(tmp_path: Path) -> None:
    hugging_face(tmp_path / "models", "good")
    arguments = [
        "check",
        str(tmp_path / "models"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--json",
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["served"] == 1
    labels = '[[output]]\nname = "y"\ndatatype = "FP32"\nshape = [1]\nlabels = "absent.txt"\n'
    (tmp_path / "models" / "good" / "model.toml").write_text(labels)
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, json.loads(result.stdout)["faults"]) == (1, 1)
    result = CliRunner().invoke(cli.app, arguments[:-1])
    assert "absent.txt" in result.stdout
    assert "1 versions will be served, 0 will not, 1 faults" in result.stdout
    (tmp_path / "models" / "good" / "model.toml").unlink()
    (tmp_path / "models" / "bad").mkdir()
    result = CliRunner().invoke(cli.app, arguments[:-1])
    assert result.exit_code == 1
    assert "holds no model files" in result.stdout


def test_models_in_folders_of_folders_are_reported_each(tmp_path: Path) -> None:
    for path in ("group/one", "group/deep/two", "group/deep/more/one"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "model-settings.json").write_text('{"cache_enabled": true}')
        (tmp_path / path / "model.onnx").write_bytes(b"x")
    report = Checker(None, False).check([str(tmp_path)])
    found = {model.name: model for model in report.models}
    assert set(found) == {"one", "two"}
    assert found["two"].folder == str(tmp_path / "group" / "deep" / "two")
    assert "cache_enabled" in found["two"].ignored[0]


def test_compiled_models_need_a_compiler_or_leave_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path, "package")
    (tmp_path / "package" / "net.aoti").write_bytes(b"x")
    make_model(tmp_path, "program", 'engine = "aoti"\n')
    (tmp_path / "program" / "model.pt2").write_bytes(b"x")
    monkeypatch.setenv("PATH", str(tmp_path))
    problems = {m.name: m.versions[0].problem for m in check(tmp_path).models}
    assert "allow_code" in problems["package"]
    assert "no C++ compiler" in problems["program"]


def test_a_folder_that_is_no_repository_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (remark,) = check(tmp_path / "empty").remarks
    assert "holds no folder" in remark
    folder = hugging_face(tmp_path / "models", "bert/1")
    (folder.parent / "model.toml").write_text("")
    (remark,) = check(folder.parent).remarks
    assert "holds model.toml, so it looks like one model's folder" in remark
    assert remark.endswith(f"name {tmp_path / 'models'}")
    assert not check(tmp_path / "models").remarks


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hugging_face(tmp_path, "m")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".safetensors"))
    ((version,),) = (model.versions for model in check(tmp_path).models)
    assert version.problem.startswith(f"{folder}/")
    assert "may not be read" in version.problem


def test_looking_at_folders_does_not_wait_for_torch(tmp_path: Path) -> None:
    hugging_face(tmp_path, "m")
    script = (
        "import sys; from overcommit.server.check_command import check_repositories as check;"
        "from rich.console import Console;"
        f"check([{str(tmp_path)!r}], None, False, False, Console());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_weights_that_are_cut_off_will_not_be_served(tmp_path: Path, share: float) -> None:
    folder = hugging_face(tmp_path, "m")
    (file,) = folder.glob("*.safetensors")
    content = safetensors.numpy.save({"w": np.zeros(1000, np.float32)}, {"format": "pt"})
    file.write_bytes(content)
    assert check(tmp_path).counts() == (1, 0)
    file.write_bytes(content[: int(share * len(content))])
    ((version,),) = (model.versions for model in check(tmp_path).models)
    assert version.problem.startswith(f"{file} is {'cut off' if share else 'empty'}")


def test_a_folder_whose_name_is_no_text_can_be_printed(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/bad\xff")
    arguments = ["check", str(tmp_path), "--cache-dir", str(tmp_path / ".cache"), "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    (model,) = json.loads(result.stdout)["models"]
    assert model["folder"].endswith("bad\\xff")
