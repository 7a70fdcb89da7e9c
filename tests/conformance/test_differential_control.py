"""Loads and unloads while the repository changes: what clients see is what Triton's see, or is listed here.

Triton's answers are a recording (`record_triton.py` makes it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from differential_control import OUR_CODE, World
from serving import Server

RECORDING = Path(__file__).with_name("triton_control.json")

DIFFERENCES: dict[str, Any] = {
    # What does not exist is 404 wherever it is named.
    "7 load nope": {"status": 404},
    "21 load new": {"status": 404},
    # Who loads a model by name keeps it, also where an ensemble had brought it along before.
    "49 ready plain": ["plain", "first"],
}


@pytest.fixture(scope="module")
def triton() -> dict[str, Any]:
    answers: dict[str, Any] = json.loads(RECORDING.read_text())["answers"]
    return answers


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    world = World(root, OUR_CODE, "allow_code = true\n")
    flags = ("--allow-code", "--scan-interval", "3600", "--front-ends", "1", "--workers", "1")
    with Server(root, cache=tmp_path_factory.mktemp("cache"), flags=flags) as server:
        server.wait_until(lambda: all(row["state"] == "READY" for row in server.models().values()))
        return world.ask_all(server.port)


def test_each_step_is_as_tritons(triton: dict[str, Any], ours: dict[str, Any]) -> None:
    assert list(ours) == list(triton), "record it again"
    assert ours == triton | DIFFERENCES


def test_every_difference_is_still_one(triton: dict[str, Any]) -> None:
    assert [step for step, answer in DIFFERENCES.items() if triton[step] == answer] == []
