"""What we answer to requests of sequences, and what Triton 2.51 did (`record_triton.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from differential_sequences import ASKS, OUR_CODE, ask_all, write_models
from serving import Server

RECORDING = Path(__file__).with_name("triton_sequences.json")
Answers = dict[str, dict[str, Any]]
# What we answer otherwise: our status.
CHOSEN = {
    # The client is wrong, not the server.
    "a text that is too long": 400,
    "an id that is no whole number": 400,
    "a negative id": 400,
    "a flag that is none": 400,
    # Triton tells the model 0, for every text: all these sequences are one to it.
    "a text for a number": 400,
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Answers]:
    root = tmp_path_factory.mktemp("models")
    write_models(root, OUR_CODE, "allow_code = true\n")
    cache = tmp_path_factory.mktemp("cache")
    with Server(root, cache=cache, flags=("--allow-code",)) as server:
        server.wait_until(lambda: all(row["state"] == "READY" for row in server.models().values()))
        ours = ask_all(server.port)
    return ours, json.loads(RECORDING.read_text())["answers"]


@pytest.mark.parametrize("name", [ask[0] for ask in ASKS if ask != "-"])
def test_we_answer_as_triton_does(answers: tuple[Answers, Answers], name: str) -> None:
    ours, theirs = (each[name] for each in answers)
    if name in CHOSEN:
        assert ours["status"] == CHOSEN[name] != theirs["status"]
        return
    assert ours["status"] == theirs["status"]
    assert ours.get("data") == theirs.get("data")
    if theirs["error"] is not None:
        assert theirs["error"] in ours["error"]
