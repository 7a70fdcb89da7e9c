"""Requests that cannot be answered in time, over HTTP: refused at once, with a true Retry-After."""

from __future__ import annotations

import concurrent.futures
import math
import re
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pytest
from safetensors.numpy import save_file
from serving import WATCHDOG_S, Answer, Server

from overcommit.bench.models_repo import make_tables

ROWS: Final = 3_000_000  # 192 MB: a load takes long beside what is done with it
SLOW: Final = """\
import time
import torch
from torch import nn


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        if x.device.type != "meta":
            time.sleep(0.1)
        return {"y": x * self.scale}
"""
SLOW_TOML: Final = """\
engine = "torch"
allow_code = true
[batching]
max_batch_size = 0
[[input]]
name = "x"
datatype = "FP32"
shape = [4]
[[output]]
name = "y"
datatype = "FP32"
shape = [4]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("admission")
    make_tables(root / "models", 2, rows=ROWS)
    slow = root / "models" / "slow"
    slow.mkdir()
    (slow / "model.py").write_text(SLOW)
    (slow / "model.toml").write_text(SLOW_TOML)
    save_file({"scale": np.array([2.0], np.float32)}, slow / "model.safetensors")
    flags = ("--allow-code", "--device-memory", "224MiB", "--host-memory", "512MiB")
    with Server(root / "models", cache=root / "cache", flags=flags) as running:
        names = ("slow/1", f"table-{ROWS}-0000/1", f"table-{ROWS}-0001/1")
        running.wait_until(
            lambda: all(running.models().get(n, {}).get("state") == "READY" for n in names)
        )
        yield running


def infer(server: Server, model: str, shape: list[int], timeout_us: int | None = None) -> Answer:
    tensor = {"name": "x", "datatype": "FP32", "shape": shape, "data": [1.0] * math.prod(shape)}
    body: dict[str, Any] = {"inputs": [tensor]}
    if timeout_us is not None:
        body["parameters"] = {"timeout": timeout_us}
    return server.post(f"/v2/models/{model}/infer", body)


def check_refusal(answer: Answer, model: str, remedy: str) -> float:
    """Check what is said to one that was refused; return the seconds to wait."""
    assert answer.status == 503
    text = answer.json()["error"]
    assert text.startswith(f"model '{model}'"), text
    assert remedy in text
    wait_ms = int(answer.headers["retry-after-ms"])
    assert int(answer.headers["retry-after"]) == math.ceil(wait_ms / 1000)
    found = re.search(r"try again in (\d+) ms", text) or re.search(r"in (\d+) ms", text)
    assert found is not None
    assert int(found[1]) == wait_ms
    return wait_ms / 1000


def test_of_too_many_requests_for_one_model_some_are_refused_and_served_when_they_come_back(
    server: Server,
) -> None:
    for _ in range(4):  # so that it is known how long the model takes
        assert infer(server, "slow", [4]).status == 200

    def ask(_: int) -> list[Answer]:
        answers = [infer(server, "slow", [4], timeout_us=1_000_000)]
        while answers[-1].status == 503 and len(answers) < 10:
            time.sleep(check_refusal(answers[-1], "slow", "give it a longer timeout"))
            answers.append(infer(server, "slow", [4], timeout_us=1_000_000))
        return answers

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        asked = list(pool.map(ask, range(24)))
    assert any(len(answers) > 1 for answers in asked), "nobody was refused"
    assert all(answers[-1].status in (200, 504) for answers in asked)
    # 504: the machine stood still for longer than the request had; that is not the rule.
    assert sum(answers[-1].status == 200 for answers in asked) > len(asked) // 2


def test_a_request_that_cannot_wait_for_its_weights_is_refused_and_served_later(
    server: Server,
) -> None:
    models = [f"table-{ROWS}-{number:04}" for number in range(2)]
    for model in models * 2:  # once from disk, and from then on from the host tier
        assert infer(server, model, [1, 16]).status == 200
    loads = [row["total_ns"] for row in server.status()["activations"] if row["source"] == "host"]
    half_us = max(1, min(loads) // 2000)
    refused = 0
    for number in range(40):
        model = models[number % 2]
        # Less than a load takes, and enough to hear that.
        answer = infer(server, model, [1, 16], timeout_us=half_us)
        if answer.status == 503:
            time.sleep(check_refusal(answer, model, "raise --device-memory"))
            refused += 1
        assert infer(server, model, [1, 16]).status == 200
    assert refused, "no load was foreseen"


def test_without_a_short_timeout_nobody_is_refused(server: Server) -> None:
    models = [f"table-{ROWS}-{number:04}" for number in range(2)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: infer(server, models[n % 2], [1, 16]), range(40)))
    assert {answer.status for answer in answers} == {200}


def test_thrashing_is_reported_and_the_server_stays_ready(server: Server) -> None:
    status = server.status()["thrashing"]
    assert status["memory_bytes"] == server.status()["device"]["capacity"]
    assert not status["active"]
    metrics = server.get("/metrics").body.decode()
    for name in ("thrashing", "working_set_bytes", "loads_per_second", "stay_seconds"):
        assert re.search(rf"^overcommit_{name} ", metrics, re.MULTILINE), name
    stop = time.monotonic() + WATCHDOG_S

    def ask(number: int) -> None:
        while time.monotonic() < stop and not server.get("/v2/health/ready").json().get(
            "thrashing"
        ):
            infer(server, f"table-{ROWS}-{number:04}", [1, 16])

    # Two models of which one fits, each asked by a client of its own.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, range(2)))
    ready = server.get("/v2/health/ready")
    assert ready.status == 200
    assert "raise --device-memory" in ready.json()["thrashing"]
    found = server.status()["thrashing"]
    assert found["active"]
    assert found["working_set_bytes"] > found["memory_bytes"]
    assert found["stay_ms"] > 0
    server.wait_for_log("thrashing: the models in use need")
    # It ends by itself when nobody asks any more.
    server.wait_until(lambda: "thrashing" not in server.get("/v2/health/ready").json())
