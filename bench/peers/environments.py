"""Python environments of other servers: one per peer and version, made when it is first asked for.

    WORK/peers/NAME-VERSION-DIGEST/        a virtual environment, complete when made.txt is in it
    WORK/peers/NAME-VERSION-DIGEST.log     what pip said

Invariants
 1. An environment is used only when its stamp is there, and the stamp is written last: a folder
    without one is what a broken run left, and is made anew.
 2. The digest is of every pinned requirement: another pin is another folder, never a changed one.
 3. What a peer is measured with is in its own environment; nothing of ours is imported there.

A virtual environment cannot be renamed into place (its scripts name their own folder), hence the
stamp.  Called by `peers.serve`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.bench.errors import BenchError
from overcommit.bench.peers.peer import CannotDo, Requirements

STAMP: Final = "made.txt"
FROZEN: Final = "versions.txt"
INSTALL_LIMIT_S: Final = 1800.0
LOG_TAIL_CHARS: Final = 2000

Pip = Callable[[Path, list[str], Path], int]  # environment, arguments, log -> exit status
Say = Callable[[str], None]


@dataclass(slots=True, frozen=True)
class Environment:
    """A complete environment."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where its packages are."""
        return self.folder / "lib" / f"python{python_version()}" / "site-packages"


def python_version() -> str:
    """Return the version that environments have: ours."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def folder_of(work: Path, name: str, requirements: Requirements) -> Path:
    """Return where a peer's environment is or would be."""
    text = "\n".join([sys.version, *("|".join(step) for step in requirements.steps)])
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return work / "peers" / f"{name}-{requirements.version}-{digest}"


def find(work: Path, name: str, requirements: Requirements) -> Environment | None:
    """Return a peer's environment when it is complete."""
    folder = folder_of(work, name, requirements)
    return Environment(folder) if (folder / STAMP).exists() else None


def ensure(
    work: Path,
    name: str,
    requirements: Requirements,
    say: Say = lambda text: None,
    pip: Pip | None = None,
) -> Environment:
    """Return a peer's environment, making it the first time; takes minutes then.

    Raises CannotDo when this Python is not one that the peer runs on, or its packages cannot be
    installed.
    """
    if requirements.pythons and python_version() not in requirements.pythons:
        raise CannotDo(f"{name} {requirements.version} does not run on Python {python_version()}")
    folder = folder_of(work, name, requirements)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if (folder / STAMP).exists():
            return Environment(folder)
        log = folder.with_name(f"{folder.name}.log")
        shutil.rmtree(folder, ignore_errors=True)
        say(f"making the environment of {name} {requirements.version} in {folder}")
        started = time.monotonic()
        log.write_text("")
        venv.create(folder, with_pip=pip is None, symlinks=True)
        for number, step in enumerate(requirements.steps, 1):
            say(f"{name}: step {number} of {len(requirements.steps)}: pip install {' '.join(step)}")
            if (pip or run_pip)(folder, ["install", *step], log) != 0:
                tail = log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
                raise CannotDo(f"{name} cannot be installed; the end of {log}:\n{tail}")
        _freeze(folder)
        lines = [" ".join(step) for step in requirements.steps]
        (folder / STAMP).write_text("\n".join(lines) + "\n")
        say(f"{name} is installed after {time.monotonic() - started:.0f} s")
        return Environment(folder)


def _freeze(folder: Path) -> None:
    """Write down every version that is there, the dependencies' too, which are not pinned."""
    packages = Environment(folder).packages
    found = importlib.metadata.distributions(path=[str(packages)])
    lines = sorted(f"{one.metadata['Name']}=={one.version}" for one in found)
    (folder / FROZEN).write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time make an environment; the kernel frees the lock of a dead one."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_pip(folder: Path, arguments: list[str], log: Path) -> int:
    """Run the environment's own pip.  Raises BenchError when it hangs."""
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command = [str(folder / "bin" / "python"), "-m", "pip", *arguments, *quiet]
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        return child.wait(INSTALL_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"pip hangs; its log is {log}") from error
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
