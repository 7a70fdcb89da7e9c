"""config.pbtxt and model-settings.json: what is served, noted and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.runtime.test_repository import make_model, only, settle

from overcommit.runtime import mlserver_config, model_files, triton_config
from overcommit.runtime.config import (
    Batching,
    Control,
    ModelConfig,
    Naming,
    PythonOptions,
    QueueLevel,
    Sequence,
    SequenceState,
    TensorSpec,
    Warmup,
    WarmupInput,
)
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.repository import VersionSource, scan
from overcommit.runtime.sequence_terms import visible_inputs, visible_outputs

CONFIG = """
name: "resnet"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, 224 ] } ]
output [ { name: "y" data_type: TYPE_STRING dims: [ -1 ] label_filename: "labels.txt" } ]
dynamic_batching {
  preferred_batch_size: [ 8, 4 ]
  max_queue_delay_microseconds: 500
  default_queue_policy { timeout_action: REJECT default_timeout_microseconds: 9000 max_queue_size: 7 }
}
instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0 ] rate_limiter { } } ]
optimization { graph { level: 1 } cuda { graphs: true } }
parameters { key: "k" value: { string_value: "v" } }
"""


def read(pbtxt: str) -> tuple[ModelConfig, list[str]]:
    return model_files.read([(triton_config.FILE_NAME, pbtxt.encode())])


def test_every_part_of_a_config_arrives() -> None:
    config, notes = read(CONFIG)
    assert config == ModelConfig(
        engine="onnx",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 3, 224, 224)),),
        outputs=(TensorSpec(name="y", datatype="BYTES", shape=(-1, -1), labels="labels.txt"),),
        batching=Batching(
            max_batch_size=8,
            max_queue_delay_us=500,
            max_queue_size=7,
            preferred_sizes=(4, 8),
            queue_timeout_us=9000,
        ),
        parameters={"k": "v"},
        naming=Naming(latest=1),
    )
    assert [note.partition(": ")[2].partition(":")[0] for note in notes] == [
        *("optimization", "instance_group", "input 'x'"),
    ]


def test_without_a_batch_size_dims_are_the_whole_shape() -> None:
    config, _ = read('input { name: "x" data_type: TYPE_INT64 dims: [ -1, 2 ] }')
    assert config.inputs[0].shape == (-1, 2)
    assert config.batching.max_batch_size == 0


def test_a_config_that_says_nothing_of_tensors_leaves_them_to_the_trials() -> None:
    config, _ = read('backend: "pytorch"')
    assert config == ModelConfig(naming=Naming(latest=1))


@pytest.mark.parametrize(
    ("policy", "naming"),
    [
        ("latest { num_versions: 3 }", Naming(latest=3)),
        ("all { }", None),
        ("specific { versions: [ 1, 4 ] }", Naming(specific=("1", "4"))),
    ],
)
def test_version_policies_are_read(policy: str, naming: Naming | None) -> None:
    assert read(f"version_policy {{ {policy} }}")[0].naming == naming


def test_warm_up_requests_are_read() -> None:
    config, _ = read(
        'max_batch_size: 4 model_warmup { name: "w" batch_size: 2 inputs { key: "x" value { '
        "data_type: TYPE_FP32 dims: [ 3 ] random_data: true } } }"
    )
    given = WarmupInput(name="x", datatype="FP32", shape=(3,), data="random")
    assert config.warmup == (Warmup(name="w", batch_size=2, inputs=(given,)),)


@pytest.mark.parametrize(
    ("pbtxt", "problem"),
    [
        ('backend: "tensorrt"', "backend 'tensorrt' is not served"),
        ("model_transaction_policy { decoupled: true }", "decoupled models"),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] reshape { shape: [ 3 ] } }',
            "cannot be reshaped",
        ),
        ('input { name: "x" dims: [ 1 ] }', "'x' has no data_type"),
        ("dynamic_batching { } sequence_batching { }", "at most one of"),
        ("version_policy { all { } latest { } }", "give one"),
        ("sequence_batching { state { } }", "lacks its input_name"),
        ("sequence_batching { iterative_sequence: true }", "iterative_sequence is not supported"),
        ("sequence_batching { direct { } oldest { } }", "has direct and oldest"),
        (
            (
                'sequence_batching { control_input { name: "c" control { kind: CONTROL_SEQUENCE_CORRID '
                "data_type: TYPE_FP32 } } }"
            ),
            "control 'c' is FP32",
        ),
        (
            (
                'input { name: "s" data_type: TYPE_FP32 dims: [ 1 ] } sequence_batching { control_input '
                '{ name: "s" control { int32_false_true: [ 0, 1 ] } } }'
            ),
            "'s' is more than one input",
        ),
        ("max_batch_size: -1", "max_batch_size"),
    ],
)
def test_what_cannot_be_served_is_refused(pbtxt: str, problem: str) -> None:
    with pytest.raises(RepositoryError) as raised:
        read(pbtxt)
    assert problem in raised.value.message
    assert "config.pbtxt" in raised.value.message


def test_unknown_fields_are_noted() -> None:
    assert read("quantum_batching { depth: 3 }")[1] == [
        "config.pbtxt: unknown field 'quantum_batching'"
    ]


LEVELS = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] }
dynamic_batching {
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 900 max_queue_size: 50 }
  priority_queue_policy [
    { key: 3 value { max_queue_size: 5 } },
    { key: 1 value { default_timeout_microseconds: 70 timeout_action: DELAY } }
  ]
}
"""


def test_levels_of_requests_are_read() -> None:
    config, notes = read(LEVELS)
    assert config.batching == Batching(
        max_batch_size=8,
        max_queue_size=50,
        queue_timeout_us=900,
        priority_levels=3,
        default_priority=2,
        levels=(
            QueueLevel(level=1, queue_timeout_us=70, timeout_action="delay"),
            QueueLevel(level=3, max_queue_size=5),
        ),
    )
    assert notes == []
    as_json = (
        b'{"max_batch_size": 8, "dynamic_batching": {"priority_levels": 3, "default_priority_level": 2, '
        b'"default_queue_policy": {"default_timeout_microseconds": 900, "max_queue_size": 50}, '
        b'"priority_queue_policy": {"3": {"max_queue_size": 5}, '
        b'"1": {"default_timeout_microseconds": 70, "timeout_action": "DELAY"}}}}'
    )
    assert (
        triton_config.read_json(as_json)[0]["batching"]
        == triton_config.read(LEVELS.encode())[0]["batching"]
    )


@pytest.mark.parametrize(
    "levels",
    [
        "priority_levels: 2 default_priority_level: 3",
        "priority_levels: 2 priority_queue_policy { key: 3 value { } }",
    ],
)
def test_levels_that_there_are_not_are_refused(levels: str) -> None:
    with pytest.raises(RepositoryError, match="priority_levels = 2"):
        read(f"max_batch_size: 2 dynamic_batching {{ {levels} }}")


SEQUENCES = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] }
output [{ name: "y" data_type: TYPE_FP32 dims: [ 2 ] }, { name: "shown" data_type: TYPE_INT32 dims: [ 1 ] }]
sequence_batching {
  max_sequence_idle_microseconds: 5000
  oldest { max_candidate_sequences: 4 preferred_batch_size: [ 4, 2 ] max_queue_delay_microseconds: 70
           preserve_ordering: true }
  control_input [
    { name: "START" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ -1, 2 ] } },
    { name: "END" control { kind: CONTROL_SEQUENCE_END bool_false_true: [ false, true ] } },
    { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }
  ]
  state [
    { input_name: "in" output_name: "shown" data_type: TYPE_INT32 dims: [ 1 ] },
    { input_name: "long" output_name: "longer" data_type: TYPE_FP16 dims: [ -1 ]
      initial_state { data_type: TYPE_FP16 dims: [ 3 ] data_file: "first.bin" name: "n" } }
  ]
}
"""


def test_sequence_batching_is_read() -> None:
    config, notes = read(SEQUENCES)
    assert config.sequence == Sequence(
        idle_us=5000,
        strategy="oldest",
        candidates=4,
        controls=(
            Control(kind="start", name="START", datatype="FP32", values=(-1, 2)),
            Control(kind="end", name="END", datatype="BOOL", values=(0, 1)),
            Control(kind="corrid", name="ID", datatype="BYTES"),
        ),
        states=(
            SequenceState(
                input="in", output="shown", datatype="INT32", shape=(-1, 1), is_shown=True
            ),
            SequenceState(
                input="long",
                output="longer",
                datatype="FP16",
                shape=(-1, -1),
                initial=(3,),
                file="initial_state/first.bin",
            ),
        ),
    )
    assert config.batching.preferred_sizes == (2, 4)
    assert config.batching.max_queue_delay_us == 70
    assert [spec.name for spec in config.inputs] == ["x", "START", "END", "ID", "in", "long"]
    assert [spec.name for spec in config.outputs] == ["y", "shown", "longer"]
    assert [spec.name for spec in visible_inputs(config)] == ["x"]
    assert [spec.name for spec in visible_outputs(config)] == ["y", "shown"]
    assert config.inputs[1].shape == (-1, 1)
    assert notes == [
        "config.pbtxt: sequence_batching.oldest.preserve_ordering: every request has its own answer"
    ]


def test_a_model_of_the_python_backend_is_a_process_that_may_run() -> None:
    plain = 'backend: "python" max_batch_size: 4'
    config, notes = model_files.read([(triton_config.FILE_NAME, plain.encode())])
    assert (config.engine, config.allow_code) == ("python", True)
    assert config.python == PythonOptions(process=True)
    assert not notes
    path = 'parameters { key: "EXECUTION_ENV_PATH" value: { string_value: "%s" } }'
    own = f"{plain} {path % '$$TRITON_MODEL_DIRECTORY/env'}"
    config, notes = model_files.read([(triton_config.FILE_NAME, own.encode())])
    assert config.python == PythonOptions(process=True, venv="../env")
    assert len(notes) == 1
    archive = f"{plain} {path % '$$TRITON_MODEL_DIRECTORY/env.tar.gz'}"
    with pytest.raises(RepositoryError, match="unpack it"):
        model_files.read([(triton_config.FILE_NAME, archive.encode())])


# --- MLServer -----------------------------------------------------------------------------------
SETTINGS = """{
  "name": "iris", "implementation": "mlserver_sklearn.SKLearnModel", "parallel_workers": 2,
  "max_batch_size": 16, "max_batch_time": 0.25,
  "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4], "parameters": {"content_type": "np"}}],
  "parameters": {"uri": "./model.joblib", "version": "v0.1.0", "extra": {"a": 1, "b": []}}
}"""


def test_model_settings_are_read() -> None:
    config, notes = model_files.read([(mlserver_config.FILE_NAME, SETTINGS.encode())])
    assert config == ModelConfig(
        engine="sklearn",
        entry="model.joblib",
        batching=Batching(max_batch_size=16, max_queue_delay_us=250_000),
        parameters={"a": 1},
        naming=Naming(aliases={"iris": ""}, called="v0.1.0"),
        allow_code=True,
        adapts=True,
    )
    assert len(notes) == 3
    onnx = SETTINGS.replace("mlserver_sklearn.SKLearnModel", "mlserver_onnx.OnnxModel")
    config, notes = model_files.read([(mlserver_config.FILE_NAME, onnx.encode())])
    assert config.inputs == (TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),)
    assert not config.adapts
    assert not config.allow_code
    assert len(notes) == 3


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ('{"implementation": "my.Model"}', "'my.Model' is not served"),
        ('{"parameters": {"uri": "../secret"}}', "leads out of the model's folder"),
        ('{"name": 3}', "model-settings.json"),
        (
            '{"implementation": "mlserver_huggingface.HuggingFaceRuntime", "parameters": {"uri": "./x"}}',
            "HuggingFaceRuntime is served from the folder",
        ),
        ("{", "model-settings.json"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings: str, problem: str) -> None:
    with pytest.raises(RepositoryError) as raised:
        model_files.read([(mlserver_config.FILE_NAME, settings.encode())])
    assert problem in raised.value.message


# --- in a repository ------------------------------------------------------------------------------
def add(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    settle(folder)


def test_our_own_file_wins_key_by_key(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "resnet/1", "[batching]\nmax_batch_size = 2").parent
    add(folder, "config.pbtxt", CONFIG)
    config = only(tmp_path).config
    assert config is not None
    assert (config.engine, config.batching.max_batch_size) == ("onnx", 2)
    assert config.batching.max_queue_delay_us == 500


def test_a_change_of_the_config_changes_only_the_end_of_the_fingerprint(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "resnet")
    before = only(tmp_path).fingerprint
    (folder / "config.pbtxt").write_text(CONFIG)
    after = only(tmp_path).fingerprint
    assert before != after
    assert before[:16] == after[:16]


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", ["10"]),
        ("version_policy { latest { num_versions: 2 } }", ["9", "10"]),
        ("version_policy { specific { versions: [ 2, 10, 77 ] } }", ["2", "10"]),
        ("version_policy { all { } }", ["2", "9", "10"]),
    ],
)
def test_the_version_policy_chooses_folders(tmp_path: Path, policy: str, served: list[str]) -> None:
    for version in ("2", "9", "10"):
        folder = make_model(tmp_path, f"m/{version}")
    add(folder.parent, "config.pbtxt", policy)
    assert [source.version for source in scan([tmp_path])] == served


def test_a_name_of_its_own_is_an_alias(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "iris")
    add(folder, "model-settings.json", '{"name": "iris"}')
    assert named(only(tmp_path)) is None
    add(folder, "model-settings.json", '{"name": "flower"}')
    assert named(only(tmp_path)) == Naming(aliases={"flower": ""})


def named(source: VersionSource) -> Naming | None:
    assert source.config is not None
    return source.config.naming


def test_a_warm_up_file_is_found_beside_the_versions_and_nowhere_else(tmp_path: Path) -> None:
    toml = """[[warmup]]\ninputs.x = {datatype="FP32", shape=[1], data="file", file="%s"}"""
    folder = make_model(tmp_path, "m/1").parent
    (folder / "warmup").mkdir()
    add(folder / "warmup", "x", "data")
    add(folder, "model.toml", toml % "warmup/x")
    config = only(tmp_path).config
    assert config is not None
    assert config.warmup[0].inputs[0].file == str(folder / "warmup" / "x")
    make_model(tmp_path, "other/1")
    add(folder, "model.toml", toml % "../other/1/model.safetensors")
    assert "symlink" in (scan([tmp_path])[0].error or "")


# --- models in folders of folders -----------------------------------------------------------------
def test_mlservers_models_may_lie_in_folders_of_folders(tmp_path: Path) -> None:
    settings = '{"name": "own", "implementation": "mlserver_sklearn.SKLearnModel"}'
    make_model(tmp_path, "plain")
    for path in ("group/b", "group/deep/a", "group/deep/a/examples"):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "model-settings.json").write_text(settings)
        (tmp_path / path / "model.joblib").write_bytes(b"x")
    (tmp_path / "group" / "versions" / "2").mkdir(parents=True)
    (tmp_path / "group" / "versions" / "2" / "model-settings.json").write_text(settings)
    (tmp_path / "group" / "versions" / "2" / "model.joblib").write_bytes(b"x")
    found = scan([tmp_path])
    assert [(each.name, each.version, each.error) for each in found] == [
        *(("a", "1", None), ("b", "1", None), ("versions", "2", None), ("plain", "1", None))
    ]
    assert found[0].config is not None
    assert found[0].config.engine == "sklearn"
    assert found[0].folder == str(tmp_path / "group" / "deep" / "a")
    # With a file of its own it is a model, whatever lies further down.
    (tmp_path / "group" / "model.pt2").write_bytes(b"x")
    assert [each.name for each in scan([tmp_path])] == ["group", "plain"]


# --- the same as JSON -----------------------------------------------------------------------------
RICH = (
    CONFIG
    + "version_policy { specific { versions: [ 1, 3 ] } }\n"
    + 'model_warmup { name: "w" batch_size: 2 inputs { key: "inputIds" value { data_type: TYPE_FP32 '
    + "dims: [ 3 ] random_data: true } } }\n"
)


@pytest.mark.parametrize("keeps_names", [True, False])
def test_a_configuration_as_json_says_what_the_file_says(keeps_names: bool) -> None:
    pytest.importorskip("tritonclient.grpc")
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    message = text_format.Parse(RICH, model_config_pb2.ModelConfig())
    written = json_format.MessageToJson(message, preserving_proto_field_name=keeps_names)
    assert '"9000"' in written  # protobuf writes numbers of 64 bits as texts
    assert triton_config.read_json(written.encode()) == triton_config.read(RICH.encode())


def test_what_json_says_wrong_names_the_field() -> None:
    for text, problem in (
        ("[]", "must be a JSON object"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"maxBatchSize": "many"}', "max_batch_size"),
        ('{"input": [{"dims": "wide"}]}', "dims"),
        ('{"input": {"name": "x"}}', "input"),
    ):
        with pytest.raises(RepositoryError, match=problem):
            triton_config.read_json(text.encode())
    tensor = '{"name": "x", "dataType": "TYPE_FP32", "dims": ["1"], "noneSuch": {"b": 1}}'
    _, notes = triton_config.read_json(f'{{"input": [{tensor}], "parameters": null}}'.encode())
    assert notes == ["unknown field 'input.none_such'"]
