"""One list of HTTP requests for Triton and for us, and what is compared of the answers.

Of an answer counts: its status, the keys of its JSON at every depth, and every tensor in it.  Models are
the ones of `model_rig.add_extended_models`, which `record_triton.py` writes for Triton as well.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SHM_KEY = "/overcommit-differential"
SHM_BYTES = 256
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ask:
    """One request."""

    name: str
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def _post(name: str, path: str, value: Any = None, **headers: str) -> Ask:
    body = b"" if value is None else json.dumps(value).encode()
    return Ask(name, "POST", path, body, headers)


def _get(name: str, path: str) -> Ask:
    return Ask(name, "GET", path)


def _x(datatype: str = "FP32", data: Any = (1, 3, 2), **more: Any) -> dict[str, Any]:
    given = {"name": "x", "datatype": datatype, "shape": [1, 3], "data": list(data), **more}
    return {key: value for key, value in given.items() if value is not None}


def _blob(datatype: str, nbytes: int) -> dict[str, Any]:
    size = {"binary_data_size": nbytes}
    return {"name": "x", "datatype": datatype, "shape": [1, 3], "parameters": size}


def _infer(name: str, model: str, value: Any, version: str = "") -> Ask:
    middle = f"/versions/{version}" if version else ""
    return _post(name, f"/v2/models/{model}{middle}/infer", value)


def _binary(name: str, model: str, value: Any, tail: bytes, gzipped: bool = False) -> Ask:
    text = json.dumps(value).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    body = text + tail
    if gzipped:
        body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
    return Ask(name, "POST", f"/v2/models/{model}/infer", body, headers)


_FLOATS = struct.pack("<3f", 1, 3, 2)
_WORDS = b"".join(struct.pack("<I", len(word)) + word for word in (b"a", b"", b"\xc3\xa9"))
_ADD = [
    {"name": name, "datatype": "INT32", "shape": [2, 2], "data": [5, 6, 7, 8]}
    for name in ("a", "b")
]


def _y(**parameters: Any) -> list[dict[str, Any]]:
    return [{"name": "y", "parameters": parameters}]


_SHM_IN = {"shared_memory_region": "r", "shared_memory_byte_size": 12}
_SHM_OUT = {"shared_memory_region": "r", "shared_memory_byte_size": 12, "shared_memory_offset": 64}

DESCRIPTIONS = [
    _get("server metadata", "/v2"),
    _get("live", "/v2/health/live"),
    _get("ready", "/v2/health/ready"),
    _get("model metadata", "/v2/models/add"),
    _get("version metadata", "/v2/models/add/versions/1"),
    _get("model ready", "/v2/models/add/ready"),
    _get("version ready", "/v2/models/add/versions/1/ready"),
    _get("unknown model", "/v2/models/nope"),
    _get("unknown version", "/v2/models/add/versions/9"),
    _get("a version that is no number", "/v2/models/add/versions/x"),
    _get("unknown model ready", "/v2/models/nope/ready"),
    _get("config", "/v2/models/add/config"),
    _get("version config", "/v2/models/add/versions/1/config"),
    _get("config with labels", "/v2/models/labelled/config"),
    _get("unknown config", "/v2/models/nope/config"),
    _get("statistics of one version", "/v2/models/echo-bool/versions/1/stats"),
    _get("statistics of an unknown model", "/v2/models/nope/stats"),
    _get("statistics of an unknown version", "/v2/models/add/versions/9/stats"),
    _get("unknown path", "/v2/nope"),
    _get("infer by GET", "/v2/models/add/infer"),
    Ask("DELETE", "DELETE", "/v2/models/add"),
]
INFERENCES = [
    _infer("two inputs, two outputs", "add", {"inputs": _ADD}),
    _infer("with a version", "add", {"inputs": _ADD}, "1"),
    _post("with a query string", "/v2/models/add/infer?a=b", {"inputs": _ADD}),
    _infer("an id comes back", "add", {"id": "q-1", "inputs": _ADD}),
    _infer("parameters that nobody knows", "add", {"parameters": {"foo": "bar"}, "inputs": _ADD}),
    _infer(
        "priority and timeout",
        "add",
        {"parameters": {"priority": 1, "timeout": 10_000_000}, "inputs": _ADD},
    ),
    _infer("an extra model_name", "add", {"model_name": "add", "inputs": _ADD}),
    _infer("one output", "add", {"inputs": _ADD, "outputs": [{"name": "difference"}]}),
    _infer("nested data", "echo-fp32", {"inputs": [_x(data=[[1, 3, 2]])]}),
    _infer("whole numbers as floats", "echo-int64", {"inputs": [_x("INT64", [1, 2, 3])]}),
    _infer("booleans", "echo-bool", {"inputs": [_x("BOOL", [True, False, True])]}),
    _infer("strings", "echo-bytes", {"inputs": [_x("BYTES", ["a", "", "é"])]}),
    _binary(
        "a binary input",
        "echo-fp32",
        {"inputs": [_blob("FP32", 12)]},
        _FLOATS,
    ),
    _binary(
        "a compressed binary input",
        "echo-fp32",
        {"inputs": [_blob("FP32", 12)]},
        _FLOATS,
        gzipped=True,
    ),
    _binary(
        "binary FP16 and a binary output",
        "echo-fp16",
        {
            "inputs": [_blob("FP16", 6)],
            "outputs": _y(binary_data=True),
        },
        struct.pack("<3e", 1, 3, 2),
    ),
    _binary(
        "binary strings",
        "echo-bytes",
        {
            "inputs": [_blob("BYTES", len(_WORDS))],
            "parameters": {"binary_data_output": True},
        },
        _WORDS,
    ),
    _infer(
        "all outputs binary but one",
        "add",
        {
            "inputs": _ADD,
            "parameters": {"binary_data_output": True},
            "outputs": [
                {"name": "sum"},
                {"name": "difference", "parameters": {"binary_data": False}},
            ],
        },
    ),
    _infer("classes", "labelled", {"inputs": [_x()], "outputs": _y(classification=2)}),
    _infer("all classes", "echo-fp32", {"inputs": [_x()], "outputs": _y(classification=9)}),
    _infer("no classes", "echo-fp32", {"inputs": [_x()], "outputs": _y(classification=0)}),
    _infer(
        "classes in binary form",
        "labelled",
        {"inputs": [_x()], "outputs": _y(classification=1, binary_data=True)},
    ),
    _infer(
        "classes of whole numbers",
        "add",
        {"inputs": _ADD, "outputs": [{"name": "sum", "parameters": {"classification": 1}}]},
    ),
]
REFUSALS = [
    _infer("unknown model to infer", "nope", {"inputs": _ADD}),
    _infer("unknown version to infer", "add", {"inputs": _ADD}, "9"),
    _infer("a missing input", "add", {"inputs": _ADD[:1]}),
    _infer("an unknown input", "echo-fp32", {"inputs": [_x() | {"name": "z"}]}),
    _infer("an unknown output", "echo-fp32", {"inputs": [_x()], "outputs": [{"name": "z"}]}),
    _infer("the wrong datatype", "echo-fp32", {"inputs": [_x("INT64")]}),
    _infer("an unknown datatype", "echo-fp32", {"inputs": [_x("FP99")]}),
    _infer("too few values", "echo-fp32", {"inputs": [_x(data=[1])]}),
    _infer("the wrong rank", "echo-fp32", {"inputs": [_x() | {"shape": [3]}]}),
    _infer(
        "too many rows",
        "echo-fp32",
        {"inputs": [_x(data=[0] * 27) | {"shape": [9, 3]}]},
    ),
    _infer("no inputs", "add", {}),
    Ask("no JSON", "POST", "/v2/models/add/infer", b"{"),
    Ask("no body", "POST", "/v2/models/add/infer", b""),
    _infer("the model fails", "faulty", {"inputs": [_x(data=[1000, 1, 1])]}),
    _binary(
        "fewer bytes than binary_data_size",
        "echo-fp32",
        {"inputs": [_blob("FP32", 12)]},
        _FLOATS[:8],
    ),
]
SHARED_MEMORY = [
    _get("no regions", "/v2/systemsharedmemory/status"),
    _get("an unknown region", "/v2/systemsharedmemory/region/r/status"),
    _post(
        "a key that is not there",
        "/v2/systemsharedmemory/region/r/register",
        {"key": "/overcommit-is-not-there", "offset": 0, "byte_size": 64},
    ),
    _post("no key", "/v2/systemsharedmemory/region/r/register", {"byte_size": 64}),
    _post("no size", "/v2/systemsharedmemory/region/r/register", {"key": SHM_KEY}),
    _post(
        "too long",
        "/v2/systemsharedmemory/region/r/register",
        {"key": SHM_KEY, "offset": 0, "byte_size": SHM_BYTES + 1},
    ),
    _post(
        "register",
        "/v2/systemsharedmemory/region/r/register",
        {"key": SHM_KEY, "offset": 0, "byte_size": SHM_BYTES},
    ),
    _post(
        "register again",
        "/v2/systemsharedmemory/region/r/register",
        {"key": SHM_KEY, "offset": 0, "byte_size": SHM_BYTES},
    ),
    _get("one region", "/v2/systemsharedmemory/region/r/status"),
    _get("all regions", "/v2/systemsharedmemory/status"),
    _infer(
        "in and out of shared memory",
        "echo-fp32",
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": _SHM_IN}],
            "outputs": _y(**_SHM_OUT),
        },
    ),
    _infer(
        "a region too small for the output",
        "echo-fp32",
        {"inputs": [_x()], "outputs": _y(**{**_SHM_OUT, "shared_memory_byte_size": 4})},
    ),
    _infer(
        "beyond the region",
        "echo-fp32",
        {"inputs": [_x()], "outputs": _y(**{**_SHM_OUT, "shared_memory_offset": 250})},
    ),
    _infer(
        "a region that is not registered",
        "echo-fp32",
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": [1, 3],
                    "parameters": {**_SHM_IN, "shared_memory_region": "nope"},
                }
            ]
        },
    ),
    _infer(
        "classes in shared memory",
        "echo-fp32",
        {"inputs": [_x()], "outputs": _y(**_SHM_OUT, classification=1)},
    ),
    _post("unregister", "/v2/systemsharedmemory/region/r/unregister"),
    _post("unregister again", "/v2/systemsharedmemory/region/r/unregister"),
    _post("unregister all", "/v2/systemsharedmemory/unregister"),
    _get("no CUDA regions", "/v2/cudasharedmemory/status"),
    _get("an unknown CUDA region", "/v2/cudasharedmemory/region/c/status"),
    _post(
        "a CUDA handle that is none",
        "/v2/cudasharedmemory/region/c/register",
        {"raw_handle": {"b64": "AAAA"}, "device_id": 0, "byte_size": 8},
    ),
    _post("no CUDA handle", "/v2/cudasharedmemory/region/c/register", {}),
    _post("unregister CUDA", "/v2/cudasharedmemory/region/c/unregister"),
    _post("unregister all CUDA", "/v2/cudasharedmemory/unregister"),
]
SETTINGS = [
    _get("log settings", "/v2/logging"),
    _post("verbose", "/v2/logging", {"log_verbose_level": 1}),
    _post("not verbose", "/v2/logging", {"log_verbose_level": 0}),
    _post("an unknown log setting", "/v2/logging", {"nope": 1}),
    _post("a wrong log setting", "/v2/logging", {"log_info": "x"}),
    _post("a log file", "/v2/logging", {"log_file": "/tmp/x"}),
    _get("trace settings", "/v2/trace/setting"),
    _post("a trace rate", "/v2/trace/setting", {"trace_rate": "5"}),
    _post("a wrong trace rate", "/v2/trace/setting", {"trace_rate": "x"}),
    _post("an unknown trace setting", "/v2/trace/setting", {"nope": "x"}),
    _post("a trace file", "/v2/trace/setting", {"trace_file": "/tmp/x"}),
    _post("tracing without a file", "/v2/trace/setting", {"trace_level": ["TIMESTAMPS"]}),
    _get("a model's trace settings", "/v2/models/add/trace/setting"),
    _post("a model's trace rate", "/v2/models/add/trace/setting", {"trace_rate": "7"}),
    _post("a model's trace rate, cleared", "/v2/models/add/trace/setting", {"trace_rate": None}),
    _get("an unknown model's trace settings", "/v2/models/nope/trace/setting"),
    _post("the trace rate as it was", "/v2/trace/setting", {"trace_rate": None}),
]
REPOSITORY = [
    _post("index", "/v2/repository/index"),
    _post("index of those ready", "/v2/repository/index", {"ready": True}),
    _get("index by GET", "/v2/repository/index"),
    _post("load what is loaded", "/v2/repository/models/add/load", {}),
    _post("load unknown", "/v2/repository/models/nope/load", {}),
    _post("unload unknown", "/v2/repository/models/nope/unload", {}),
    Ask("load, no JSON", "POST", "/v2/repository/models/add/load", b"{"),
    _post(
        "a load that brings a configuration",
        "/v2/repository/models/add/load",
        {"parameters": {"config": "{"}},
    ),
    _post(
        "unload",
        "/v2/repository/models/add/unload",
        {"parameters": {"unload_dependents": False}},
    ),
    _get("metadata when unloaded", "/v2/models/add"),
    _get("config when unloaded", "/v2/models/add/config"),
    _get("statistics when unloaded", "/v2/models/add/stats"),
    _get("ready when unloaded", "/v2/models/add/ready"),
    _infer("infer when unloaded", "add", {"inputs": _ADD}),
    _get("server ready when one is unloaded", "/v2/health/ready"),
    _post("generate", "/v2/models/echo-fp32/generate", {"x": 1}),
    _post("generate of an unknown model", "/v2/models/nope/generate", {"x": 1}),
    _post("load", "/v2/repository/models/add/load", {}),
]
ASKS = [*DESCRIPTIONS, *INFERENCES, *REFUSALS, *SHARED_MEMORY, *SETTINGS, *REPOSITORY]


# --- answers ------------------------------------------------------------------------------------
def ask_all(port: int) -> dict[str, dict[str, Any]]:
    """Send every request, in order, on one connection each; return what counts of the answers."""
    with _shared_memory():
        return {ask.name: _ask(port, ask) for ask in ASKS}


def _ask(port: int, ask: Ask) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(ask.method, ask.path, ask.body, ask.headers)
        response = connection.getresponse()
        body = response.read()
        json_bytes = int(response.getheader("Inference-Header-Content-Length") or len(body))
        return {"status": response.status, **_counts(body[:json_bytes], body[json_bytes:])}
    finally:
        connection.close()


def _counts(text: bytes, tail: bytes) -> dict[str, Any]:
    value = json.loads(text) if text.strip() else {}
    tensors = []
    for output in value.get("outputs", []) if isinstance(value, dict) else []:
        if not isinstance(output, dict) or "shape" not in output or "data_type" in output:
            continue
        size = output.get("parameters", {}).get("binary_data_size")
        data = output.get("data")
        if size is not None:
            data, tail = tail[:size].hex(), tail[size:]
        tensors.append([output["name"], output["datatype"], output["shape"], data])
    found: dict[str, Any] = {"keys": sorted(_keys(value, ""))}
    if tensors:
        found["tensors"] = tensors
    if isinstance(value, dict) and "id" in value:
        found["id"] = value["id"]
    return found


def _keys(value: Any, path: str) -> set[str]:
    if isinstance(value, dict):
        found = set()
        for key, each in value.items():
            found |= {f"{path}.{key}", *_keys(each, f"{path}.{key}")}
        return found
    if isinstance(value, list):
        return {key for each in value for key in _keys(each, f"{path}[]")}
    return set()


@contextlib.contextmanager
def _shared_memory() -> Iterator[None]:
    path = f"/dev/shm{SHM_KEY}"
    with open(path, "wb") as file:
        file.write(_FLOATS + bytes(SHM_BYTES - len(_FLOATS)))
    try:
        yield
    finally:
        os.unlink(path)
