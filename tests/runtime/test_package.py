"""The package as a whole: what imports what, and what must not be imported."""

from __future__ import annotations

import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "runtime", "server", "bench")
SAYS_SO = re.compile(r"\bPure\b(?! but)|\bpure\.")
PURE = {ROOT / "runtime" / f"{name}.py" for name in ("batcher", "placement", "policy", "payload")}
PURE |= {
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if SAYS_SO.search(path.read_text().split('"""')[1])
}
# What reads a clock, waits, or asks the system; names of files may be put together.
IMPURE = re.compile(
    r"^\s*(?:from|import) (?:time|socket|select|threading|asyncio|subprocess|torch|mmap)\b"
    r"|\bos\.(?!path\.(?:join|dirname|basename|isabs)\b|fsencode\b|fsdecode\b|PathLike\b)\w+",
    re.MULTILINE,
)


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


@pytest.mark.parametrize("path", sorted(PURE), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_pure_module_imports_no_process_io_or_clock(path: Path) -> None:
    assert not IMPURE.findall(path.read_text())


def test_no_module_imports_itself_by_others() -> None:
    modules = {
        ".".join(("overcommit", *path.relative_to(ROOT).with_suffix("").parts)): path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    # At the start of a line: what is imported for types, or late, can be no circle.
    pattern = re.compile(r"^from (overcommit[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)
    graph = {
        module: {
            name
            for source, names in pattern.findall(path.read_text())
            for name in (source, *(f"{source}.{each}" for each in re.findall(r"\w+", names)))
            if name in modules
        }
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names it


def test_the_extension_refuses_other_systems_at_compile_time() -> None:
    text = (ROOT / "runtime" / "_shm.c").read_text()
    assert "#error" in text
    assert "Linux only" in text
