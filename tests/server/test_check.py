"""`overcommit check`: what will be served, what is ignored, what is not supported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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


def test_an_ensemble_whose_step_is_missing_is_remarked(tmp_path: Path) -> None:
    (tmp_path / "both" / "1").mkdir(parents=True)
    (tmp_path / "both" / "config.pbtxt").write_text(
        'input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } '
        'output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ensemble_scheduling { step { '
        'model_name: "gone" input_map { key: "a" value: "x" } output_map { key: "b" value: "y" } } }'
    )
    report = check(tmp_path)
    assert report.models[0].versions[0].engine == "ensemble"
    assert report.remarks == ("both: it asks the model 'gone', which is not there",)


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
