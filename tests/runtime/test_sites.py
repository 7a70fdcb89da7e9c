"""The whole server with several devices: on the fake driver, and on host memory as two of them."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server

LAUNCH = (str(Path(__file__).parents[1] / "gpu_server.py"),)
IDS = [[5, 17, 3, 99], [7, 8, 9, 10]]
MODELS = 6

Want = dict[str, Any]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, bert_repository: Path) -> Path:
    root = tmp_path_factory.mktemp("repository")
    for number in range(MODELS):
        shutil.copytree(bert_repository / f"bert-{number:02}", root / f"bert-{number}")
    with (root / "bert-0/model.toml").open("a") as file:
        file.write("\npin = true\n[batching]\nmax_batch_size = 1\n")
    return root


@pytest.fixture(scope="module")
def want(repository: Path, bert_reference: Callable[[Path, list[list[int]]], Any]) -> Want:
    return {path.name: bert_reference(path, IDS) for path in sorted(repository.iterdir())}


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a file named after a device pulls it out."""
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def server(
    repository: Path, image_cache: Path, tmp_path_factory: pytest.TempPathFactory, pulled: Path
) -> Iterator[Server]:
    """Two fake GPUs."""
    values = tmp_path_factory.mktemp("nvml") / "values.json"
    values.write_text(
        json.dumps({"memory": [4 << 30, 1 << 30], "memory/1": [8 << 30, 2 << 30], "processes": []})
    )
    variables = {"FAKE_NVML": str(values), "FAKE_GPUS": "2", "FAKE_LOST": str(pulled)}
    os.environ.update(variables)  # the server's processes inherit it
    flags = ("--devices", "0,1", "--device-memory", "16MiB", "--host-memory", "32MiB")
    with Server(repository, cache=image_cache, flags=flags, serve=LAUNCH) as made:
        yield made
        assert made.stop() == 0
    for name in variables:
        del os.environ[name]


def check(server: Server, want: Want, name: str) -> None:
    rows = IDS[:1] if name == "bert-0" else IDS
    answer = server.infer(name, {"input_ids": rows, "attention_mask": [[1] * 4] * len(rows)})
    assert answer.status == 200, answer.body
    (output,) = answer.json()["outputs"]
    got = np.array(output["data"], np.float32).reshape(output["shape"])
    np.testing.assert_allclose(got, want[name][: len(rows)], atol=1e-5)


def check_all(server: Server, want: Want, rounds: int = 2) -> None:
    """Ask each model so often, one request after the other: two that wait long would be a queue."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(rounds):
            for done in [pool.submit(check, server, want, name) for name in want]:
                done.result()


def devices(server: Server) -> list[Any]:
    return list(server.status()["devices"])


def worker_of(server: Server, site: int) -> int:
    rows = server.status()["processes"]
    (pid,) = (r["pid"] for r in rows if r["kind"] == "worker" and r["site"] == site)
    return int(pid)


def test_versions_are_spread_and_each_is_loaded_on_its_own_device_only(
    server: Server, want: Want
) -> None:
    check_all(server, want)
    found = devices(server)
    assert [each["device"] for each in found] == ["0", "1"]
    assert [each["versions"] for each in found] == [MODELS // 2] * 2
    assert [each["resident"] for each in found] == [MODELS // 2] * 2
    assert sum(each["totals"]["loads_from_disk"] for each in found) == MODELS
    assert server.status()["totals"]["loads_from_disk"] == MODELS


def test_status_and_metrics_tell_devices_apart(server: Server) -> None:
    server.wait_until(lambda: all(each["gpu"] is not None for each in devices(server)))
    assert [each["gpu"]["total_bytes"] >> 30 for each in devices(server)] == [4, 8]
    text = server.get("/metrics").body.decode()
    for device in ("0", "1"):
        assert f'overcommit_device_lost{{device="{device}"}} 0.0' in text
        assert f'overcommit_device_used_bytes{{device="{device}"}}' in text
        assert f'overcommit_gpu_memory_free_bytes{{gpu="{device}"}}' in text
    assert "overcommit_replicas 0.0" in text
    assert 'overcommit_tier_capacity_bytes{tier="device"} 3.3554432e+07' in text


def test_a_worker_that_dies_costs_the_other_device_nothing(server: Server, want: Want) -> None:
    check_all(server, want, rounds=1)
    before = server.status()["totals"]["bytes_read"]
    stays, killed = worker_of(server, 0), worker_of(server, 1)
    os.kill(killed, signal.SIGKILL)
    check_all(server, want)
    assert worker_of(server, 0) == stays
    assert server.status()["totals"]["bytes_read"] == before, "weights were read again"


def test_versions_of_a_device_that_is_lost_are_served_by_the_other(
    server: Server, want: Want, pulled: Path
) -> None:
    (pulled / "1").touch()
    check_all(server, want, rounds=1)
    server.wait_until(lambda: devices(server)[1]["lost"])
    first, second = devices(server)
    assert (first["versions"], second["versions"]) == (MODELS, 0)
    server.wait_for_log("device 1 is lost")
    assert 'overcommit_device_lost{device="1"} 1.0' in server.get("/metrics").body.decode()
    (pulled / "1").unlink()
    server.wait_until(lambda: not devices(server)[1]["lost"])
    server.wait_for_log("device 1 is back")
    check_all(server, want, rounds=1)


def test_a_queue_brings_a_copy_to_the_second_device(
    repository: Path, image_cache: Path, want: Want
) -> None:
    flags = ("--devices", "cpu:2", "--device-memory", "16MiB")
    with Server(repository, cache=image_cache, flags=flags) as server:
        is_over = threading.Event()

        def ask() -> None:
            while not is_over.is_set():
                check(server, want, "bert-0")

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            asking = [pool.submit(ask) for _ in range(16)]
            try:
                server.wait_until(lambda: "overcommit_replicas 1.0" in metrics(server))
                server.wait_until(lambda: all(each["resident"] for each in devices(server)))
            finally:
                is_over.set()
            for each in asking:
                each.result()
        assert [each["device"] for each in devices(server)] == ["cpu:0", "cpu:1"]


def metrics(server: Server) -> str:
    return server.get("/metrics").body.decode()
