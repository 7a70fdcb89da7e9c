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
from remote_rig import (
    Place,
    check_that_a_fetch_goes_on_where_it_broke_off,
    check_that_only_what_has_changed_comes_again,
)

from overcommit.runtime.errors import ConfigurationError, Unavailable
from overcommit.server import fetching
from overcommit.server.remote_files import describe

URL = "gs://models/team"


@pytest.fixture(scope="module")
def emulator() -> Iterator[Any]:
    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def place(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A file system with the empty bucket `models`; the fetcher finds the same one."""
    port = emulator._api._httpd.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # this is no machine of Google's
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    gcsfs.GCSFileSystem.clear_instance_cache()
    file_system = gcsfs.GCSFileSystem(project="test")
    file_system.mkdir("models")
    yield Place(URL, gcsfs.GCSFileSystem, file_system)
    emulator.wipe()
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_everything_comes_once_and_then_only_what_has_changed(place: Place, tmp_path: Path) -> None:
    check_that_only_what_has_changed_comes_again(place, tmp_path)


def test_a_fetch_that_broke_off_goes_on_where_it_was(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_a_fetch_goes_on_where_it_broke_off(place, tmp_path, monkeypatch)


@pytest.mark.parametrize("digest", ["md5", "crc32c"])
def test_bytes_that_do_not_fit_their_digest_are_not_served(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    place.put(**{"m/weights": b"right"})
    other = {"md5": "crc32c", "crc32c": "md5Hash"}[digest]
    with monkeypatch.context() as patch:
        # Objects that were composed have no MD5.
        patch.setattr(fetching, "describe", lambda info: describe({**info, other: None}))
        patch.setattr(gcsfs.GCSFileSystem, "cat_file", lambda *args, **more: b"wrong")
        with pytest.raises(Unavailable, match=f"has the {digest}"):
            place.fetch(tmp_path)
    assert place.here(tmp_path) == {}
    assert place.fetch(tmp_path) == 5
    assert place.here(tmp_path) == {"m/weights": b"right"}


def test_what_is_not_there_is_said_with_the_address(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gs://models/team .*is the address right"):
        place.fetch(tmp_path)
    place.bucket.rmdir("models")
    with pytest.raises(ConfigurationError, match=r"gs://models/team .*is the address right"):
        place.fetch(tmp_path)
