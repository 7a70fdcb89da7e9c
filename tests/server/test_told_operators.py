"""What operators are told of models that cannot be where they should, and of an end that is late."""

from __future__ import annotations

import threading
from pathlib import Path

import model_rig
import torch
from safetensors.torch import save_file
from serving import Answer, Server

WIDE = """
import torch
class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(512, 1024))
    def forward(self, x):
        return {"y": x + self.table[0, 0]}
"""


def add_wide(root: Path, name: str, rows: int, toml: str = "") -> None:
    """A model of `rows` x 4 KiB."""
    model_rig.add_model(root, name, WIDE.replace("512", str(rows)), {"x": "FP32"})
    table = torch.full(
        (rows, 1024), float(len(list(root.iterdir())))
    )  # versions share what is equal
    save_file({"table": table}, root / name / "model.safetensors")
    file = root / name / "model.toml"
    file.write_text(toml + file.read_text())


def ask(server: Server, model: str, value: float = 1.0, name: str = "x") -> Answer:
    tensor = {"name": name, "datatype": "FP32", "shape": [1, 1], "data": [value]}
    return server.post(f"/v2/models/{model}/infer", {"inputs": [tensor]})


def test_models_that_never_fit_and_pins_that_find_no_room_are_in_the_log(tmp_path: Path) -> None:
    root = tmp_path / "models"
    add_wide(root, "giant", 4096)
    for number in range(3):
        add_wide(root, f"pinned-{number}", 1000, "pin = true\n")
    flags = ("--allow-code", "--device-memory", "8MiB", "--host-memory", "0")
    with Server(root, cache=tmp_path / "cache", flags=flags) as server:
        server.wait_for_log("model 'giant' needs 16.0 MiB of DEVICE memory and there are 8.0 MiB")
        server.wait_for_log("a pinned model is not in DEVICE: model 'pinned-")
        answer = ask(server, "giant")
        assert answer.status == 507
        assert "--device-memory" in answer.json()["error"]


def test_who_is_not_answered_when_the_time_to_drain_is_over_is_told_so(tmp_path: Path) -> None:
    root = tmp_path / "models"
    model_rig.add_model(root, "slow", model_rig.SLOW, {"seconds": "FP32"})
    flags = ("--allow-code", "--drain-timeout", "1")
    with Server(root, cache=tmp_path / "cache", flags=flags) as server:
        assert ask(server, "slow", 0.0, "seconds").status == 200
        answers: list[Answer] = []
        client = threading.Thread(
            target=lambda: answers.append(ask(server, "slow", 30.0, "seconds"))
        )
        client.start()
        server.wait_until(lambda: server.status()["front_ends"][0]["blocks_used"])
        assert server.stop() == 0
        client.join()
        assert answers[0].status == 503
        assert "the server is stopping" in answers[0].json()["error"]
        assert any(" front_end 0 ended: exit status 0" in line for line in server.log)
