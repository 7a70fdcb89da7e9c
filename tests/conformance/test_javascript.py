"""A gRPC client in another language, made from the published proto, against the real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import WATCHDOG_S, Server

from overcommit import server as package

HERE = Path(__file__).parent / "js"
PROTO = Path(package.__path__[0]) / "proto" / "inference.proto"


def test_a_javascript_client_gets_what_a_python_client_gets(server: Server) -> None:
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules" / "@grpc" / "grpc-js").exists():
        pytest.skip("needs node, and once `make js`")
    ran = subprocess.run(
        [node, str(HERE / "client.js"), str(PROTO), str(server.grpc_port)],
        capture_output=True,
        timeout=WATCHDOG_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    found = json.loads(ran.stdout)
    models = found.pop("models")
    assert models >= 15
    assert found == {
        "live": True,
        "ready": True,
        "inputs": [["a", "INT32", [-1, -1]], ["b", "INT32", [-1, -1]]],
        "answer": ["faulty", "seven", [2.0, 4.0]],
        "contents": [6.0, 8.0],
        "many": [float(number) for number in range(200)],
        "stream": [2.0 * number for number in range(100)],
        "large": True,
        "gzip": 4.0,
        "unknown": "NOT_FOUND",
        "wrong": "INVALID_ARGUMENT",
        "hot": "INTERNAL",
        "late": "DEADLINE_EXCEEDED",
        "cancelled": "CANCELLED",
    }
    server.wait_until(lambda: server.status()["front_ends"][0]["blocks_used"] == 0)
