"""The peers themselves; only where their environments have been made already."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

import numpy as np
import pytest

from overcommit.bench import grpc_wire, peers
from overcommit.bench.__main__ import WORK
from overcommit.bench.dialect import Grpc
from overcommit.bench.peers import PEERS, CannotDo, Job, Kind, environments
from overcommit.bench.processes import is_same

DONE = WORK.expanduser()


def need(name: str) -> None:
    if environments.find(DONE, PEERS[name].installed_as or name, PEERS[name].requirements) is None:
        pytest.skip(f"the environment of {name} has not been made")


def ask(target: peers.Target, model: str, row: list[float]) -> list[float]:
    request = target.dialect.request(model, np.array([row], np.float32))
    with socket.create_connection((target.host, target.port), 20) as connection:
        if isinstance(target.dialect, Grpc):
            message = grpc_wire.ask(connection, request)
            assert message is not None
            values: list[float] = target.dialect.read(model, {}, message).ravel().tolist()
            return values
        connection.sendall(request)
        response = http.client.HTTPResponse(connection, method="POST")
        response.begin()
        assert response.status == 200
        headers = {name.lower().encode(): value.encode() for name, value in response.getheaders()}
        got: list[float] = target.dialect.read(model, headers, response.read()).ravel().tolist()
    return got


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        *((name, "http") for name in PEERS if name != "grpc_aio"),
        ("triton", "grpc"),
        ("grpc_aio", "grpc"),
    ],
)
def test_a_peer_multiplies_and_leaves_nothing(name: str, protocol: str, tmp_path: Path) -> None:
    need(name)
    row = [number / 8 for number in range(16)]
    job = Job(Kind.ECHO, tmp_path, {"echo": 3.0}, protocol=protocol)
    with peers.serve(name, job, DONE) as target:
        rows = target.family()
        assert ask(target, "echo", row) == [3 * number for number in row]
    assert rows
    assert not any(is_same(row) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "mlserver"])
def test_a_peer_serves_many_models(name: str, tmp_path: Path) -> None:
    need(name)
    scales = {f"echo-{number}": float(number) for number in range(1, 4)}
    with peers.serve(name, Job(Kind.MANY, tmp_path, scales), DONE) as target:
        for model, scale in scales.items():
            assert ask(target, model, [1.0] * 16) == [scale] * 16


@pytest.mark.slow
def test_ray_multiplexes_models_from_files(tmp_path: Path) -> None:
    need("ray")
    scales = {f"table-{number}": float(number) for number in range(1, 6)}
    for name, scale in scales.items():
        table = np.full((4, 16), 9.0, np.float32)
        table[1] = scale
        np.save(tmp_path / f"{name}.npy", table)
    job = Job(Kind.MULTIPLEXED, tmp_path, scales, weights=tmp_path, room=2)
    with peers.serve("ray", job, DONE) as target:
        for model, scale in [*scales.items(), *scales.items()]:
            assert ask(target, model, [5.0] * 16) == [5 * scale] * 16


@pytest.mark.parametrize(
    ("name", "kind"), [("mosec", Kind.MANY), ("triton", Kind.MULTIPLEXED), ("ray", Kind.PAYLOAD)]
)
def test_what_a_peer_cannot_do_is_said(name: str, kind: Kind, tmp_path: Path) -> None:
    environment = environments.Environment(tmp_path)
    with pytest.raises(CannotDo, match=f"{name} is not asked for '{kind.value}'"):
        PEERS[name].launch(Job(kind, tmp_path), environment, 1)
