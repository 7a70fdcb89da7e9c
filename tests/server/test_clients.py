"""The Python clients: what they convert, what they refuse, and calls to a real server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from serving import Server

import overcommit
from overcommit.runtime.errors import BadRequest, DeadlineExceeded, NotFound, Unavailable
from overcommit.server.clients.exchange import Received, ServerError, infer_result
from overcommit.server.clients.tensors import NUMPY_TYPES, datatype_of, from_wire, to_wire

IDS = [[5, 17, 3], [7, 8, 9]]
MASK = [[1, 1, 1], [1, 1, 1]]


CUT_OFF = (
    b'{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[1],'
    b'"parameters":{"binary_data_size":4}}]}'
)


# --- tensors --------------------------------------------------------------------------------------
@given(st.data(), st.sampled_from(sorted(NUMPY_TYPES)))
def test_arrays_come_back_as_they_went(data: st.DataObject, datatype: str) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    array = data.draw(hnp.arrays(NUMPY_TYPES[datatype], shape))
    assert datatype_of("x", array) == datatype
    sent_shape, sent = to_wire("x", array, datatype)
    found = from_wire(datatype, sent_shape, sent)
    assert found.dtype == array.dtype
    assert found.flags.writeable
    np.testing.assert_array_equal(found, array)


@given(hnp.arrays(object, (2, 2), elements=st.binary(max_size=9)))
def test_bytes_come_back_as_they_went(array: np.ndarray[Any, Any]) -> None:
    found = from_wire("BYTES", *to_wire("x", array, "BYTES"))
    assert found.tolist() == array.tolist()


@given(st.floats(width=32, allow_nan=False))
def test_bf16_is_rounded_to_the_nearest(value: float) -> None:
    found = float(from_wire("BF16", *to_wire("x", [value], "BF16"))[0])
    steps = np.array([value], np.float32).view(np.uint32)
    below, above = (((steps >> 16) + up << 16).view(np.float32)[0] for up in (0, 1))
    if np.isfinite(above):
        exact = float(np.float32(value))
        assert abs(found - exact) <= min(abs(float(below) - exact), abs(float(above) - exact))
    assert np.isnan(from_wire("BF16", *to_wire("x", [np.nan], "BF16"))[0])


@pytest.mark.parametrize(
    ("value", "datatype", "says"),
    [
        ([1.5], "INT64", "float64, the model takes INT64"),
        ([300], "UINT8", "holds 300 to 300"),
        ([-1], "UINT64", "holds -1"),
        (["a"], "FP32", "the model takes FP32"),
        ([1], "BYTES", "holds int"),
        ([1j], "FP32", "complex128"),
        (["a"], "BF16", "the model takes BF16"),
    ],
)
def test_what_would_change_its_meaning_is_refused(value: Any, datatype: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"input 'x'.*{says}"):
        to_wire("x", value, datatype)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"<html>"),
        ({}, b'{"outputs": 1, "model_name": "m"}'),
        ({"inference-header-content-length": "x"}, b"{}"),
        ({}, CUT_OFF),
        (
            {},
            b'{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[3],"data":[1]}]}',
        ),
        ({}, b'{"model_name":"m","outputs":[{"name":"y","datatype":"NO","shape":[1],"data":[1]}]}'),
    ],
)
def test_nonsense_is_said_to_be_nonsense(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(ServerError, match="not a V2 inference response"):
        infer_result(Received(200, headers, body))


# --- a real server --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server(bert_repository: Path, image_cache: Path) -> Iterator[Server]:
    with Server(bert_repository, cache=image_cache) as running:
        yield running


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def test_lists_become_what_the_model_takes(
    server: Server, bert_repository: Path, bert_reference: Callable[..., Any]
) -> None:
    expected = bert_reference(bert_repository / "bert-00", IDS)
    with overcommit.Client(url(server)) as client:
        assert client.is_ready()
        result = client.infer(
            "bert-00",
            # Fewer bits, the other order of bytes: the model takes INT64.
            {"input_ids": np.array(IDS, ">i4"), "attention_mask": MASK},
            version="1",
            outputs=["last_hidden_state"],
            id="mine",
        )
        assert (result.model, result.version, result.id) == ("bert-00", "1", "mine")
        np.testing.assert_allclose(result["last_hidden_state"], expected, atol=1e-5)
        result["last_hidden_state"][:] = 0  # it is the caller's own
        assert client.is_ready("bert-00", version="1")


def test_threads_share_a_client(server: Server) -> None:
    with overcommit.Client(url(server)) as client:

        def ask(number: int) -> str:
            name = f"bert-{number % 4:02}"
            return client.infer(name, {"input_ids": IDS, "attention_mask": MASK}).model

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(64))) == [f"bert-{n % 4:02}" for n in range(64)]


def test_errors_are_the_servers_own(server: Server) -> None:
    with overcommit.Client(url(server)) as client:
        with pytest.raises(NotFound, match="'no body'"):
            client.infer("no body", {"x": [1]})
        with pytest.raises(BadRequest, match="'nope'"):
            client.infer("bert-00", {"nope": [[1]]})
        with pytest.raises(ValueError, match="no inputs"):
            client.infer("bert-00", {})
        with pytest.raises(BadRequest, match="no URL"):
            overcommit.Client("ftp://h")


def test_models_are_listed_and_taken_out_of_service(server: Server) -> None:
    with overcommit.Client(url(server)) as client:
        assert {state.name for state in client.models()} >= {"bert-00", "bert-11"}
        info = client.model("bert-11")
        assert {each.name: each.datatype for each in info.inputs}["input_ids"] == "INT64"
        client.unload("bert-11")
        assert not client.is_ready("bert-11")
        client.load("bert-11")
        assert (
            client.infer("bert-11", {"input_ids": IDS, "attention_mask": MASK}).model == "bert-11"
        )
        assert client.status()["processes"]


def test_the_asynchronous_client_does_the_same(
    server: Server, bert_repository: Path, bert_reference: Callable[..., Any]
) -> None:
    async def run() -> None:
        async with overcommit.AsyncClient(url(server)) as client:
            assert await client.is_ready()
            inputs = {"input_ids": IDS, "attention_mask": MASK}
            results = await asyncio.gather(
                *(client.infer(f"bert-{n % 4:02}", inputs) for n in range(32))
            )
            for n in range(4):
                expected = bert_reference(bert_repository / f"bert-{n:02}", IDS)
                found = results[n]["last_hidden_state"]
                np.testing.assert_allclose(found, expected, atol=1e-5)
            with pytest.raises(NotFound, match="'no body'"):
                await client.model("no body")
            await client.unload("bert-10")
            assert not await client.is_ready("bert-10")
            await client.load("bert-10")
            assert {state.name for state in await client.models()} >= {"bert-10"}
            assert (await client.status())["processes"]

    asyncio.run(run())


# --- servers that are not well --------------------------------------------------------------------
class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with what the test has put there; a None closes the connection."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[list[tuple[int, dict[str, str], bytes] | None]]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.rfile.read(int(self.headers.get("content-length", 0)))
        answer = self.answers.pop(0)
        if answer is None:
            self.close_connection = True
            return
        status, headers, body = answer
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def scripted() -> Iterator[tuple[str, type[Scripted]]]:
    handler = type("Handler", (Scripted,), {"answers": [], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", handler
        running.shutdown()


MODEL = (200, {}, b'{"name":"m","inputs":[{"name":"x","datatype":"FP32","shape":[-1]}]}')
GOOD = (200, {}, b'{"model_name":"m","outputs":[]}')
BUSY = (503, {"retry-after": "1", "retry-after-ms": "1"}, b'{"error":"later"}')


def ask(where: str, is_async: bool, **more: Any) -> Any:
    if not is_async:
        with overcommit.Client(where) as client:
            return client.infer("m", {"x": [1]}, **more)

    async def run() -> Any:
        async with overcommit.AsyncClient(where) as client:
            return await client.infer("m", {"x": [1]}, **more)

    return asyncio.run(run())


@pytest.mark.parametrize("is_async", [False, True])
def test_who_is_told_to_come_back_does(
    scripted: tuple[str, type[Scripted]], is_async: bool
) -> None:
    where, handler = scripted
    handler.answers += [MODEL, BUSY, BUSY, GOOD]
    assert ask(where, is_async).model == "m"
    assert handler.asked == ["/v2/models/m", *["/v2/models/m/infer"] * 3]
    handler.answers += [MODEL, BUSY, BUSY, BUSY]
    with pytest.raises(Unavailable, match="later") as caught:
        ask(where, is_async)
    assert caught.value.retry_after_s == 0.001
    handler.answers += [MODEL, (503, {"retry-after": "60"}, b'{"error":"much later"}')]
    with pytest.raises(Unavailable, match="much later"):
        ask(where, is_async, timeout_s=5.0)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_that_is_none_is_said_to_be_none(
    scripted: tuple[str, type[Scripted]], is_async: bool
) -> None:
    where, handler = scripted
    handler.answers += [(500, {}, b"<html>oops"), (404, {}, b'{"error": {"message": "gone"}}')]
    with pytest.raises(ServerError, match="500: <html>oops"):
        ask(where, is_async)
    with pytest.raises(NotFound, match="gone"):
        ask(where, is_async)


def test_a_connection_that_was_closed_meanwhile_is_replaced(
    scripted: tuple[str, type[Scripted]],
) -> None:
    where, handler = scripted
    handler.answers += [MODEL, GOOD, None, GOOD]
    with overcommit.Client(where) as client:
        client.infer("m", {"x": [1]})
        assert client.infer("m", {"x": [1]}).model == "m"
    handler.answers += [None]
    with overcommit.Client(where) as client, pytest.raises(Unavailable, match="no server answers"):
        client.is_ready()


@pytest.mark.parametrize("is_async", [False, True])
def test_nobody_there_is_said_with_the_url(is_async: bool) -> None:
    with pytest.raises(Unavailable, match="no server answers at http://127"):
        ask("http://127.0.0.1:1", is_async)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_server_that_says_nothing_is_not_waited_for(is_async: bool) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"

        async def wait() -> None:
            async with overcommit.AsyncClient(where, timeout_s=0.05) as client:
                await client.is_ready()

        def block() -> None:
            with overcommit.Client(where, timeout_s=0.05) as client:
                client.is_ready()

        with pytest.raises(DeadlineExceeded, match="no answer within"):
            asyncio.run(wait()) if is_async else block()
