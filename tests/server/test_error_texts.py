"""What an error says is readable, however long what it speaks of is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from front_end_rig import Rig, in_loop, settled, with_app

from overcommit.runtime.config import ERROR_CHARS_MAX, RANK_MAX
from overcommit.runtime.errors import BadRequest, OvercommitError

LONG = "n" * 300_000
_X = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": LONG}, "its inputs are ['x']"),
    ({"datatype": LONG}, "it must be FP32"),
    ({"shape": [1] * 300_000}, f"has 300000 axes, the limit is {RANK_MAX}"),
    ({"shape": [1, 10**4000]}, "the sizes of a request are whole numbers from 0"),
    ({"parameters": {"shared_memory_region": LONG}, "data": None}, "shared_memory_byte_size"),
    ({"data": [LONG, 1]}, "does not fit FP32"),
    ({"parameters": {"binary_data_size": 10**4000}}, ""),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_what_a_client_sends_comes_back_shortened(change: dict[str, Any], words: str) -> None:
    tensor = {name: value for name, value in (_X | change).items() if value is not None}
    content = json.dumps({"inputs": [tensor]}).encode()

    def test() -> None:
        client = Rig().connect()
        head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
        client.send(head % len(content) + content)
        head, _, body = client.written.partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        error = json.loads(body)["error"]
        assert len(error) <= ERROR_CHARS_MAX
        assert error.startswith("model 'm': ")
        assert words in error

    in_loop(test)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "m", "input": "a", "encoding_format": LONG}),
        ("/v1/embeddings", {"model": LONG, "input": []}),
        ("/v2/overcommit/models/m/rollout", {LONG[:60_000]: 1}),
        (f"/v2/{LONG[:60_000]}", {}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_so_it_does_on_the_other_paths(path: str, body: Any) -> None:
    content = json.dumps(body).encode()

    async def test(rig: Rig) -> None:
        client = rig.connect()
        head = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
        client.send(head % (path.encode(), len(content)) + content)
        await settled()
        status, _, answer = client.written.partition(b"\r\n\r\n")
        assert status.split()[1] in (b"400", b"404")
        assert len(answer) <= ERROR_CHARS_MAX + 200

    with_app(test)


def test_a_shortened_text_keeps_its_start_and_its_end() -> None:
    text = str(BadRequest("first " + LONG + " last").message)
    assert len(text) == ERROR_CHARS_MAX
    assert text.startswith("first nnn")
    assert text.endswith("nnn last")
    again = OvercommitError("model 'm': " + text).message
    assert len(again) == ERROR_CHARS_MAX
    assert again.startswith("model 'm': first nnn")
    assert again.endswith("nnn last")
    assert again.count(" ... ") == 1
    assert BadRequest("n" * ERROR_CHARS_MAX).message == "n" * ERROR_CHARS_MAX
