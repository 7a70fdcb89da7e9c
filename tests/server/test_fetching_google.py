"""Repositories on Google's storage, by its own file system, from a server that answers as it does.

The server is the package gcp-storage-emulator's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gcsfs
import pytest
from gcp_storage_emulator.server import create_server

from overcommit.runtime.errors import ConfigurationError, Unavailable
from overcommit.server import fetching
from overcommit.server.fetching import Fetcher, folder_of
from overcommit.server.remote_files import describe

URL = "gs://models/team"
FILES = {"a/1/model.onnx": b"one" * 1000, "a/config.pbtxt": b"", "b/w": b"flat" * 1000}


@pytest.fixture(scope="module")
def emulator() -> Iterator[Any]:
    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system with the empty bucket `models`; the fetcher finds the same one."""
    port = emulator._api._httpd.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # this is no machine of Google's
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    gcsfs.GCSFileSystem.clear_instance_cache()
    file_system = gcsfs.GCSFileSystem(project="test")
    file_system.mkdir("models")
    yield file_system
    emulator.wipe()
    gcsfs.GCSFileSystem.clear_instance_cache()


def put(bucket: Any, **files: bytes) -> None:
    for path, content in files.items():
        bucket.pipe(f"models/team/{path}", content)
    bucket.invalidate_cache()


def fetch(cache: Path) -> int:
    gcsfs.GCSFileSystem.clear_instance_cache()  # as a process of its own
    return Fetcher(URL, str(cache), lambda done, total: None).fetch()


def here(cache: Path) -> dict[str, bytes]:
    root = Path(folder_of(URL, str(cache)))
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_everything_comes_once_and_then_only_what_has_changed(bucket: Any, tmp_path: Path) -> None:
    put(bucket, **FILES)
    assert fetch(tmp_path) == sum(map(len, FILES.values()))
    assert here(tmp_path) == FILES
    assert fetch(tmp_path) == 0
    # As long as before: its generation alone says that it is another.
    put(bucket, **{"b/w": b"tall" * 1000})
    assert fetch(tmp_path) == 4000
    bucket.rm("models/team/a", recursive=True)
    assert fetch(tmp_path) == 0
    assert here(tmp_path) == {"b/w": b"tall" * 1000}


def test_a_fetch_that_broke_off_goes_on_where_it_was(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 64
    put(bucket, **{"m/weights": content})
    monkeypatch.setattr(fetching, "PIECE_BYTES", 4096)
    monkeypatch.setattr(fetching, "TRIES", 1)
    asked: list[int] = []
    whole = gcsfs.GCSFileSystem.cat_file

    def cut(self: Any, path: str, *args: Any, start: int, end: int, **more: Any) -> bytes:
        asked.append(start)
        if len(asked) == 3:
            raise ConnectionResetError("cut")
        return bytes(whole(self, path, *args, start=start, end=end, **more))

    monkeypatch.setattr(gcsfs.GCSFileSystem, "cat_file", cut)
    with pytest.raises(Unavailable, match="broke off at byte 8192 of 16384"):
        fetch(tmp_path)
    assert here(tmp_path) == {}
    assert fetch(tmp_path) == len(content)
    assert asked == [0, 4096, 8192, 8192, 12288]
    assert here(tmp_path) == {"m/weights": content}


@pytest.mark.parametrize("digest", ["md5", "crc32c"])
def test_bytes_that_do_not_fit_their_digest_are_not_served(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    put(bucket, **{"m/weights": b"right"})
    other = {"md5": "crc32c", "crc32c": "md5Hash"}[digest]
    with monkeypatch.context() as patch:
        # Objects that were composed have no MD5.
        patch.setattr(fetching, "describe", lambda info: describe({**info, other: None}))
        patch.setattr(gcsfs.GCSFileSystem, "cat_file", lambda *args, **more: b"wrong")
        with pytest.raises(Unavailable, match=f"has the {digest}"):
            fetch(tmp_path)
    assert here(tmp_path) == {}
    assert fetch(tmp_path) == 5
    assert here(tmp_path) == {"m/weights": b"right"}


def test_what_is_not_there_is_said_with_the_address(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gs://models/team .*is the address right"):
        fetch(tmp_path)
    bucket.rmdir("models")
    with pytest.raises(ConfigurationError, match=r"gs://models/team .*is the address right"):
        fetch(tmp_path)
