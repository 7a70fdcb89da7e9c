"""Bytes that are nearly right, for everything that reads bytes of others: no crash, no hang, no growth."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from front_end_rig import Client, Peer, Rig
from fuzzing import fuzz
from image_rig import header_of

from overcommit.runtime import payload, repository
from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.errors import OvercommitError
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.image import read_header, write_image
from overcommit.runtime.signature import Signature
from overcommit.server import binary, hpack, inference, msgpack_body
from overcommit.server.clients.exchange import Received, infer_result
from overcommit.server.embeddings import decode, inputs_of
from overcommit.server.limits import FIELDS_MAX, HEAD_BYTES_MAX, LINES_MAX
from overcommit.server.plans import RoutePlans, Shape

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def spec(name: str, datatype: str) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=(-1, -1), axes=("batch", None))


HEADS_BYTES = (LINES_MAX + FIELDS_MAX) * HEAD_BYTES_MAX
FIELDS = struct.Struct("<16sIQQ")  # in front of an image's header: magic, format, start, length

WIDE = Route(
    slot=1,
    name="m",
    version="1",
    state="ready",
    inputs=tuple(spec(f"in_{each}", each) for each in ("FP32", "INT64", "BOOL", "FP16", "BYTES")),
    outputs=(spec("y", "FP32"),),
    max_batch_size=8,
)


def tensor(datatype: str, data: Any = None, **more: Any) -> dict[str, Any]:
    fields = {"name": f"in_{datatype}", "datatype": datatype, "shape": [1, 2], **more}
    return fields if data is None else fields | {"data": data}


JSON_BODIES = [
    json.dumps(value).encode()
    for value in (
        {
            "id": "a",
            "inputs": [
                tensor("FP32", [1.5, -2e3]),
                tensor("INT64", [[1, -9007199254740993]]),
                tensor("BOOL", [True, False]),
                tensor("FP16", [0.1, 65504]),
                tensor("BYTES", ["ü", "\\u0000"]),
            ],
            "outputs": [{"name": "y", "parameters": {"binary_data": True, "classification": 2}}],
            "parameters": {"timeout": 5, "binary_data_output": False, "priority": 1},
        },
        {"inputs": [tensor(each, data) for each, data in (("FP32", [0, 1]), ("INT64", [3, 4]))]},
    )
]


def with_tail(tensors: list[dict[str, Any]], tail: bytes) -> bytes:
    """A binary body behind the length of its JSON, as four bytes."""
    text = json.dumps({"inputs": tensors}).encode()
    return struct.pack("<I", len(text)) + text + tail


def sized(datatype: str, data: bytes) -> tuple[dict[str, Any], bytes]:
    return tensor(datatype, parameters={"binary_data_size": len(data)}), data


BLOBS = [
    sized("FP32", b"\0" * 8),
    sized("INT64", b"\1" * 16),
    sized("BOOL", b"\0\1"),
    sized("FP16", b"\2" * 4),
    sized("BYTES", binary.join_bytes([b"abc", b""])),
]
BINARY_BODIES = [
    with_tail([each for each, _ in BLOBS], b"".join(data for _, data in BLOBS)),
    with_tail([BLOBS[0][0], tensor("INT64", [1, 2])], BLOBS[0][1]),
]


# --- bodies ---------------------------------------------------------------------------------------
def test_json_bodies() -> None:
    plans = RoutePlans(loose(WIDE), Shape())
    taken = fuzz(
        lambda body: inference.prepare(plans, body, None), JSON_BODIES, 6000, (OvercommitError,)
    )
    assert taken > 100  # else nothing near the core was reached


def test_binary_bodies() -> None:
    plans = RoutePlans(loose(WIDE), Shape())

    def prepare(data: bytes) -> None:
        head = data[:4].ljust(4, b"\0")
        inference.prepare(plans, data[4:], struct.unpack("<I", head)[0])

    assert fuzz(prepare, BINARY_BODIES, 8000, (OvercommitError,)) > 20


def loose(route: Route) -> Route:
    """The same route with inputs that may be left out: more bodies are right."""
    inputs = tuple(msgspec.structs.replace(each, optional=True) for each in route.inputs)
    return msgspec.structs.replace(route, inputs=inputs)


def test_messagepack_bodies() -> None:
    plans = RoutePlans(loose(WIDE), Shape())
    bodies = [
        msgspec.msgpack.encode(
            {
                "id": "a",
                "inputs": [
                    {**tensor(entry["datatype"]), "data": data} for entry, data in BLOBS[start:]
                ],
                "outputs": [{"name": "y"}],
                "parameters": {"timeout": 5},
            }
        )
        for start in (0, 3)
    ]
    assert (
        fuzz(lambda body: msgpack_body.prepare(plans, body, None), bodies, 4000, (OvercommitError,))
        > 100
    )


def test_embeddings_bodies() -> None:
    bodies = [
        b'{"model": "m", "input": ["one", "two"], "encoding_format": "base64", "dimensions": 3}',
        b'{"model": "m", "input": [[1, 2], [3]], "truncate": true}',
    ]
    assert fuzz(lambda body: inputs_of(decode(body)), bodies, 2000, (OvercommitError,)) > 20


def test_compressed_bodies() -> None:
    gzip = zlib.compressobj(wbits=31)
    bodies = [zlib.compress(b"a" * 5000), gzip.compress(b"b" * 5000) + gzip.flush()]

    def decompress(body: bytes) -> None:
        for encoding in (b"gzip", b"deflate"):
            assert len(binary.decompress(body, encoding, 10_000)) <= 10_000

    fuzz(decompress, bodies, 2000, (OvercommitError,))


def test_byte_tensors() -> None:
    data = binary.join_bytes([b"abc", b"", b"x" * 300])

    def split(body: bytes) -> None:
        view = memoryview(body)
        assert binary.count_bytes_elements(view) == len(binary.split_bytes(view))

    fuzz(split, [data], 3000, (OvercommitError,))


# --- connections ----------------------------------------------------------------------------------
def request(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(line + b"\r\n" for line in headers)
    head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\n"
    return head + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def streams() -> list[bytes]:
    entry = {"name": "x", "datatype": "FP32", "shape": [2, 3]}
    plain = json.dumps({"inputs": [{**entry, "data": VALUES.tolist()}]}).encode()
    text = json.dumps(
        {"inputs": [{**entry, "parameters": {"binary_data_size": VALUES.nbytes}}]}
    ).encode()
    length = b"Inference-Header-Content-Length: %d" % len(text)
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (plain[:9], plain[9:]))
    head = b"POST /v2/models/m/versions/1/infer?a=b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    packed = zlib.compress(plain)
    return [
        request(plain) * 3,
        request(text + VALUES.tobytes(), length) + request(plain),
        head + chunked + b"0\r\n\r\n",
        request(packed, b"Content-Encoding: deflate", b"Expect: 100-continue"),
        request(plain, b"Connection: close"),
        request(plain, b"Connection: upgrade", b"Upgrade: h2c") + request(plain),
        request(plain).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ]


def test_http_connections() -> None:
    """Whatever comes, each connection ends with its blocks back, and no answer is a 500."""

    async def not_found(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def start() -> tuple[Rig, Peer]:
        rig = Rig(app=not_found)  # the bytes may become a request for another path
        return rig, Peer(rig, 0, 1)

    async def connection(data: bytes) -> None:
        client = rig.connect()
        half = len(data) // 2
        for piece in (data[:half], data[half:]):
            client.send(piece)
            await asyncio.sleep(0)
            peer.answer_all()
        check(client)
        client.lose()
        peer.answer_all()
        await asyncio.sleep(0)
        assert rig.is_empty()

    with asyncio.Runner() as runner:
        rig, peer = runner.run(start())
        # Heads that were seen are kept, up to a limit that is above all of this.
        fuzz(lambda data: runner.run(connection(data)), streams(), 2500, grown_max=HEADS_BYTES)


def check(client: Client) -> None:
    written = client.written
    while written:
        head, end, rest = written.partition(b"\r\n\r\n")
        assert end
        lines = head.split(b"\r\n")
        status = int(lines[0].split()[1])
        assert 100 <= status < 500 or status in (501, 503), head
        fields = dict(line.lower().split(b": ", 1) for line in lines[1:])
        written = rest[int(fields.get(b"content-length", 0)) :]


def test_header_tables_of_http2() -> None:
    encoded = [
        bytes.fromhex("828684410f7777772e6578616d706c652e636f6d"),
        bytes.fromhex("400a637573746f6d2d6b65790d637573746f6d2d686561646572"),
        bytes.fromhex("828684418cf1e3c2e5f23a6ba0ab90f4ff"),
    ]

    def read(data: bytes) -> None:
        decoder = hpack.Decoder()
        for _ in range(2):  # the second time the table is filled
            decoder.decode(data)

    fuzz(read, encoded, 4000, (hpack.CompressionError,))


# --- between processes ----------------------------------------------------------------------------
def test_blocks_of_requests() -> None:
    config = ModelConfig(inputs=loose(WIDE).inputs, outputs=WIDE.outputs)
    signature = Signature(config)
    rows = [("FP32", 8, (1, 2)), ("INT64", 16, (1, 2)), ("BOOL", 2, (1, 2))]
    places, total = payload.plan([(index, *row) for index, row in enumerate(rows)])
    block = bytearray(total)
    payload.encode(memoryview(block), places)

    def read(data: bytes) -> None:
        for place in signature.read(memoryview(data)).places:
            assert place.offset + place.nbytes <= len(data)

    fuzz(read, [bytes(block)], 4000, (OvercommitError,))


# --- files ----------------------------------------------------------------------------------------
def test_image_headers(tmp_path: Path) -> None:
    facts = [
        (f"layer.{number}", "parameter", True, "float32", (4, 4), (4, 1), 64, None)
        for number in range(3)
    ]
    config = ModelConfig(inputs=WIDE.inputs)
    header = header_of(facts, config, {"class": "Linear"})  # type: ignore[arg-type]
    path = tmp_path / "good.image"
    write_image(
        path, header, [(entry, memoryview(bytes(entry.nbytes))) for entry in header.tensors]
    )
    _, start = read_header(path)
    head = path.read_bytes()[:start]
    bad = tmp_path / "bad.image"

    def read(data: bytes) -> None:
        bad.write_bytes(data)
        read_header(bad)

    def read_sealed(encoded: bytes) -> None:
        # With its digest put right: damage that is no accident.
        fields = FIELDS.pack(*FIELDS.unpack_from(head)[:3], len(encoded))
        digest = struct.pack("<I", zlib.crc32(encoded, zlib.crc32(fields)))
        read((fields + digest + encoded).ljust(start, b"\0") + bytes(header.nbytes))

    fuzz(read, [head + bytes(header.nbytes)], 1000, (OvercommitError,))
    length = FIELDS.unpack_from(head)[3]
    encoded = head[FIELDS.size + 4 :][:length]
    assert fuzz(read_sealed, [encoded], 3000, (OvercommitError,)) > 50


def test_model_tomls(tmp_path: Path) -> None:
    good = b"""
engine = "torch"
pin = true
min_resident = 2.5
[batching]
max_batch_size = 8
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, 4]
"""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")

    def read(data: bytes) -> None:
        (folder / "model.toml").write_bytes(data)
        repository.scan([tmp_path])

    fuzz(read, [good], 800)


# --- what our own client is told ------------------------------------------------------------------
def test_answers_to_clients() -> None:
    text = json.dumps(
        {
            "model_name": "m",
            "outputs": [
                {
                    "name": "y",
                    "datatype": "FP32",
                    "shape": [2, 3],
                    "parameters": {"binary_data_size": VALUES.nbytes},
                },
                {"name": "z", "datatype": "INT8", "shape": [2], "data": [1, 2]},
            ],
        }
    ).encode()
    bodies = [struct.pack("<I", len(text)) + text + VALUES.tobytes()]

    def read(data: bytes) -> None:
        length = struct.unpack("<I", data[:4].ljust(4, b"\0"))[0]
        headers = {"inference-header-content-length": str(length)}
        infer_result(Received(200, headers, data[4:]))

    assert fuzz(read, bodies, 4000, (OvercommitError,)) > 100
