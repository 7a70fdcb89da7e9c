"""Bodies on the way through the app: none over its limit, all together within theirs."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from front_end_rig import Client, Rig, settled, with_app

from overcommit.runtime.config import MIB
from overcommit.server import body_budget, failures
from overcommit.server.limits import BODY_TIMEOUT_S, SMALL_BODY_BYTES

LONG = ("/v1/embeddings", "/v2/repository/models/m/load")
PLAIN = (
    *("/v2/logging", "/v2/trace/setting", "/v2/models/m/trace/setting", "/v2/repository/index"),
    *("/v2/repository/models/m/unload", "/v2/overcommit/models/m/rollout"),
    *("/v2/systemsharedmemory/region/r/register", "/v2/cudasharedmemory/region/r/register"),
)
MAX_BODY = 4 * MIB
PIECE = b" " * SMALL_BODY_BYTES


def running(test: Callable[[Rig], Awaitable[None]]) -> None:
    """Run a test with the app behind real connections."""
    with_app(test, body_bytes_max=MAX_BODY)


async def begin(rig: Rig, path: str, line: bytes) -> Client:
    client = rig.connect()
    client.send(b"POST %b HTTP/1.1\r\nHost: h\r\n%b\r\n\r\n" % (path.encode(), line))
    await settled()
    return client


async def send(client: Client, nbytes: int, *, chunked: bool = False) -> None:
    """Send this many bytes of a body, as long as no answer came."""
    for _ in range(nbytes // len(PIECE)):
        if client.written:
            return
        client.send(b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if chunked else PIECE)
        await settled()


def refusal(client: Client) -> tuple[int, bytes, str]:
    """Status, head and text of the one answer that came."""
    head, _, body = client.written.partition(b"\r\n\r\n")
    error: Any = json.loads(body)["error"]
    return int(head.split()[1]), head, error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize("path", [*LONG, *PLAIN])
def test_no_more_of_a_body_without_a_length_is_read_than_its_path_takes(path: str) -> None:
    limit = MAX_BODY if path in LONG else SMALL_BODY_BYTES

    async def test(rig: Rig) -> None:
        client = await begin(rig, path, b"Transfer-Encoding: chunked")
        await send(client, limit, chunked=True)
        assert not client.written, "this much is taken"
        assert rig.bodies_bytes == (limit if path in LONG else 0)
        await send(client, len(PIECE), chunked=True)
        status, _, text = refusal(client)
        assert (status, f"over {limit} bytes" in text) == (413, True)
        assert ("--max-body" in text) == (path in LONG)
        await settled()
        assert rig.bodies_bytes == 0
        # What still comes of it is thrown away, and the next request is answered.
        before = len(client.written)
        client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(PIECE), PIECE))
        client.send(b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n")
        await settled()
        assert client.written[before:].startswith(b"HTTP/1.1 200 OK")

    running(test)


@pytest.mark.parametrize("path", PLAIN)
def test_a_body_that_says_it_is_too_long_is_not_waited_for(path: str) -> None:
    async def test(rig: Rig) -> None:
        length = b"Content-Length: %d\r\nExpect: 100-continue" % (SMALL_BODY_BYTES + 1)
        assert refusal(await begin(rig, path, length))[0] == 413

    running(test)


def test_all_bodies_together_are_within_the_budget_until_they_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for room in (body_budget, failures):  # what counts, and what says so
        monkeypatch.setattr(room, "BODIES_BYTES_MAX", MAX_BODY)

    async def test(rig: Rig) -> None:
        stalled = []
        for path in LONG:
            stalled.append(await begin(rig, path, b"Content-Length: %d" % MAX_BODY))
            await send(stalled[-1], MAX_BODY // 2)
        assert rig.bodies_bytes == MAX_BODY
        late = await begin(rig, "/v1/embeddings", b"Content-Length: %d" % MAX_BODY)
        await send(late, MAX_BODY)
        status, head, text = refusal(late)
        assert (status, b"retry-after: 1" in head) == (503, True)
        assert f"over {MAX_BODY} bytes" in text
        assert rig.bodies_bytes == MAX_BODY, "what was refused is not held"
        stalled[0].lose()
        await settled()
        assert rig.bodies_bytes == MAX_BODY // 2
        again = await begin(rig, "/v1/embeddings", b"Content-Length: %d" % MAX_BODY)
        await send(again, MAX_BODY // 4)
        assert not again.written
        stalled[1].lose()
        again.lose()

    running(test)


@pytest.mark.parametrize("path", [LONG[0], PLAIN[0]])
def test_a_client_that_leaves_in_the_middle_of_a_body_is_nobodys_error(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(rig: Rig) -> None:
        client = await begin(rig, path, b"Content-Length: %d" % len(PIECE))
        client.send(PIECE[:-1])
        await settled()
        client.lose()
        await settled()

    with caplog.at_level(logging.INFO):
        running(test)
    assert not caplog.records


def test_a_body_that_goes_on_after_its_answer_gets_no_second_one() -> None:
    async def test(rig: Rig) -> None:
        client = await begin(rig, "/nothing", b"Transfer-Encoding: chunked")
        assert refusal(client)[0] == 404
        client.protocol.check_times(rig.clock_s + BODY_TIMEOUT_S + 1)
        assert client.transport.is_closed
        assert client.written.count(b"HTTP/1.1") == 1

    running(test)
