"""The request to try: what is printed works as it stands, whatever the model takes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tritonclient.http as triton

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.example import example_request
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.payload import DATATYPES
from overcommit.server import inference
from overcommit.server.plans import RoutePlans

# Stands for curl: it says what it would send, and how long the JSON is of it.
_CURL = """#!%(python)s
import sys
url, *flags = sys.argv[1:]
given = dict(zip(flags[::2], flags[1::2], strict=True))
length = given.get("-H", "").removeprefix("Inference-Header-Content-Length: ")
body = given["-d"].encode() if "-d" in given else sys.stdin.buffer.read()
sys.stdout.buffer.write(length.encode() + b"\\n" + body)
"""


def route_of(datatype: str) -> Route:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1, 4))
    return Route(slot=0, name="m", version="1", state="ready", inputs=(spec,), outputs=(spec,))


def taken(route: Route, body: bytes, json_bytes: int | None) -> bytes:
    """What the server reads of a request: the tensor's bytes."""
    _, (data,) = inference.prepare(RoutePlans(route), body, json_bytes)
    return bytes(data)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_the_request_in_python_is_one_that_the_server_takes(
    datatype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = route_of(datatype)
    asked: list[tuple[bytes, int | None]] = []

    class Client(triton.InferenceServerClient):  # type: ignore[misc]
        def infer(self, name: str, inputs: Any, **more: Any) -> Any:
            asked.append(self.generate_request_body(inputs, **more))
            return SimpleNamespace(as_numpy=lambda name: name)

    monkeypatch.setattr(triton, "InferenceServerClient", Client)
    text = example_request("http://127.0.0.1:8000", route)
    exec(textwrap.dedent(text.partition("Python, with tritonclient:\n\n")[2]), {})
    ((body, json_bytes),) = asked
    assert taken(route, body, json_bytes)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_the_request_for_a_shell_is_one_that_the_server_takes(
    datatype: str, tmp_path: Path
) -> None:
    route = route_of(datatype)
    text = example_request("http://127.0.0.1:8000", route)
    curl = tmp_path / "curl"
    curl.write_text(_CURL % {"python": sys.executable})
    curl.chmod(0o755)
    line = text.partition("Try it:\n\n")[2].partition("\n\n")[0]
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["sh", "-c", line], capture_output=True, check=True, env=path).stdout
    length, _, body = said.partition(b"\n")
    assert taken(route, body, int(length) if length else None)
