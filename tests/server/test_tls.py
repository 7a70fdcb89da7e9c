"""TLS: both protocols with a certificate made on the spot, driven by Triton's clients, ours, and bytes."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import WATCHDOG_S, Server

import overcommit
from overcommit.bench.models_repo import ALLOW_CODE, make_echo
from overcommit.runtime.errors import ConfigurationError, Unavailable
from overcommit.server.limits import BULK_BYTES_MIN
from overcommit.server.tls import check_files

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not there"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and localhost that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "server.pem", folder / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", str(key)),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


class TlsServer(Server):
    """A server that is asked over TLS."""

    context: ssl.SSLContext

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=WATCHDOG_S, context=self.context
        )


@pytest.fixture(scope="module")
def server(
    files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, image_cache: Path
) -> Iterator[TlsServer]:
    root = tmp_path_factory.mktemp("echoes")
    make_echo(root, "twice", 2.0, columns=-1, batch=4)
    certificate, key = files
    flags = (ALLOW_CODE, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    running = TlsServer(root, cache=image_cache, flags=flags)
    running.context = ssl.create_default_context(cafile=str(certificate))
    with running:
        yield running


def numbers(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).random((1, count), np.float32)


@pytest.mark.parametrize("count", [4, BULK_BYTES_MIN, 4 << 20])
def test_our_clients_get_what_they_sent(server: TlsServer, count: int) -> None:
    url, x = f"https://127.0.0.1:{server.port}", numbers(count)
    with overcommit.Client(url, tls=server.context) as client:
        for _ in range(2):
            np.testing.assert_array_equal(client.infer("twice", {"x": x})["y"], 2 * x)

    async def run() -> None:
        async with overcommit.AsyncClient(url, tls=server.context) as client:
            results = await asyncio.gather(*(client.infer("twice", {"x": x}) for _ in range(3)))
            for result in results:
                np.testing.assert_array_equal(result["y"], 2 * x)

    asyncio.run(run())


def test_who_does_not_know_the_certificate_is_told(server: TlsServer) -> None:
    with (
        overcommit.Client(f"https://127.0.0.1:{server.port}") as client,
        pytest.raises(Unavailable, match="certificate"),
    ):
        client.is_ready()
    with (
        overcommit.Client(f"http://127.0.0.1:{server.port}") as client,
        pytest.raises(Unavailable),
    ):
        client.is_ready()
    assert server.get("/v2/health/ready").status == 200


def test_tritons_http_client(server: TlsServer, files: tuple[Path, Path]) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(
        f"127.0.0.1:{server.port}",
        ssl=True,
        ssl_options={"ca_certs": str(files[0])},
        ssl_context_factory=lambda: server.context,
    )
    x = numbers(BULK_BYTES_MIN)
    given = triton.InferInput("x", list(x.shape), "FP32")
    given.set_data_from_numpy(x)
    np.testing.assert_array_equal(client.infer("twice", [given]).as_numpy("y"), 2 * x)
    client.close()


def test_tritons_grpc_client(server: TlsServer, files: tuple[Path, Path]) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    client = triton.InferenceServerClient(
        f"127.0.0.1:{server.grpc_port}", ssl=True, root_certificates=str(files[0])
    )
    assert client.is_server_ready()
    for count in (4, 1 << 20):
        x = numbers(count)
        given = triton.InferInput("x", list(x.shape), "FP32")
        given.set_data_from_numpy(x)
        np.testing.assert_array_equal(client.infer("twice", [given]).as_numpy("y"), 2 * x)
    client.close()


def test_grpc_is_offered_by_its_name_and_http_by_none(
    server: TlsServer, files: tuple[Path, Path]
) -> None:
    context = ssl.create_default_context(cafile=str(files[0]))
    context.set_alpn_protocols(["h2", "http/1.1"])
    for port, wanted in ((server.grpc_port, "h2"), (server.port, None)):
        with (
            socket.create_connection(("127.0.0.1", port), WATCHDOG_S) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            assert secure.selected_alpn_protocol() == wanted


def test_requests_behind_a_long_body_are_answered_in_their_turn(server: TlsServer) -> None:
    x = numbers(BULK_BYTES_MIN)
    text = (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,%d],"parameters":'
        b'{"binary_data_size":%d}}],"parameters":{"binary_data_output":true}}'
    ) % (x.size, x.nbytes)
    head = (
        b"POST /v2/models/twice/infer HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n"
        b"inference-header-content-length: %d\r\n\r\n"
    ) % (len(text) + x.nbytes, len(text))
    last = b"GET /v2/health/live HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", server.port), WATCHDOG_S) as plain,
        server.context.wrap_socket(plain, server_hostname="localhost") as secure,
        secure.makefile("rb") as answers,
    ):
        secure.sendall(2 * (head + text + x.tobytes()) + last)
        received = answers.read()
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert received.count((2 * x).tobytes()) == 2
    assert received.endswith(b'{"live":true}')


def test_files_that_cannot_be_used_are_named_before_anything_starts(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    certificate, key = map(str, files)
    assert check_files(certificate, key) == (certificate, key)
    both = tmp_path / "both.pem"
    both.write_bytes(files[1].read_bytes() + files[0].read_bytes())
    assert check_files(str(both), "") == (str(both), str(both))
    for given, says in (
        (("", key), "no --ssl-certfile"),
        ((str(tmp_path / "none"), key), "--ssl-certfile is .*No such file"),
        ((certificate, str(tmp_path)), "--ssl-keyfile is .*directory"),
        ((certificate, certificate), "cannot be used"),
        ((key, key), "cannot be used"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            check_files(*given)
