"""Repositories on S3, as a real S3 service over HTTP serves them (moto's server, through s3fs)."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer
from remote_rig import (
    FILES,
    Place,
    check_that_a_fetch_goes_on_where_it_broke_off,
    check_that_only_what_has_changed_comes_again,
)
from typer.testing import CliRunner

from overcommit.runtime.errors import ConfigurationError, Unavailable
from overcommit.server import cli

URL = "s3://models/team"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def place(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An S3 file system with the empty bucket `models`; the fetcher finds the same one."""
    for name, value in (
        *(("AWS_ENDPOINT_URL_S3", endpoint), ("AWS_ACCESS_KEY_ID", "test")),
        *(("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1")),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    file_system = s3fs.S3FileSystem()
    file_system.mkdir("models")
    yield Place(URL, s3fs.S3FileSystem, file_system)
    file_system.rm("models", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def test_everything_comes_once_and_then_only_what_has_changed(place: Place, tmp_path: Path) -> None:
    check_that_only_what_has_changed_comes_again(place, tmp_path)


def test_a_fetch_that_broke_off_goes_on_where_it_was(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_a_fetch_goes_on_where_it_broke_off(place, tmp_path, monkeypatch)


def test_bytes_that_do_not_fit_their_tag_are_not_served(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put(**{"m/weights": b"right"})
    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "cat_file", lambda *args, **more: b"wrong")
        with pytest.raises(Unavailable, match="has the md5"):
            place.fetch(tmp_path)
    assert place.here(tmp_path) == {}
    assert place.fetch(tmp_path) == 5
    assert place.here(tmp_path) == {"m/weights": b"right"}


def test_an_object_in_parts_is_checked_by_its_size(place: Place, tmp_path: Path) -> None:
    content = bytes(6 << 20)
    with place.bucket.open("models/team/m/weights", "wb", block_size=5 << 20) as file:
        file.write(content)
    assert "-" in place.bucket.info("models/team/m/weights")["ETag"]  # no digest of its bytes
    assert place.fetch(tmp_path) == len(content)
    assert place.here(tmp_path) == {"m/weights": content}


def test_what_is_not_there_is_said_with_the_address(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{URL} .*is the address right"):
        place.fetch(tmp_path)
    done = CliRunner().invoke(cli.app, ["pull", "s3://nobody/x", "--cache-dir", str(tmp_path)])
    assert done.exit_code != 0


def test_credentials_that_are_missing_or_refused_are_said_with_what_to_set(
    place: Place, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put(**FILES)
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    with monkeypatch.context() as patch:
        for name in names:
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "nothing"))
        with pytest.raises(ConfigurationError, match=f"{URL} .*AWS_ACCESS_KEY_ID"):
            place.fetch(tmp_path)
    _check_keys(endpoint, after="0")
    try:
        with pytest.raises(ConfigurationError, match=f"{URL} .*AWS_ACCESS_KEY_ID"):
            place.fetch(tmp_path)
    finally:
        _check_keys(endpoint, after="inf")
    assert place.fetch(tmp_path) == sum(map(len, FILES.values()))


def _check_keys(endpoint: str, after: str) -> None:
    """Have the service refuse keys that it does not know, after so many requests."""
    request = urllib.request.Request(
        f"{endpoint}/moto-api/reset-auth", after.encode(), {"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).close()
