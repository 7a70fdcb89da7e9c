"""KServe's SDK, REST and gRPC, against the real server."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import WATCHDOG_S, Server

CLIENT = Path(__file__).parent.parent / "kserve_client.py"
ANSWER = {
    "model": "faulty",
    "id": "seven",
    "name": "y",
    "datatype": "FP32",
    "values": [[2.0, 4.0], [6.0, 8.0]],
}


@pytest.fixture(scope="module")
def found(server: Server) -> Any:
    if importlib.util.find_spec("kserve") is None:
        pytest.skip("the package kserve is not installed: pip install --no-deps kserve")
    ran = subprocess.run(
        [sys.executable, str(CLIENT), str(server.port), str(server.grpc_port)],
        capture_output=True,
        timeout=WATCHDOG_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_health_is_understood(found: Any, protocol: str) -> None:
    answers = found[protocol]
    assert (answers["live"], answers["ready"], answers["model_ready"]) == (True, True, True)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("form", ["raw", "contents"])
def test_inference_is_right(found: Any, protocol: str, form: str) -> None:
    assert found[protocol][form] == ANSWER


def test_an_unknown_model_is_not_ready_and_not_served(found: Any) -> None:
    assert found["grpc"]["unknown_ready"] is False
    assert "Request for unknown model: 'nope' is not found" in found["http"]["unknown"]


def test_a_mix_of_raw_and_contents_is_refused_as_triton_does(found: Any) -> None:
    assert found["grpc"]["mixed"] == "INVALID_ARGUMENT"


def test_models_are_loaded_by_kserves_field_numbers(found: Any) -> None:
    assert found["grpc"]["unload"] == ["loadable", True]
    assert found["grpc"]["load"] == ["loadable", True]
    assert found["grpc"]["inputs"] == ["a", "b"]
