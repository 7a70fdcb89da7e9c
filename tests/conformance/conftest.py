"""One real server for all clients that we did not write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from model_rig import ADD, DATATYPES, ECHO, FAULTY, SLOW, add_extended_models, add_model
from serving import Server

MAX_BODY = "68MiB"
CHATTY = FAULTY.replace(
    "        if (x",
    "        import logging\n"
    '        logging.getLogger("m").debug("one says %d", x[0, 0])\n'
    "        if (x",
)
CHAIN = """
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, -1]
[[output]]
name = "y"
datatype = "FP32"
shape = [-1, -1]
[[ensemble.step]]
model = "faulty"
inputs = { x = "x" }
outputs = { y = "middle" }
[[ensemble.step]]
model = "faulty"
inputs = { x = "middle" }
outputs = { y = "y" }
"""


@pytest.fixture(scope="session")
def server(kept_folder: Callable[[str], Path]) -> Iterator[Server]:
    """The server, with every model ready."""
    root = kept_folder("models")
    for datatype in [*DATATYPES, "BYTES"]:
        add_model(root, f"echo-{datatype.lower()}", ECHO, {"x": datatype})
    add_model(root, "add", ADD, {"a": "INT32", "b": "INT32"})
    add_model(root, "slow", SLOW, {"seconds": "FP32"}, batch=1)
    add_model(root, "faulty", FAULTY, {"x": "FP32"})
    add_model(root, "loadable", FAULTY, {"x": "FP32"})
    add_model(root, "echo", FAULTY, {"x": "FP32"}, batch=64, columns=16)  # as the bench's Triton
    add_model(root, "chatty", CHATTY, {"x": "FP32"})
    (root / "chain").mkdir()
    (root / "chain" / "model.toml").write_text(CHAIN)
    flags = (
        "--allow-code",
        "--client-shared-memory",
        "--max-body",
        MAX_BODY,
        "--request-timeout",
        "30",
    )
    flags += ("--payload-memory", "192MiB")
    with Server(root, cache=kept_folder("cache"), flags=flags) as running:
        running.wait_until(
            lambda: all(row["state"] == "READY" for row in running.models().values())
        )
        yield running


@pytest.fixture(scope="session")
def extended(kept_folder: Callable[[str], Path]) -> Iterator[Server]:
    """A server with two front ends that takes clients' shared memory."""
    root = kept_folder("models")
    add_extended_models(root)
    flags = ("--allow-code", "--client-shared-memory", "--front-ends", "2")
    with Server(root, cache=kept_folder("cache"), flags=flags) as running:
        running.wait_until(
            lambda: all(row["state"] == "READY" for row in running.models().values())
        )
        yield running
