"""A request holds the regions that it was checked against, whatever becomes of their names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front_end_rig import Peer, Rig
from h2_rig import H2Client, in_loop

from overcommit.runtime.front_end_messages import Region, RegionsChanged
from overcommit.server.plans import Plans
from overcommit.server.proto import messages
from overcommit.server.regions import Regions
from overcommit.server.shared_body import MEDIA_TYPE

VALUES = np.array([1, 2, 3, 4], np.float32)
NBYTES = VALUES.nbytes
OUT = 64  # where windows have their output; leased regions are written over their inputs


class Rigged:
    """A front end, its worker, and the files `a` and `b`, the first of them registered as `r`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for key in ("a", "b"):
            (folder / key).write_bytes(VALUES.tobytes() + bytes(OUT))
        self.rig = Rig()
        self.regions = Regions(is_allowed=True, folder=str(folder))
        self.rig.plans = Plans(self.regions)
        self.peer = Peer(self.rig, 0, 1)
        self.register("a")

    def register(self, key: str) -> None:
        region = Region(name="r", key=key, offset=0, byte_size=NBYTES + OUT)
        self.regions.apply(RegionsChanged(upsert=(region,)))

    def unregister(self) -> None:
        self.regions.apply(RegionsChanged(removed=("r",)))

    def numbers(self, key: str, at: int) -> list[float]:
        return np.frombuffer((self.folder / key).read_bytes(), np.float32, 4, at).tolist()

    def is_open(self, key: str) -> bool:
        """Whether this process has the file open."""
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return str(self.folder / key) in [os.path.realpath(link) for link in links]


def window(offset: int) -> dict[str, Any]:
    return {
        "shared_memory_region": "r",
        "shared_memory_byte_size": NBYTES,
        "shared_memory_offset": offset,
    }


def http(body: dict[str, Any], *headers: bytes) -> bytes:
    content = json.dumps(body).encode()
    lines = [b"POST /v2/models/m/infer HTTP/1.1", b"Content-Length: %d" % len(content), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


X = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
IN_WINDOWS = http(
    {
        "inputs": [{**X, "parameters": window(0)}],
        "outputs": [{"name": "y", "parameters": window(OUT)}],
    }
)
NUMBERS_IN_JSON = http(
    {
        "inputs": [{**X, "data": VALUES.tolist()}],
        "outputs": [{"name": "y", "parameters": window(OUT)}],
    }
)
IN_ONE_PLACE = http(
    {
        "inputs": [{**X, "parameters": {"binary_data_size": NBYTES}}],
        "parameters": {
            **window(0),
            "shared_memory_answer_byte_size": NBYTES,
            "binary_data_output": True,
        },
    },
    b"Content-Type: " + MEDIA_TYPE,
)


def grpc(*, raw: bool) -> bytes:
    message = messages.ModelInferRequest(model_name="m")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    output = message.outputs.add(name="y")
    for holder, offset in ((tensor, 0), (output, OUT)):
        if holder is tensor and raw:
            message.raw_input_contents.append(VALUES.tobytes())
            continue
        for name, value in window(offset).items():
            if isinstance(value, str):
                holder.parameters[name].string_param = value
            else:
                holder.parameters[name].int64_param = value
    return message.SerializeToString()


KINDS: dict[str, tuple[bytes, int]] = {
    "windows": (IN_WINDOWS, OUT),
    "an output": (NUMBERS_IN_JSON, OUT),
    "one place": (IN_ONE_PLACE, 0),
    "gRPC": (grpc(raw=False), OUT),
    "an output of gRPC": (grpc(raw=True), OUT),
}


class Caller:
    """Asks over the protocol of a kind of request, on one connection."""

    def __init__(self, here: Rigged, kind: str) -> None:
        self.message, self.at = KINDS[kind]
        self.http = None if "gRPC" in kind else here.rig.connect()
        self.h2 = H2Client(here.rig) if "gRPC" in kind else None

    def send(self) -> None:
        if self.http is not None:
            self.http.send(self.message)
        else:
            assert self.h2 is not None
            self.h2.call(self.message)

    async def status(self) -> list[int]:
        """How every request so far was answered, in the words of its protocol: 200 and 0 are well."""
        if self.http is not None:
            heads = self.http.written.split(b"HTTP/1.1 ")[1:]
            return [int(head[:3]) for head in heads]
        assert self.h2 is not None
        await self.h2.settle()
        return [self.h2.status(number) for number in range(1, self.h2._next, 2)]

    def lose(self) -> None:
        client = self.http or self.h2
        assert client is not None
        client.lose()


def run(folder: Path, kind: str, test: Callable[[Rigged, Caller], Any]) -> None:
    async def go() -> None:
        here = Rigged(folder)
        await test(here, Caller(here, kind))
        assert here.rig.is_empty()

    in_loop(go)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_goes_where_it_was_to_go_when_the_request_came(kind: str, tmp_path: Path) -> None:
    async def test(here: Rigged, caller: Caller) -> None:
        well = 0 if caller.h2 is not None else 200
        for count in (
            1,
            2,
            3,
        ):  # the same again: what was learned from one holds nothing for others
            here.register("a")
            caller.send()
            here.unregister()
            here.register("b")
            assert here.is_open("a")
            before = here.numbers("a", 0)
            here.peer.answer_all()
            assert await caller.status() == [well] * count
            doubled = [2 * each for each in (before if caller.at == 0 else VALUES.tolist())]
            assert here.numbers("a", caller.at) == doubled
            assert here.numbers("b", 0) == VALUES.tolist()
            assert here.numbers("b", OUT) == [0, 0, 0, 0]
            assert not here.is_open("a"), "nobody uses it"

    run(tmp_path, kind, test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_is_let_go_of_however_its_request_ends(kind: str, tmp_path: Path) -> None:
    async def test(here: Rigged, caller: Caller) -> None:
        caller.send()
        here.unregister()
        (submission,) = here.peer.take()
        here.peer.answer(submission, length=3)
        here.rig.dispatch.drain()
        assert (await caller.status()) not in ([0], [200])
        assert not here.is_open("a")

        here.register("a")
        caller.send()
        here.unregister()
        assert here.is_open("a")
        caller.lose()
        assert not here.is_open("a")
        here.peer.answer_all()
        assert here.numbers("a", 0) == VALUES.tolist()
        assert here.numbers("a", OUT) == [0, 0, 0, 0]

    run(tmp_path, kind, test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_was_taken_away_is_refused_before_anything_is_computed(
    kind: str, tmp_path: Path
) -> None:
    async def test(here: Rigged, caller: Caller) -> None:
        for _ in range(3):
            caller.send()
            here.peer.answer_all()
        here.unregister()
        caller.send()
        assert not here.peer.take()
        assert (await caller.status())[-1] in (404, 5)
        assert not here.is_open("a")

    run(tmp_path, kind, test)
