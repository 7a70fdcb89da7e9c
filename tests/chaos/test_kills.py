"""kill -9 of workers, the mover, a front end and the fork server while requests are in flight."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server

pytestmark = pytest.mark.chaos

IDS = [[5, 17, 3, 99], [7, 8, 9, 10]]
MODELS = 6
CLIENTS = 8


@dataclass
class Tally:
    """What the clients saw."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    broken_connections: int = 0
    worker_lost: int = 0


class Load:
    """Clients that ask seeded models in a loop and compare every answer."""

    def __init__(self, server: Server, want: dict[str, Any]) -> None:
        self.server, self.want = server, want
        self.stop = False
        self.tallies = [Tally() for _ in range(CLIENTS)]
        tensors = [
            {"name": name, "datatype": "INT64", "shape": [2, 4], "data": data}
            for name, data in (("input_ids", [*IDS[0], *IDS[1]]), ("attention_mask", [1] * 8))
        ]
        self.body = json.dumps({"inputs": tensors})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._client, number) for number in range(CLIENTS)]
            try:
                yield
            finally:
                self.stop = True
            for client in clients:
                client.result()

    def _client(self, number: int) -> None:
        choice, tally = random.Random(number), self.tallies[number]
        connection: http.client.HTTPConnection | None = None
        while not self.stop:
            name = choice.choice(sorted(self.want))
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(
                        "127.0.0.1", self.server.port, timeout=60
                    )
                connection.request("POST", f"/v2/models/{name}/infer", self.body)
                response = connection.getresponse()
                data = response.read()
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, TimeoutError):
                    tally.wrong.append("no answer in 60 s")
                tally.broken_connections += 1
                if connection is not None:
                    connection.close()
                connection = None
                continue
            self._judge(tally, name, response.status, data)
        if connection is not None:
            connection.close()

    def _judge(self, tally: Tally, name: str, status: int, data: bytes) -> None:
        if status == 502:
            tally.worker_lost += 1
        elif status != 200:
            tally.wrong.append(f"{status} {data[:200]!r}")
        else:
            output = json.loads(data)["outputs"][0]
            got = np.array(output["data"], np.float32).reshape(output["shape"])
            if np.abs(got - self.want[name]).max() > 1e-4:
                tally.wrong.append(f"another model's answer for {name}")
            tally.right += 1

    def right(self) -> int:
        return sum(tally.right for tally in self.tallies)

    def wrong(self) -> list[str]:
        return [text for tally in self.tallies for text in tally.wrong]

    def broken_connections(self) -> int:
        return sum(tally.broken_connections for tally in self.tallies)

    def go_on(self, answers: int = 40) -> None:
        """Wait for that many more right answers: the service is back."""
        target = self.right() + answers
        self.server.wait_until(lambda: self.right() >= target or self.wrong())


@pytest.fixture(scope="module")
def want(bert_repository: Path, bert_reference: Callable[..., Any]) -> dict[str, Any]:
    names = [f"bert-{number:02}" for number in range(MODELS)]
    return {name: bert_reference(bert_repository / name, IDS) for name in names}


@pytest.fixture(scope="module")
def server(bert_repository: Path, image_cache: Path) -> Iterator[Server]:
    """One server for all of them: what was killed in one test has come back for the next."""
    flags = ("--workers", "2", "--front-ends", "2")
    with Server(bert_repository, cache=image_cache, flags=flags) as running:
        for number in range(MODELS):
            running.infer(f"bert-{number:02}", {"input_ids": IDS, "attention_mask": [[1] * 4] * 2})
        yield running
        assert running.stop() == 0


def kill_one(server: Server, kind: str, choice: random.Random) -> None:
    pids = server.pids(kind)
    if pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(choice.choice(pids), signal.SIGKILL)


def settled(server: Server) -> Any:
    """Status when nothing is in flight any more, as both front ends have reported it."""

    def quiet() -> bool:
        fronts = server.status()["front_ends"]
        return len(fronts) == 2 and all(not f["in_flight"] and not f["blocks_used"] for f in fronts)

    server.wait_until(quiet)
    return server.status()


def test_killed_workers_lose_no_request_and_no_weight(server: Server, want: dict[str, Any]) -> None:
    load, choice = Load(server, want), random.Random(1)
    with load.running():
        load.go_on()
        # Both workers know every model by now or map it without reading: no disk from here on.
        before = server.status()["totals"]["bytes_read"]
        for _ in range(8):
            kill_one(server, "worker", choice)
            load.go_on()
    assert load.wrong() == []
    assert load.broken_connections() == 0
    assert sum(tally.worker_lost for tally in load.tallies) <= 8 * CLIENTS
    after = settled(server)
    assert after["totals"]["bytes_read"] == before


def test_a_killed_mover_is_replaced_and_loads_go_on(
    server: Server, bert_repository: Path, want: dict[str, Any]
) -> None:
    load, choice = Load(server, want), random.Random(2)
    with load.running():
        for number in range(MODELS, 12):
            kill_one(server, "mover", choice)
            rows = {"input_ids": IDS, "attention_mask": [[1] * 4] * 2}
            assert server.infer(f"bert-{number:02}", rows).status == 200
    assert load.wrong() == []
    assert load.broken_connections() == 0


def test_a_killed_front_end_costs_its_connections_and_nothing_else(
    server: Server, want: dict[str, Any]
) -> None:
    load, choice = Load(server, want), random.Random(3)
    with load.running():
        load.go_on()
        for _ in range(4):
            kill_one(server, "front_end", choice)
            load.go_on()
            server.wait_until(lambda: len(server.pids("front_end")) == 2)
    assert load.wrong() == []
    assert 0 < load.broken_connections() <= 4 * CLIENTS * 2
    settled(server)


def test_everything_is_killed_at_random_and_nothing_leaks(
    server: Server, want: dict[str, Any]
) -> None:
    load, choice = Load(server, want), random.Random(4)
    supervisor = server.process.pid

    def fds() -> int:
        return len(os.listdir(f"/proc/{supervisor}/fd"))

    settled(server)
    baseline, used = fds(), server.status()["device"]["used"]
    with load.running():
        end = time.monotonic() + 6
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                kill_one(server, choice.choice(["worker", "worker", "mover", "front_end"]), choice)
            time.sleep(choice.uniform(0.05, 0.4))
        load.go_on()
    assert load.wrong() == []
    server.wait_until(lambda: len(server.pids("worker")) == 2)
    status = settled(server)
    assert status["device"]["used"] == used
    server.wait_until(lambda: fds() <= baseline)


def test_a_supervisor_without_descriptors_for_a_start_lives_on_and_starts_when_it_has_some(
    server: Server, want: dict[str, Any]
) -> None:
    load, supervisor = Load(server, want), server.process.pid
    limits = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
    victims = [server.pids("front_end")[0], server.pids("worker")[0]]
    with load.running():
        load.go_on()
        try:
            resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (3, limits[1]))
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            for kind in ("front_end", "worker"):
                server.wait_for_log(f"failed: the start of a {kind}")
        finally:
            resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limits)
        server.wait_until(lambda: len(server.pids("front_end")) == 2)
        server.wait_until(lambda: len(server.pids("worker")) == 2)
        load.go_on()
    assert load.wrong() == []
    failures = server.status()["failures"]
    assert {"the start of a front_end", "the start of a worker"} <= {
        failure["what"] for failure in failures if "Too many open files" in failure["message"]
    }


def test_a_killed_fork_server_takes_its_workers_along_and_all_come_back(
    server: Server, want: dict[str, Any]
) -> None:
    load = Load(server, want)
    workers = server.pids("worker")
    parents = {
        int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in workers
    }
    assert len(parents) == 1
    with load.running():
        load.go_on()
        os.kill(parents.pop(), signal.SIGKILL)
        server.wait_until(
            lambda: (
                len(server.pids("worker")) == 2 and not set(server.pids("worker")) & set(workers)
            )
        )
        load.go_on()
    assert load.wrong() == []
