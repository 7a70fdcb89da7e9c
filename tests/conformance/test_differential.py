"""The same requests to Triton and to us: same status, same keys, same tensors, or a difference on purpose.

Triton's answers are a recording (`record_triton.py` makes it); the README has the reasons of what is in
DIFFERENCES, EXTRA and MISSING.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from differential import ASKS, ask_all
from serving import Server

Answers = dict[str, dict[str, Any]]
RECORDING = Path(__file__).with_name("triton_answers.json")

# Where our status is another than Triton's: ours.
DIFFERENCES = {
    # A client's mistake is no failure of the server: 400 rather than 500.
    "too few values": 400,
    "no inputs": 400,
    "no JSON": 400,
    "a key that is not there": 400,
    "a region too small for the output": 400,
    "a wrong log setting": 400,
    "load, no JSON": 400,
    # It says what is wrong rather than that there is no such path.
    "a version that is no number": 400,
    # What does not exist is 404 wherever it is named.
    "load unknown": 404,
    # A setting that the operator alone makes: the request is wrong, the server is not.
    "a log file": 400,
    "a trace file": 400,
    # Not allowed, not offered.
    "a load that brings a configuration": 403,  # without --load-overrides
    "generate": 501,
    # One model of thousands that is unloaded does not take the box out of service.
    "server ready when one is unloaded": 200,
}
# Keys that we have and Triton has not, by what they begin with.
_CONFIGS = ("config", "version config", "config with labels")
EXTRA = {
    "live": (".live",),  # KServe's client reads bodies of health
    "ready": (".ready",),
    "server ready when one is unloaded": (".ready",),
    "model ready": (".name", ".ready"),
    "version ready": (".name", ".ready"),
    # An output that says nothing of its own is as the request says for all, as the protocol has it.
    "all outputs binary but one": (".outputs[].parameters",),
    "generate": (".error",),
} | dict.fromkeys(_CONFIGS, (".version_policy.all", ".dynamic_batching.default_queue_policy"))
# Keys that Triton has and we have not.
MISSING = {
    "generate": (".model_name", ".model_version", ".y"),
    # All versions of a model serve, not the newest alone.
} | dict.fromkeys(_CONFIGS, (".version_policy.latest",))
# Tensors that are not in the form in which Triton sends them.
TENSORS = {"all outputs binary but one"}


@pytest.fixture(scope="module")
def triton() -> Answers:
    answers: Answers = json.loads(RECORDING.read_text())["answers"]
    return answers


@pytest.fixture(scope="module")
def ours(extended: Server) -> Answers:
    answers: Answers = json.loads(json.dumps(ask_all(extended.port)))
    return answers


def test_the_recording_is_of_these_requests(triton: Answers) -> None:
    assert [ask.name for ask in ASKS] == list(triton)
    chosen = DIFFERENCES.keys() | EXTRA.keys() | MISSING.keys() | TENSORS
    assert chosen <= triton.keys()


@pytest.mark.parametrize("name", [ask.name for ask in ASKS])
def test_an_answer_is_as_tritons(name: str, triton: Answers, ours: Answers) -> None:
    theirs, mine = triton[name], ours[name]
    assert mine["status"] == DIFFERENCES.get(name, theirs["status"])
    missing = set(theirs["keys"]) - set(mine["keys"])
    extra = set(mine["keys"]) - set(theirs["keys"])
    assert {key for key in missing if not key.startswith(MISSING.get(name, ("?",)))} == set()
    assert {key for key in extra if not key.startswith(EXTRA.get(name, ("?",)))} == set()
    assert mine.get("id") == theirs.get("id")
    if name not in TENSORS:
        assert mine.get("tensors") == theirs.get("tensors")


def test_every_difference_is_still_one(triton: Answers, ours: Answers) -> None:
    for name, status in DIFFERENCES.items():
        assert triton[name]["status"] != status, name
    for name in EXTRA:
        assert set(ours[name]["keys"]) - set(triton[name]["keys"]), name
    for name in MISSING:
        assert set(triton[name]["keys"]) - set(ours[name]["keys"]), name
    for name in TENSORS:
        assert triton[name].get("tensors") != ours[name].get("tensors"), name
