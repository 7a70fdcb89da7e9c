"""An unload answers what was accepted before it, and refuses what comes after."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_rig import ECHO, add_model
from serving import Answer, Server

from overcommit.server.limits import BULK_BYTES_MIN

# It says that a request has come to it, and goes on when its gate is open.  `made` tells instances apart.
GATED = """
import os
import pathlib
import time
import numpy as np

class Model:
    def load(self, folder, parameters):
        self.events = pathlib.Path(parameters["events"])
        self.made = int.from_bytes(os.urandom(4), "little")

    def infer(self, inputs):
        x = inputs["x"]
        if x[0, 0] >= 100:  # not the packer's
            (self.events / f"began-{int(x[0, 0])}").touch()
            while not (self.events / "open").exists():
                time.sleep(0.002)
        return {"y": x * 2, "made": np.full((len(x), 1), self.made, np.int64)}
"""
Y = '[[output]]\nname = "y"\ndatatype = "FP32"\nshape = [-1, 1]\n'


@dataclass
class Gated:
    """A model that waits, and what is known of it."""

    server: Server
    name: str
    events: Path

    def has_begun(self, number: int) -> bool:
        return (self.events / f"began-{number}").exists()

    def open(self) -> None:
        (self.events / "open").touch()

    def infer(self, number: float = 0.0, name: str = "") -> Answer:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [number]}
        return self.server.post(f"/v2/models/{name or self.name}/infer", {"inputs": [tensor]})

    def unload(self, **parameters: bool) -> Answer:
        path = f"/v2/repository/models/{self.name}/unload"
        return self.server.post(path, {"parameters": parameters} if parameters else {})

    def load(self) -> Answer:
        return self.server.post(f"/v2/repository/models/{self.name}/load", {})

    def is_ready(self) -> bool:
        return self.server.get(f"/v2/models/{self.name}/ready").status == 200

    def wait_accepted(self, count: int) -> None:
        """Wait until so many requests are with the server, of whatever model."""
        self.server.wait_until(lambda: in_flight(self.server) == count)

    def assert_is_out(self) -> None:
        """New requests are refused, and everybody is told why."""
        refused = self.infer(99.0)
        assert refused.status == 404, refused.body
        assert "it is unloaded" in refused.json()["error"]
        assert not self.is_ready()
        (row,) = (r for r in index(self.server) if r["name"] == self.name)
        assert (row["state"], row["reason"]) == ("UNAVAILABLE", "unloaded")


def in_flight(server: Server) -> int:
    return sum(int(front["in_flight"]) for front in server.status()["front_ends"])


def index(server: Server) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = server.post("/v2/repository/index", {}).json()
    return rows


def outputs(answer: Answer) -> dict[str, list[float]]:
    assert answer.status == 200, answer.body
    return {each["name"]: each["data"] for each in answer.json()["outputs"]}


def add_gated(root: Path, name: str, events: Path) -> None:
    (root / name).mkdir(parents=True)
    events.mkdir(parents=True)
    (root / name / "model.py").write_text(GATED)
    (root / name / "model.toml").write_text(
        f'engine = "python"\nallow_code = true\nparameters.events = "{events}"\n'
        '[[input]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 1]\n'
        f"{Y}"
        '[[output]]\nname = "made"\ndatatype = "INT64"\nshape = [-1, 1]\n'
        "[batching]\nmax_batch_size = 1\n"
    )


MODELS = ("queued", "again", "busy", "killed", "called", "step")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unload")
    for name in MODELS:
        add_gated(root / "models", name, root / "events" / name)
    add_model(root / "models", "idle", ECHO, {"x": "FP32"}, columns=1)
    add_model(root / "models", "cold", ECHO, {"x": "FP32"}, columns=1)
    add_model(root / "models", "last", ECHO, {"x": "FP32"}, columns=1)
    (root / "models" / "chain").mkdir()
    (root / "models" / "chain" / "model.toml").write_text(
        '[[input]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 1]\n' + Y + "[[ensemble.step]]\n"
        'model = "step"\ninputs = { x = "x" }\noutputs = { y = "middle" }\n'
        '[[ensemble.step]]\nmodel = "last"\ninputs = { x = "middle" }\noutputs = { y = "y" }\n'
    )
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    """One worker, so that one batch keeps all others in the ring; two front ends that know of each other."""
    flags = ("--allow-code", "--workers", "1", "--front-ends", "2")
    with Server(root / "models", cache=root / "cache", flags=flags) as running:
        running.wait_until(lambda: all(row["state"] == "READY" for row in index(running)))
        yield running
        assert running.stop() == 0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def gated(server: Server, root: Path, pool: ThreadPoolExecutor) -> Iterator[Callable[[str], Gated]]:
    made: list[Gated] = []

    def make(name: str) -> Gated:
        made.append(Gated(server, name, root / "events" / name))
        return made[-1]

    try:
        yield make
    finally:
        for each in made:  # else the pool waits for ever where a test failed
            if each.events.is_dir():
                each.open()


def begin(model: Gated, pool: Executor, count: int) -> list[Future[Answer]]:
    """Send requests: the first one runs, the others wait for it."""
    answers = [pool.submit(model.infer, 100.0)]
    model.server.wait_until(lambda: model.has_begun(100))
    answers += [pool.submit(model.infer, float(number)) for number in range(101, 100 + count)]
    model.wait_accepted(count)
    return answers


class Idle:
    """A model that nobody asks: when it has left after its unload, whoever is unused has left, too."""

    def __init__(self, model: Gated) -> None:
        self._model, self._server = model, model.server
        model.load()
        outputs(model.infer())

    def leave(self) -> None:
        used = self._server.status()["device"]["used"]
        assert self._model.unload().status == 200
        self._server.wait_until(lambda: self._server.status()["device"]["used"] < used)


def test_what_waits_is_answered_and_what_comes_is_refused(
    gated: Callable[[str], Gated], pool: ThreadPoolExecutor
) -> None:
    idle, model = Idle(gated("idle")), gated("queued")
    answers = begin(model, pool, 5)
    assert model.unload().status == 200
    model.assert_is_out()
    idle.leave()
    assert not any(answer.done() for answer in answers)
    model.open()
    for number, answer in enumerate(answers, 100):
        assert outputs(answer.result())["y"] == [2.0 * number]
    model.assert_is_out()
    assert model.load().status == 200
    assert outputs(model.infer(21.0))["y"] == [42.0]


def test_a_load_begins_anew_while_the_former_finishes(
    gated: Callable[[str], Gated], pool: ThreadPoolExecutor
) -> None:
    model = gated("again")
    former = begin(model, pool, 2)
    assert model.unload().status == 200
    assert model.load().status == 200
    assert model.is_ready()
    later = pool.submit(model.infer, 110.0)
    model.wait_accepted(3)
    model.open()
    made = [outputs(each.result())["made"] for each in (*former, later)]
    assert made[0] == made[1] != made[2]
    assert outputs(model.infer())["made"] == made[2]


def test_a_request_that_waits_for_weights_gets_them_after_an_unload(
    gated: Callable[[str], Gated], pool: ThreadPoolExecutor, server: Server
) -> None:
    idle, busy, cold = Idle(gated("idle")), gated("busy"), gated("cold")
    (first,) = begin(busy, pool, 1)
    answer = pool.submit(cold.infer, 7.0)
    cold.wait_accepted(2)
    assert cold.unload().status == 200
    cold.assert_is_out()
    idle.leave()
    assert server.get("/v2/overcommit/models/cold").json()["versions"][0]["success"] == 0
    busy.open()
    assert outputs(answer.result())["y"] == [7.0]
    assert outputs(first.result())["y"] == [200.0]


def test_what_a_dead_worker_had_is_answered_by_the_next_one(
    gated: Callable[[str], Gated], pool: ThreadPoolExecutor, server: Server
) -> None:
    idle, model = Idle(gated("idle")), gated("killed")
    answers = begin(model, pool, 4)
    assert model.unload().status == 200
    (worker,) = server.pids("worker")
    for mark in model.events.iterdir():
        mark.unlink()
    os.kill(worker, signal.SIGKILL)
    server.wait_until(lambda: any(model.has_begun(number) for number in range(100, 104)))
    idle.leave()
    model.open()
    assert [outputs(each.result())["y"] for each in answers] == [[2.0 * n] for n in range(100, 104)]
    model.assert_is_out()
    server.wait_until(lambda: in_flight(server) == 0)
    assert model.load().status == 200
    assert outputs(model.infer(1.0))["y"] == [2.0]


def test_over_grpc_what_was_called_is_answered_too(
    gated: Callable[[str], Gated], pool: ThreadPoolExecutor, server: Server
) -> None:
    import tritonclient.grpc as triton

    idle, model = Idle(gated("idle")), gated("called")
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:

        def call(number: float) -> float:
            tensor = triton.InferInput("x", [1, 1], "FP32")
            tensor.set_data_from_numpy(np.array([[number]], np.float32))
            return float(client.infer("called", [tensor]).as_numpy("y")[0, 0])

        answers = [pool.submit(call, 100.0)]
        server.wait_until(lambda: model.has_begun(100))
        answers += [pool.submit(call, number) for number in (101.0, 102.0)]
        model.wait_accepted(3)
        client.unload_model("called")
        with pytest.raises(triton.InferenceServerException, match="it is unloaded") as refused:
            call(103.0)
        assert refused.value.status() == "StatusCode.NOT_FOUND"
        assert not client.is_model_ready("called")
        idle.leave()
        model.open()
        assert [each.result() for each in answers] == [200.0, 202.0, 204.0]
        client.load_model("called")
        assert call(4.0) == 8.0


def test_an_ensemble_that_has_begun_goes_through_all_its_steps(
    gated: Callable[[str], Gated], pool: ThreadPoolExecutor
) -> None:
    idle, chain, step, last = Idle(gated("idle")), gated("chain"), gated("step"), gated("last")
    answer = pool.submit(chain.infer, 100.0)
    chain.server.wait_until(lambda: step.has_begun(100))
    assert chain.unload(unload_dependents=True).status == 200
    for each in (chain, step, last):
        each.assert_is_out()
    idle.leave()
    step.open()
    assert outputs(answer.result()) == {"y": [200.0]}
    assert chain.load().status == 200
    assert outputs(chain.infer(2.0)) == {"y": [4.0]}


def test_who_takes_longer_than_any_request_may_is_refused(tmp_path: Path) -> None:
    add_gated(tmp_path / "models", "stuck", tmp_path / "events")
    add_model(tmp_path / "models", "sent", ECHO, {"x": "FP32"})
    flags = ("--allow-code", "--workers", "1", "--request-timeout", "2")
    with (
        Server(tmp_path / "models", cache=tmp_path / "cache", flags=flags) as server,
        ThreadPoolExecutor(16) as pool,
    ):
        server.wait_until(lambda: all(row["state"] == "READY" for row in index(server)))
        stuck = Gated(server, "stuck", tmp_path / "events")
        sent = Gated(server, "sent", tmp_path / "events")
        try:
            values = np.ones((1, BULK_BYTES_MIN), np.float32)
            upload, rest = half_sent(server, "sent", values)
            sent.wait_accepted(1)
            answers = [pool.submit(stuck.infer, float(number)) for number in (100, 101, 102)]
            stuck.wait_accepted(4)
            for model in (stuck, sent):
                assert model.unload().status == 200
                model.assert_is_out()
            for answer in answers:
                assert answer.result().status == 504
                assert "stuck" in answer.result().json()["error"]
            server.wait_for_log("sent version 1 was unloaded, replaced or removed over 2000 ms ago")
            server.wait_for_log("stuck version 1 was unloaded, replaced or removed")
            assert stuck.load().status == 200  # its only worker is in the batch of before
            assert stuck.is_ready()
            stuck.open()
            assert outputs(stuck.infer(5.0))["y"] == [10.0]
            upload.send(rest)
            refused = Answer(upload.getresponse())
            assert refused.status == 503
            text = "model 'sent' was unloaded or replaced while requests for it waited; ask again"
            assert refused.json()["error"].startswith(text)
            upload.close()
        finally:
            stuck.open()
        server.wait_until(lambda: in_flight(server) == 0)
        assert all(not front["blocks_used"] for front in server.status()["front_ends"])
        assert sent.load().status == 200
        assert outputs(sent.infer(3.0))["y"] == [3.0]


def half_sent(
    server: Server, name: str, values: np.ndarray[Any, np.dtype[np.float32]]
) -> tuple[http.client.HTTPConnection, bytes]:
    """Send half of a long binary request; return the connection, and what is missing."""
    size = {"binary_data_size": values.nbytes}
    tensor = {"name": "x", "datatype": "FP32", "shape": list(values.shape), "parameters": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    body = head + values.tobytes()
    connection = server.connect()
    connection.putrequest("POST", f"/v2/models/{name}/infer")
    connection.putheader("Inference-Header-Content-Length", str(len(head)))
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[: len(body) // 2])
    return connection, body[len(body) // 2 :]
