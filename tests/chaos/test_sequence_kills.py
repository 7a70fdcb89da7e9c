"""kill -9 of workers while clients are in the middle of sequences: each sum is right, or its loss is said."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from sequence_rig import add_adder, add_counter
from serving import Answer, Server

pytestmark = pytest.mark.chaos

MODELS = ("counter", "adder")
CLIENTS = 8
KILLS = 6


class Load:
    """Clients that go through sequences, each with one id and by any front end, and know their sums."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.kills_begun = self.kills_done = 0
        self.right = self.lost = 0
        self.wrong: list[object] = []
        self.stop = False

    def kill(self, choice: random.Random) -> None:
        """End a worker."""
        workers: list[int] = []
        while not workers:
            workers = self._server.pids("worker")
        self.kills_begun += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(choice.choice(workers), signal.SIGKILL)
        self.kills_done += 1

    def client(self, number: int) -> None:
        choice = random.Random(number)
        while not self.stop:
            self._sequence(MODELS[number % len(MODELS)], number + 1, choice)

    def _sequence(self, model: str, key: int, choice: random.Random) -> None:
        # Nothing that was begun after a worker's death is lost with it.
        kills, length = self.kills_done, choice.randint(2, 9)
        for at in range(length):
            answer = self._ask(model, key, start=at == 0, end=at == length - 1)
            if answer.status == 502 and self.kills_begun > kills:
                self.lost += 1
                return
            if answer.status != 200:
                self.wrong.append((model, key, at, answer.status, answer.body))
                return
            want = at + 1 + (model == "adder" and at == 0)
            if answer.json()["outputs"][0]["data"][0] != want:
                self.wrong.append((model, key, at, answer.body, want))
            self.right += 1

    def _ask(self, model: str, key: int, **ends: bool) -> Answer:
        datatype, columns = ("FP32", 2) if model == "adder" else ("INT32", 1)
        given = {"name": "x", "datatype": datatype, "shape": [1, columns], "data": [1] * columns}
        parameters: dict[str, Any] = {"sequence_id": key}
        parameters |= {f"sequence_{name}": flag for name, flag in ends.items()}
        body = {"inputs": [given], "outputs": [{"name": "y"}], "parameters": parameters}
        return self._server.post(f"/v2/models/{model}/infer", body)

    def go_on(self, answers: int = 150) -> None:
        """Wait for that many more right answers."""
        target = self.right + answers
        self._server.wait_until(lambda: self.right >= target or self.wrong)


def test_killed_workers_lose_the_sequences_that_they_had_and_no_others(tmp_path: Path) -> None:
    add_counter(tmp_path / "models", "counter")
    add_adder(tmp_path / "models", "adder")
    flags = ("--allow-code", "--front-ends", "2", "--workers", "2")
    choice = random.Random(5)
    with Server(tmp_path / "models", cache=tmp_path / "cache", flags=flags) as server:
        server.wait_until(lambda: all(row["state"] == "READY" for row in server.models().values()))
        load = Load(server)
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(load.client, number) for number in range(CLIENTS)]
            try:
                for _ in range(KILLS):
                    load.go_on()
                    load.kill(choice)
                load.go_on()
            finally:
                load.stop = True
            for each in clients:
                each.result()
        assert load.wrong == []
        assert load.lost > 0
        assert server.stop() == 0
