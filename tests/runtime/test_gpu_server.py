"""The whole server with DEVICE on the fake driver: HTTP requests, evictions, kills."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server

from overcommit.runtime.device_limits import GRAPH_AFTER

LAUNCH = (str(Path(__file__).parents[1] / "gpu_server.py"),)
IDS = [[5, 17, 3, 99], [7, 8, 9, 10]]
LARGE, SMALL = 4, 4  # models: of two chunks each, and such as share a slab

Want = dict[str, Any]


@pytest.fixture(scope="module")
def repository(
    tmp_path_factory: pytest.TempPathFactory,
    bert_repository: Path,
    make_long_bert: Callable[[Path, int], None],
) -> Path:
    """Encoders that take two chunks, and small ones."""
    root = tmp_path_factory.mktemp("repository")
    for number in range(LARGE):
        make_long_bert(root / f"large-{number}", 100 + number)
    for number in range(SMALL):
        shutil.copytree(bert_repository / f"bert-{number:02}", root / f"small-{number}")
    return root


@pytest.fixture(scope="module")
def want(repository: Path, bert_reference: Callable[[Path, list[list[int]]], Any]) -> Want:
    return {path.name: bert_reference(path, IDS) for path in sorted(repository.iterdir())}


REAL = pytest.param(
    ("-m", "overcommit", "serve"),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not os.path.exists("/dev/nvidiactl"), reason="no GPU here"),
    ],
    id="gpu",
)


@pytest.fixture(scope="module", params=[pytest.param(LAUNCH, id="fake"), REAL])
def server(
    request: pytest.FixtureRequest,
    repository: Path,
    image_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """A GPU of five chunks: one for the small models, two large ones."""
    flags = ("--devices", "0", "--device-memory", "10MiB", "--host-memory", "16MiB")
    flags += ("--workers", "2", "--drain-timeout", "5", "--host-packing", "on")
    flags += ("--verify", "always")  # by workers, where it lies in DEVICE, too
    values = tmp_path_factory.mktemp("nvml") / "values.json"
    values.write_text(
        json.dumps({"memory": [4 << 30, 1 << 30], "processes": [[1, 5 << 20]], "temperature": 40})
    )
    os.environ["FAKE_NVML"] = str(values)  # the server's processes inherit it
    with Server(repository, cache=image_cache, flags=flags, serve=request.param) as made:
        yield made
        assert made.stop() == 0
    del os.environ["FAKE_NVML"]


def check(server: Server, want: Want, name: str) -> None:
    answer = server.infer(name, {"input_ids": IDS, "attention_mask": [[1] * 4] * 2})
    assert answer.status == 200, answer.body
    (output,) = answer.json()["outputs"]
    got = np.array(output["data"], np.float32).reshape(output["shape"])
    np.testing.assert_allclose(got, want[name], atol=1e-5)


def check_all(server: Server, want: Want, rounds: int) -> None:
    """Ask every model, in another order each time, by four clients."""
    names = [name for name in want for _ in range(rounds)]
    random.Random(7).shuffle(names)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, server, want, name) for name in names]:
            done.result()


def kill_all(server: Server, kind: str) -> None:
    """Kill every process of a kind; wait until as many others serve."""
    killed = server.pids(kind)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    server.wait_until(lambda: len(set(server.pids(kind)) - set(killed)) == len(killed))


def test_right_answers_while_models_push_each_other_out(server: Server, want: Want) -> None:
    check_all(server, want, rounds=4)
    totals = server.status()["totals"]
    assert totals["evictions_device"] > LARGE
    gpu = server.status()["gpu"]
    if gpu is None or gpu["name"] == "Fake GPU":
        # Who is asked alone has batches of one shape, and a graph of it after GRAPH_AFTER of them.
        for _ in range(GRAPH_AFTER + 1):
            check(server, want, next(iter(want)))
        server.wait_for_log("fake backend: captured")
    server.wait_for_log("DEVICE is made: 5 chunks of GPU memory")


def test_status_and_metrics_tell_what_nvml_says(server: Server) -> None:
    server.wait_until(lambda: server.status()["gpu"] is not None)
    gpu = server.status()["gpu"]
    if gpu["name"] != "Fake GPU":
        assert gpu["total_bytes"] >= gpu["free_bytes"] > 0
        return
    assert (gpu["name"], gpu["free_bytes"], gpu["temperature"]) == ("Fake GPU", 3 << 30, 40)
    assert gpu["processes"] == [{"pid": 1, "kind": "", "bytes": 5 << 20}]
    assert gpu["busy_percent"] is None
    text = server.get("/metrics").body.decode()
    assert 'overcommit_gpu_memory_free_bytes{gpu="0"} 3.221225472e+09' in text
    assert 'overcommit_gpu_process_bytes{gpu="0",kind="other"}' in text
    assert "overcommit_gpu_busy_percent" not in text
    text = server.get("/metrics?names=triton").body.decode()
    assert re.search(r'^nv_gpu_memory_total_bytes\{gpu_uuid="[^"]+"\} \d+$', text, re.MULTILINE)
    assert "nv_gpu_utilization" not in text


def test_weights_outlive_the_mover_and_the_workers(server: Server, want: Want) -> None:
    check_all(server, want, rounds=1)
    read = server.status()["totals"]["bytes_read"]
    resident = [name for name, row in server.models().items() if row["tier"] == "DEVICE"]
    assert resident
    for kind in ("mover", "worker"):
        kill_all(server, kind)
        for name in resident:
            check(server, want, name.partition("/")[0])
    assert server.status()["totals"]["bytes_read"] == read, "weights were read again"


def test_no_request_is_lost_when_the_mover_dies_in_the_middle(server: Server, want: Want) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(check_all, server, want, 5)
        for _ in range(3):
            kill_all(server, "mover")
        asking.result()


def chunks_of(pid: int) -> set[int]:
    """Which of the fake's memory objects a process has a descriptor, handle or mapping of."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with contextlib.suppress(FileNotFoundError):
            if "memfd:fake-gpu" in os.readlink(path):
                found.add(os.stat(path).st_ino)
    return found


def take_memory(used_bytes: int) -> None:
    """From the next reading on NVML says that so much is used."""
    values = Path(os.environ["FAKE_NVML"])
    changed = values.with_suffix(".new")
    changed.write_text(json.dumps({"memory": [4 << 30, used_bytes]}))
    changed.rename(values)


def have_chunks(server: Server, count: int) -> bool:
    """Whether supervisor, mover and workers have so many of the GPU's chunks, the same ones."""
    pids = [server.process.pid, *server.pids("mover"), *server.pids("worker")]
    found = [chunks_of(pid) for pid in pids]
    return len(found[0]) == count and all(each == found[0] for each in found)


def test_device_gives_memory_back_when_the_gpu_runs_short(server: Server, want: Want) -> None:
    if server.status()["gpu"]["name"] != "Fake GPU":
        pytest.skip("somebody else would have to take the GPU's memory")
    check_all(server, want, rounds=1)
    take_memory((4 << 30) - (1 << 20))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(check_all, server, want, 3)
        server.wait_until(lambda: server.status()["device"]["capacity"] == 4 << 20)
        asking.result()
    server.wait_until(lambda: have_chunks(server, 2))
    for kind in ("mover", "worker"):
        kill_all(server, kind)
    check_all(server, want, rounds=1)
    server.wait_for_log("DEVICE has 2 chunks, 4.0 MiB, from now on")


def test_device_takes_the_memory_again_when_it_is_free(server: Server, want: Want) -> None:
    if server.status()["gpu"]["name"] != "Fake GPU":
        pytest.skip("somebody else would have to take the GPU's memory, and leave")
    assert server.status()["device"]["capacity"] == 4 << 20, "after the test before this one"
    workers = server.pids("worker")
    take_memory(1 << 30)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(check_all, server, want, 3)
        server.wait_until(lambda: server.status()["device"]["capacity"] == 10 << 20)
        asking.result()
    server.wait_until(lambda: have_chunks(server, 5))
    assert server.pids("worker") == workers, "who had the chunks before has the new ones too"
    check_all(server, want, rounds=1)
    server.wait_for_log("DEVICE has 5 chunks, 10.0 MiB, from now on")
    for kind in ("mover", "worker"):
        kill_all(server, kind)
    check_all(server, want, rounds=1)
