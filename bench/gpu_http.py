"""What a client waits for a BERT over HTTP: resident, warm (from HOST) and cold (from disk).

Two models of one shape with weights of their own, and room in DEVICE for one: asked in turns, each request
has its model loaded first.  With a HOST that holds both, it comes from there; without HOST, from disk.
Requests come one at a time on one connection, `SEQUENCE` tokens each; the answer is binary, so that JSON is
no part of what is measured.  The server says where the bytes came from, and an answer after a reload is bit
for bit the one before.

Called by the scenario `gpu`.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.runtime.config import MIB

NAMES: Final = ("bert-a", "bert-b")
SEQUENCE: Final = 128
TIMEOUT_S: Final = 60.0
SECONDS: Final = 10.0  # for each of the three
REQUESTS_MIN: Final = 4
REQUESTS_MAX: Final = 2000
DEVICE_MODELS: Final = 1.4  # so many models fit DEVICE, ...
HOST_MODELS: Final = 2.5  # ... and so many HOST


def make_models(root: Path, shape: Mapping[str, Any]) -> int:
    """Write both models, as `transformers` does, unless they are there; return the bytes of one.

    `shape` are arguments of `BertConfig`; none is BERT base, 110 million parameters.
    """
    import torch
    from transformers import BertConfig, BertModel

    for seed, name in enumerate(NAMES):
        if not (root / name / "model.safetensors").exists():
            torch.manual_seed(seed)
            BertModel(BertConfig(**shape)).save_pretrained(root / name)
    return (root / NAMES[0] / "model.safetensors").stat().st_size


def measure(
    work: Path,
    logs: Path,
    report: Report,
    shape: Mapping[str, Any],
    flags: Sequence[str] = (),
    seconds: float = SECONDS,
    serve: Sequence[str] = ("-m", "overcommit", "serve"),
) -> None:
    """Run the three; add their figures and conditions."""
    nbytes = make_models(work / "bert", shape)
    device = str(int(DEVICE_MODELS * nbytes) + 4 * MIB)
    fixed = ["--workers", "1", "--front-ends", "1", "--no-prefetch", "--no-damping"]
    fixed += ["--device-memory", device, *flags]
    for source, host in (("host", int(HOST_MODELS * nbytes) + 8 * MIB), ("disk", 0)):
        server = Server(
            *(work / "bert", work / "cache", logs),
            *([*fixed, "--host-memory", str(host)], f"http-{source}", serve),
        )
        with server:
            server.wait_packed(NAMES)
            client = Client(server.port)
            answers = [client.ask(name)[1] for name in (*NAMES, *NAMES)]  # programs are bound
            if source == "host":
                _add(report, "resident", nbytes, client.ask_for(NAMES[1:], seconds)[0])
            before = server.status()["totals"]
            times_s, same = client.ask_for(NAMES, seconds, dict(zip(NAMES, answers, strict=False)))
            after = server.status()["totals"]
            client.close()
        kind = {"host": "warm", "disk": "cold"}[source]
        _add(report, kind, nbytes, times_s)
        loads = {key: after[key] - before[key] for key in ("loads_from_host", "loads_from_disk")}
        others = sum(loads.values()) - loads[f"loads_from_{source}"]
        report.expect(
            f"HTTP: each {kind} request loaded its model from {source}",
            # The first one may find its model there still.
            loads[f"loads_from_{source}"] >= len(times_s) - 1 and not others,
            f"{len(times_s)} requests, {loads}",
        )
        report.expect(f"HTTP: {kind} answers are those of before", same)


def _add(report: Report, kind: str, nbytes: int, times_s: Sequence[float]) -> None:
    milliseconds = sorted(1000 * each for each in times_s)
    note = f"{len(times_s)} requests, {nbytes / 1e6:.0f} MB"
    last = milliseconds[min(len(milliseconds) - 1, int(0.99 * len(milliseconds)))]
    report.add(
        "HTTP",
        Figure(f"{kind}, median", statistics.median(milliseconds), "ms", note=note),
        Figure(f"{kind}, p99", last, "ms"),
    )


class Client:
    """One connection that asks one request at a time."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        shape = [1, SEQUENCE]
        inputs: list[dict[str, Any]] = [
            {"name": name, "datatype": "INT64", "shape": shape, "data": list(data)}
            for name, data in (
                ("input_ids", (1 + n % 50 for n in range(SEQUENCE))),
                ("attention_mask", (1 for _ in range(SEQUENCE))),
            )
        ]
        asked = {"inputs": inputs, "parameters": {"binary_data_output": True}, "id": "bert"}
        self._body = json.dumps(asked).encode()

    def ask(self, name: str) -> tuple[float, bytes]:
        """Return the seconds until the whole answer was there, and its tensors."""
        began = time.perf_counter()
        self._connection.request("POST", f"/v2/models/{name}/infer", self._body)
        response = self._connection.getresponse()
        body = response.read()
        took = time.perf_counter() - began
        if response.status != 200:
            raise RuntimeError(f"{name}: {response.status} {body[:200]!r}")
        return took, body[int(response.headers["Inference-Header-Content-Length"]) :]

    def ask_for(
        self, names: Sequence[str], seconds: float, want: Mapping[str, bytes] | None = None
    ) -> tuple[list[float], bool]:
        """Ask these in turns for so long; return the times, and whether the answers were the wanted."""
        times: list[float] = []
        same = True
        end = time.perf_counter() + seconds
        for name in _turns(names):
            took, answer = self.ask(name)
            times.append(took)
            same = same and (want is None or answer == want[name])
            is_late = time.perf_counter() > end and len(times) >= REQUESTS_MIN
            if is_late or len(times) == REQUESTS_MAX:
                return times, same
        return times, same

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def _turns(names: Sequence[str]) -> Iterable[str]:
    while True:
        yield from names
