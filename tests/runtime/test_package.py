"""The package as a whole: what imports what, and what must not be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE = ("allocator", "batcher", "blocks", "lanes", "placement", "policy", "quarantine", "residency")
PURE += ("router", "seats", "payload", "errors")


def imported_after(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter has after this statement."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    return set(done.stdout.split())


def test_the_supervisor_and_the_command_line_import_neither_torch_nor_cuda() -> None:
    modules = imported_after(
        "import overcommit.runtime.supervisor, overcommit.server.cli, overcommit.server.settings"
    )
    assert not modules & {"torch", "transformers", "cupy", "cuda", "numpy"}


def test_a_front_end_does_not_import_torch() -> None:
    assert "torch" not in imported_after("import overcommit.server.frontend")


def test_only_the_package_itself_claims_a_name() -> None:
    modules = imported_after("import overcommit.server.frontend, overcommit.runtime.supervisor")
    assert not modules & {"runtime", "server", "kernels", "bench", "tests"}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels", "overcommit.runtime|overcommit.server|overcommit.bench"),
        ("runtime", "overcommit.server|overcommit.bench"),
        ("server", "overcommit.bench"),
    ],
)
def test_dependencies_point_one_way(folder: str, forbidden: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        found = re.findall(rf"^\s*(?:from|import) ({forbidden})", path.read_text(), re.MULTILINE)
        assert not found, f"{path.name} imports {found}"


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_imports_no_process_io_or_clock(name: str) -> None:
    text = (ROOT / "runtime" / f"{name}.py").read_text()
    assert not re.findall(
        r"^\s*(?:from|import) (os|time|socket|select|threading|asyncio|subprocess|torch|mmap)\b",
        text,
        re.MULTILINE,
    )


def test_the_extension_refuses_other_systems_at_compile_time() -> None:
    text = (ROOT / "runtime" / "_shm.c").read_text()
    assert "#error" in text
    assert "Linux only" in text
