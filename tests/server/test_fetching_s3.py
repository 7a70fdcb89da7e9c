"""Repositories on S3, as a real S3 service over HTTP serves them (moto's server, through s3fs)."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from overcommit.runtime.errors import ConfigurationError, Unavailable
from overcommit.server import cli, fetching
from overcommit.server.fetching import Fetcher, folder_of

URL = "s3://models/team"
FILES = {"a/1/model.onnx": b"one" * 1000, "a/config.pbtxt": b"", "b/w": b"flat" * 1000}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 file system with the empty bucket `models`; the fetcher finds the same one."""
    for name, value in (
        *(("AWS_ENDPOINT_URL_S3", endpoint), ("AWS_ACCESS_KEY_ID", "test")),
        *(("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1")),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    file_system = s3fs.S3FileSystem()
    file_system.mkdir("models")
    yield file_system
    file_system.rm("models", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def put(bucket: Any, **files: bytes) -> None:
    for path, content in files.items():
        bucket.pipe(f"models/team/{path}", content)
    bucket.invalidate_cache()


def fetch(cache: Path) -> int:
    s3fs.S3FileSystem.clear_instance_cache()  # as a process of its own
    return Fetcher(URL, str(cache), lambda done, total: None).fetch()


def here(cache: Path) -> dict[str, bytes]:
    root = Path(folder_of(URL, str(cache)))
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_everything_comes_once_and_then_only_what_has_changed(bucket: Any, tmp_path: Path) -> None:
    put(bucket, **FILES)
    assert fetch(tmp_path) == sum(map(len, FILES.values()))
    assert here(tmp_path) == FILES
    assert fetch(tmp_path) == 0
    # As long as before: the tag alone says that it is another.
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
    whole = s3fs.S3FileSystem.cat_file

    def cut(self: Any, path: str, *args: Any, start: int, end: int, **more: Any) -> bytes:
        asked.append(start)
        if len(asked) == 3:
            raise ConnectionResetError("cut")
        return bytes(whole(self, path, *args, start=start, end=end, **more))

    monkeypatch.setattr(s3fs.S3FileSystem, "cat_file", cut)
    with pytest.raises(Unavailable, match="broke off at byte 8192 of 16384"):
        fetch(tmp_path)
    assert here(tmp_path) == {}
    assert fetch(tmp_path) == len(content)
    assert asked == [0, 4096, 8192, 8192, 12288]
    assert here(tmp_path) == {"m/weights": content}


def test_bytes_that_do_not_fit_their_tag_are_not_served(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, **{"m/weights": b"right"})
    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "cat_file", lambda *args, **more: b"wrong")
        with pytest.raises(Unavailable, match="has the md5"):
            fetch(tmp_path)
    assert here(tmp_path) == {}
    assert fetch(tmp_path) == 5
    assert here(tmp_path) == {"m/weights": b"right"}


def test_an_object_in_parts_is_checked_by_its_size(bucket: Any, tmp_path: Path) -> None:
    content = bytes(6 << 20)
    with bucket.open("models/team/m/weights", "wb", block_size=5 << 20) as file:
        file.write(content)
    assert "-" in bucket.info("models/team/m/weights")["ETag"]  # no digest of its bytes
    assert fetch(tmp_path) == len(content)
    assert here(tmp_path) == {"m/weights": content}


def test_what_is_not_there_is_said_with_the_address(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{URL} .*is the address right"):
        fetch(tmp_path)
    done = CliRunner().invoke(cli.app, ["pull", "s3://nobody/x", "--cache-dir", str(tmp_path)])
    assert done.exit_code != 0


def test_credentials_that_are_missing_or_refused_are_said_with_what_to_set(
    bucket: Any, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, **FILES)
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    with monkeypatch.context() as patch:
        for name in names:
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "nothing"))
        with pytest.raises(ConfigurationError, match=f"{URL} .*AWS_ACCESS_KEY_ID"):
            fetch(tmp_path)
    _check_keys(endpoint, after="0")
    try:
        with pytest.raises(ConfigurationError, match=f"{URL} .*AWS_ACCESS_KEY_ID"):
            fetch(tmp_path)
    finally:
        _check_keys(endpoint, after="inf")
    assert fetch(tmp_path) == sum(map(len, FILES.values()))


def _check_keys(endpoint: str, after: str) -> None:
    """Have the service refuse keys that it does not know, after so many requests."""
    request = urllib.request.Request(
        f"{endpoint}/moto-api/reset-auth", after.encode(), {"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).close()
