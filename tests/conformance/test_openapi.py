"""Every endpoint of our OpenAPI document, and the Open Inference Protocol's, under generated requests.

What is generated is right and wrong, by schemathesis.  No answer may be a failure of the server, and each
status must be in the document: 501 where the document says that nothing else is offered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import Server

MODELS = ("add", "echo-fp32", "echo-bytes", "labelled", "nope")
NAMES = {"name": MODELS, "model": MODELS, "version": ("1", "2", "x"), "region": ("r", "s")}
_NUMBERS = {"shape": [1, 2], "data": [1, 2]}
_X = {"name": "x", **_NUMBERS}
VALID = {
    "add": {"inputs": [{"name": name, "datatype": "INT32", **_NUMBERS} for name in ("a", "b")]},
    "echo-fp32": {"inputs": [{**_X, "datatype": "FP32"}]},
    "labelled": {
        "inputs": [{**_X, "datatype": "FP32"}],
        "outputs": [{"name": "y", "parameters": {"classification": 1}}],
    },
}
QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fuzzed(extended: Server) -> Iterator[Server]:
    """The server, which is put back as it was."""
    yield extended
    for row in extended.post("/v2/repository/index", {}).json():
        assert extended.post(f"/v2/repository/models/{row['name']}/load", {}).status == 200
    extended.post("/v2/systemsharedmemory/unregister", {})
    assert extended.post("/v2/logging", {"log_verbose_level": 0, "log_info": True}).status == 200


def own_document() -> Any:
    """Return the document as the server writes it."""
    from overcommit.server.app import make_app

    return make_app(_NoFront()).openapi()  # type: ignore[arg-type]


class _NoFront:
    """The document is written without a front end."""

    def __getattr__(self, name: str) -> Any:
        return None


def operations(document: Any) -> list[Any]:
    schema = schemathesis.openapi.from_dict(document)
    return [each.ok() for each in schema.get_all_operations()]


def check(server: Server, operation: Any, draw: Any) -> None:
    """Send one generated request and look at the answer."""
    case = draw(operation.as_strategy())
    for name, known in NAMES.items():
        if name in case.path_parameters and draw(st.integers(0, 3)):
            case.path_parameters[name] = draw(st.sampled_from(known))
    right = VALID.get(case.path_parameters.get("name", case.path_parameters.get("model", "")))
    if case.formatted_path.endswith("/infer") and right is not None and draw(st.booleans()):
        case.body = {**right, **draw(st.sampled_from(({}, {"id": "a"}, {"outputs": []})))}
    response = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=30)
    documented = {str(status) for status in operation.definition.raw["responses"]}
    status = response.status_code
    text = f"{case.method} {case.formatted_path} {case.body!r}: {status} {response.text[:300]}"
    # A name may be drawn that is no part of a path: then there is no such path.
    assert str(status) in documented | {"404"}, text
    assert status < 500 or (status == 501 and "not offered" in response.text), text
    if status >= 400 and case.method != "HEAD":
        assert set(response.json()) == {"error"} or "ready" in response.json(), text


OURS = [each for each in operations(own_document()) if each.path != "/v1/embeddings"]


@pytest.mark.parametrize("operation", OURS, ids=lambda each: f"{each.method} {each.path}")
def test_our_document_holds(fuzzed: Server, operation: Any) -> None:
    @QUICK
    @given(st.data())
    def run(data: Any) -> None:
        check(fuzzed, operation, data.draw)

    run()


# The paths of the Open Inference Protocol's REST document (kserve/open-inference-protocol, d49cc23) and the
# form of its requests.  It documents 200 and 400; we answer 404 for what there is not.
_STATUSES = {status: {"description": ""} for status in ("200", "400", "404")}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype", "data"],
    "properties": {
        "name": {"enum": ["x", "a", "b"]},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {"type": "number"}},
    },
}
_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
            },
        },
    },
}
_MODEL = "/v2/models/{model}/versions/{version}"
_NAMED = [
    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name in ("model", "version")
]


def _get(*parameters: Any) -> Any:
    return {"get": {"parameters": list(parameters), "responses": _STATUSES}}


PROTOCOL = {
    "openapi": "3.0.0",
    "info": {"title": "Open Inference Protocol", "version": "2.0"},
    "paths": {
        "/v2/health/live": _get(),
        "/v2/health/ready": _get(),
        "/v2/": _get(),
        _MODEL: _get(*_NAMED),
        f"{_MODEL}/ready": _get(*_NAMED),
        f"{_MODEL}/infer": {
            "post": {
                "parameters": _NAMED,
                "requestBody": {"content": {"application/json": {"schema": _REQUEST}}},
                "responses": _STATUSES,
            }
        },
    },
}
PROTOCOLS = operations(PROTOCOL)


@pytest.mark.parametrize("operation", PROTOCOLS, ids=lambda each: f"{each.method} {each.path}")
def test_the_open_inference_protocols_document_holds(fuzzed: Server, operation: Any) -> None:
    @QUICK
    @given(st.data())
    def run(data: Any) -> None:
        check(fuzzed, operation, data.draw)

    run()
