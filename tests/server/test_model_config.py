"""A version's configuration as Triton's clients read it: what the operator wrote comes back."""

from __future__ import annotations

from typing import Any

import pytest

from overcommit.runtime.accounts import Described
from overcommit.runtime.config import ModelConfig, Naming, Warmup, WarmupInput
from overcommit.server.model_config import describe


def shown(**fields: Any) -> dict[str, Any]:
    config = ModelConfig(**fields)
    return describe(Described(name="m", version="1", engine="torch", config=config))


@pytest.mark.parametrize(
    ("naming", "policy"),
    [
        (None, {"all": {}}),
        (Naming(aliases={"stable": "1"}), {"all": {}}),
        (Naming(latest=2), {"latest": {"num_versions": 2}}),
        (Naming(specific=("1", "3")), {"specific": {"versions": [1, 3]}}),
    ],
)
def test_the_version_policy_is_the_operators(naming: Naming | None, policy: object) -> None:
    assert shown(naming=naming)["version_policy"] == policy


def test_warm_up_requests_are_shown_without_where_their_files_lie() -> None:
    inputs = (
        WarmupInput(name="x", datatype="FP32", shape=(16,), data="random"),
        WarmupInput(name="t", datatype="BYTES", shape=(1,), data="file", file="/models/m/warmup/t"),
        WarmupInput(name="z", datatype="INT64", shape=()),
    )
    warmup = Warmup(name="two rows", batch_size=2, count=3, inputs=inputs)
    assert shown(warmup=(warmup,))["model_warmup"] == [
        {
            "name": "two rows",
            "batch_size": 2,
            "count": 3,
            "inputs": {
                "x": {"data_type": "TYPE_FP32", "dims": [16], "random_data": True},
                "t": {"data_type": "TYPE_STRING", "dims": [1], "input_data_file": "t"},
                "z": {"data_type": "TYPE_INT64", "dims": [], "zero_data": True},
            },
        }
    ]
    assert shown()["model_warmup"] == []


def test_the_protocols_message_has_all_of_it() -> None:
    json_format = pytest.importorskip("google.protobuf.json_format")
    from overcommit.server.proto import messages

    warmup = Warmup(
        name="w",
        batch_size=2,
        inputs=(WarmupInput(name="x", datatype="FP32", shape=(16,), data="random"),),
    )
    value = shown(naming=Naming(specific=("1", "3")), warmup=(warmup,))
    answer = messages.ModelConfigResponse()
    json_format.ParseDict(value, answer.config, ignore_unknown_fields=True)
    assert list(answer.config.version_policy.specific.versions) == [1, 3]
    assert answer.config.model_warmup[0].inputs["x"].random_data
    assert list(answer.config.model_warmup[0].inputs["x"].dims) == [16]
