"""One model that hangs among others, in a server with two workers: the other worker answers the others."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

from serving import Answer, Server

MODELS = 8

# Both answer with the process that ran them.
WHO = """
import os
import numpy as np

class Who:
    def load(self, folder, parameters):
        pass

    def infer(self, inputs):
        return {"pid": np.full((len(inputs["x"]), 1), os.getpid(), np.int64)}
"""
# It hangs over a request for FOREVER: whoever makes its image tries others.
FOREVER = 7
HANG = """
import os
import time
import numpy as np

class Hang:
    def load(self, folder, parameters):
        self.event = parameters["event"]

    def infer(self, inputs):
        with open(self.event + ".began", "a") as file:
            file.write(f"{os.getpid()}\\n")
        while inputs["x"].max() == 7 and not os.path.exists(self.event):
            time.sleep(0.01)
        return {"pid": np.full((len(inputs["x"]), 1), os.getpid(), np.int64)}
"""
TOML = """
engine = "python"
allow_code = true
[batching]
max_batch_size = 1
[[input]]
name = "x"
datatype = "INT64"
shape = [-1, 1]
[[output]]
name = "pid"
datatype = "INT64"
shape = [-1, 1]
[python]
process = false
"""


def add(root: Path, name: str, code: str, more: str = "") -> None:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(code)
    (folder / "model.toml").write_text(TOML + more)


def pid_of(answer: Answer) -> int:
    """The worker that answered."""
    assert answer.status == 200, answer.body
    pid: int = answer.json()["outputs"][0]["data"][0]
    return pid


def test_a_model_that_hangs_holds_up_no_other_and_its_worker_comes_back(tmp_path: Path) -> None:
    root, event = tmp_path / "models", tmp_path / "event"
    began = Path(f"{event}.began")
    names = [f"who-{number}" for number in range(MODELS)]
    for name in names:
        add(root, name, WHO)
    add(root, "hang", HANG, f'[parameters]\nevent = "{event}"\n')
    flags = ("--allow-code", "--workers", "2", "--front-ends", "1")

    def ask(name: str, value: int = 1) -> Answer:
        return server.infer(name, {"x": [[value]]})

    def ask_all(pool: concurrent.futures.Executor) -> dict[str, int]:
        return dict(zip(names, map(pid_of, pool.map(ask, names)), strict=True))

    def occupied() -> list[Any]:
        rows: list[Any] = server.status()["occupied"]
        return [row for row in rows if row["model"] == "hang"]

    with (
        Server(root, cache=tmp_path / "cache", flags=flags) as server,
        concurrent.futures.ThreadPoolExecutor(MODELS + 4) as pool,
    ):
        server.wait_until(lambda: all(r["state"] == "READY" for r in server.models().values()))
        server.wait_until(lambda: len(server.pids("worker")) == 2)
        both = set(server.pids("worker"))
        # A machine that is slow may find a first bind unusually long.
        server.wait_until(lambda: set(ask_all(pool).values()) == both)
        assert ask("hang", 0).status == 200
        began.unlink()  # it was asked before, also by who made its image
        # What is sent in the batch's first second does not know yet that it is a long one.
        waiting = [pool.submit(ask, "hang", FOREVER)]
        server.wait_until(lambda: began.exists() and began.read_text().endswith("\n"))
        hanging = int(began.read_text())
        assert hanging not in ask_all(pool).values()

        server.wait_until(occupied)
        (row,) = occupied()
        assert row["version"] == "1"
        assert row["seconds"] > 0
        assert server.pids("worker")[row["worker"]] == hanging
        label = f'model="hang",version="1",worker="{row["worker"]}"'
        for path in ("/metrics", "/metrics?model=hang"):
            metrics = server.get(path).body.decode()
            assert f"overcommit_worker_occupied_seconds{{{label}}}" in metrics
        said = f"worker {row['worker']} is in a batch of it"
        index = server.post("/v2/repository/index", {}).json()
        for rows in (index, list(server.models().values())):
            assert [each["name"] for each in rows if said in each.get("reason", "")] == ["hang"]
        assert server.get("/v2/health/ready").status == 200

        # Its own requests wait where it is: they would hang the other worker too.
        waiting += [pool.submit(ask, "hang", FOREVER) for _ in range(3)]
        for _ in range(3):
            assert hanging not in ask_all(pool).values()
        assert began.read_text().split() == [str(hanging)]

        event.touch()
        assert {pid_of(each.result()) for each in waiting} == {hanging}
        server.wait_until(lambda: not occupied() and hanging in ask_all(pool).values())
        assert not server.models()["hang/1"]["reason"]
        assert "overcommit_worker_occupied_seconds{" not in server.get("/metrics").body.decode()
