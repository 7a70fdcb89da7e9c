"""The CUDA sources are CUDA: a real compiler takes them, without headers, and cupy stays away."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from overcommit.kernels import datatypes, digest, gather, image, scatter, unpack

SOURCES = {
    "digest": digest.SOURCE,
    "unpack": unpack.SOURCE,
    "image-FP32": image.source(3, "FP32"),
    "image-FP16": image.source(1, "FP16"),
    **{f"gather-to-{t}": gather.source_of(s, t) for s, t in datatypes.CONVERSIONS},
    "scatter-FP16-FP32": scatter.source_of("FP16", "FP32"),
    "scatter-FP32-BF16": scatter.source_of("FP32", "BF16"),
    "scatter-UINT8-UINT8": scatter.source_of("UINT8", "UINT8"),
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA compiler")
@pytest.mark.parametrize("name", SOURCES)
def test_nvcc_compiles_it_for_the_oldest_and_the_newest_gpu(name: str, tmp_path: Path) -> None:
    text = tmp_path / "kernel.cu"
    text.write_text(SOURCES[name])
    command = ["nvcc", "-std=c++17", "-cubin", "-o", str(tmp_path / "kernel.cubin"), str(text)]
    command += ["-Werror", "all-warnings", "-diag-suppress", "177", "-Xptxas", "-v"]  # 177: unused
    for architecture in ("sm_80", "sm_90"):
        done = subprocess.run(
            [*command, f"-arch={architecture}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores" in done.stderr


@pytest.mark.parametrize("name", ["digest", "unpack", "image", "gather", "scatter"])
def test_an_operation_checks_and_times_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {
        "digest": digest,
        "unpack": unpack,
        "image": image,
        "gather": gather,
        "scatter": scatter,
    }[name]
    monkeypatch.setattr("overcommit.kernels.cuda.has_gpu", lambda: False)
    module.check()
    if module is not unpack:
        for row in module.timing():
            row.call()


def test_importing_the_kernels_imports_neither_cupy_nor_anything_of_the_runtime() -> None:
    script = (
        "import sys\n"
        "from overcommit.kernels import digest, gather, image, scatter, unpack\n"
        "ours = [m for m in sys.modules if m.startswith('overcommit.')]\n"
        "assert all(m.startswith('overcommit.kernels') for m in ours), ours\n"
        "assert not {'cupy', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
