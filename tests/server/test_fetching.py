"""Repositories elsewhere: fetched whole, checked, resumed, exchanged at once."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from overcommit.runtime.errors import ConfigurationError, Unavailable
from overcommit.server import cli, fetching
from overcommit.server.fetching import Fetcher, folder_of, is_url
from overcommit.server.mirror import RemoteFile, check_path, plan
from overcommit.server.settings import load_settings

URL = "memory://models"


@pytest.fixture
def remote() -> Iterator[Any]:
    file_system = fsspec.filesystem("memory")
    file_system.store.clear()
    yield file_system
    file_system.store.clear()


def write(remote: Any, **files: bytes) -> None:
    for path, content in files.items():
        remote.pipe(f"/models/{path}", content)


def fetch(cache: Path, url: str = URL) -> int:
    return Fetcher(url, str(cache), lambda done, total: None).fetch()


def here(cache: Path, url: str = URL) -> dict[str, bytes]:
    root = Path(folder_of(url, str(cache)))
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


FILES = {"a/1/w": b"one", "a/2/w": b"two", "a/config.pbtxt": b"", "b/w": b"flat" * 1000}


def test_everything_comes_once_and_then_only_what_has_changed(remote: Any, tmp_path: Path) -> None:
    write(remote, **FILES)
    write(remote, **{".hidden/x": b"no", "README": b"no"})
    assert fetch(tmp_path) == sum(map(len, FILES.values()))
    assert here(tmp_path) == FILES
    assert fetch(tmp_path) == 0
    write(remote, **{"a/2/w": b"two again", "a/2/more": b"+"})
    assert fetch(tmp_path) == len(b"two again+")
    assert here(tmp_path) == {**FILES, "a/2/w": b"two again", "a/2/more": b"+"}
    home = Path(folder_of(URL, str(tmp_path))).parent
    assert sorted(path.name for path in home.iterdir()) == ["lock", "mirror.json", "models"]


def test_what_is_gone_elsewhere_goes_and_what_was_cut_here_comes_again(
    remote: Any, tmp_path: Path
) -> None:
    write(remote, **FILES)
    fetch(tmp_path)
    remote.rm("/models/a/1", recursive=True)
    remote.rm("/models/b", recursive=True)
    root = Path(folder_of(URL, str(tmp_path)))
    (root / "a" / "2" / "w").write_bytes(b"")
    fetch(tmp_path)
    assert here(tmp_path) == {"a/2/w": b"two", "a/config.pbtxt": b""}
    assert sorted(path.name for path in root.iterdir()) == ["a"]


def test_a_model_that_gets_version_folders_is_made_anew(remote: Any, tmp_path: Path) -> None:
    write(remote, **{"a/w": b"flat"})
    fetch(tmp_path)
    write(remote, **{"a/1/w": b"one"})
    remote.rm("/models/a/w")
    fetch(tmp_path)
    assert here(tmp_path) == {"a/1/w": b"one"}
    write(remote, **{"a/w": b"flat again"})
    remote.rm("/models/a/1", recursive=True)
    fetch(tmp_path)
    assert here(tmp_path) == {"a/w": b"flat again"}


def test_a_version_is_never_seen_half(remote: Any, tmp_path: Path) -> None:
    write(remote, **{f"a/1/{n}": b"old" for n in range(50)})
    fetch(tmp_path)
    root = Path(folder_of(URL, str(tmp_path))) / "a" / "1"
    write(remote, **{f"a/1/{n}": b"newer" for n in range(50)})
    seen: set[tuple[int, int]] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            folder = os.open(root, os.O_RDONLY)
            sizes = {os.stat(name, dir_fd=folder).st_size for name in os.listdir(folder)[:]}
            seen.add((len(os.listdir(folder)), len(sizes)))
            os.close(folder)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        fetch(tmp_path)
    finally:
        done.set()
        watcher.join()
    assert {one for _, one in seen} <= {0, 1}  # a folder that was exchanged may be on its way out


def test_an_empty_place_and_unsafe_names_are_refused(remote: Any, tmp_path: Path) -> None:
    with pytest.raises((ConfigurationError, Unavailable)):
        fetch(tmp_path)
    for path in ("a/../../x", "a//x", "a/\\x"):
        with pytest.raises(ConfigurationError):
            check_path(path)
    assert check_path("a/.git/x") is None


@settings(max_examples=200, deadline=None)
@given(
    *[
        st.dictionaries(
            st.sampled_from(["a/1/x", "a/1/y", "a/2/x", "a/t", "b/x", "b/d/x", "c/1/x"]),
            st.builds(RemoteFile, size=st.integers(0, 1), mark=st.sampled_from("mn")),
        )
    ]
    * 2
)
def test_a_plan_makes_whole_units_of_all_that_differs(wanted: Any, had: Any) -> None:
    work = plan(wanted, had)
    made = {path for paths in work.units.values() for path in paths}
    assert {path for path in wanted if had.get(path) != wanted[path]} <= made <= set(wanted)
    for unit, paths in work.units.items():
        assert {p for p in wanted if p == unit or p.startswith(f"{unit}/")} == set(paths)
    for path in set(had) - set(wanted):
        unit = next(
            (u for u in [*work.units, *work.gone] if path == u or path.startswith(f"{u}/")), None
        )
        assert unit is not None
    assert not plan(wanted, wanted).units


# --- over HTTP ------------------------------------------------------------------------------------
CONTENT = bytes(range(256)) * 4096


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with ranges or without; breaks off as often as it is told."""

    breaks = 0
    ranges: ClassVar[list[str]] = []
    knows_ranges = True
    tag = '"1"'

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def end_headers(self) -> None:
        if not self.path.endswith("/"):
            self.send_header("ETag", self.tag)
            if self.knows_ranges:
                self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        kind = type(self)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_GET()
            return
        content, status = path.read_bytes(), 200
        wanted = self.headers.get("Range")
        if wanted and kind.knows_ranges:
            kind.ranges.append(wanted)
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            content, status = content[int(start) : int(end or len(content)) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        # Not before something is there to go on from.
        is_late = not kind.knows_ranges or (wanted or "").startswith("bytes=262144")
        if kind.breaks and self.command == "GET" and len(content) > 1000 and is_late:
            kind.breaks -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "site" / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(CONTENT)
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    Handler.breaks, Handler.knows_ranges, Handler.tag, Handler.ranges = 0, True, '"1"', []
    served = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *arguments: Handler(*arguments, directory=str(tmp_path / "site")),
    )
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}/"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_transfer_that_breaks_off_goes_on(
    site: str, tmp_path: Path, knows_ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Handler.knows_ranges, Handler.breaks = knows_ranges, 2
    monkeypatch.setattr(fetching, "PIECE_BYTES", 1 << 18)
    fetch(tmp_path, site)
    assert here(tmp_path, site) == {"m/1/weights": CONTENT}


def test_the_next_fetch_goes_on_where_one_broke_off(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "TRIES", 1)
    monkeypatch.setattr(fetching, "PIECE_BYTES", 1 << 18)
    Handler.breaks = 1
    with pytest.raises(Unavailable, match="goes on from there"):
        fetch(tmp_path, site)
    assert here(tmp_path, site) == {}
    (part,) = (Path(folder_of(site, str(tmp_path))).parent / "parts").rglob("weights")
    begun = part.stat().st_size
    assert begun == 1 << 18
    fetch(tmp_path, site)
    assert here(tmp_path, site) == {"m/1/weights": CONTENT}
    starts = [int(text.removeprefix("bytes=").partition("-")[0]) for text in Handler.ranges]
    assert [start for start in starts if start != 1] == [0, begun, begun, 2 * begun, 3 * begun]


def test_a_file_whose_digest_is_wrong_is_not_put_in_place(site: str, tmp_path: Path) -> None:
    Handler.tag = '"0123456789abcdef0123456789abcdef"'
    with pytest.raises(Unavailable, match="md5"):
        fetch(tmp_path, site)
    assert here(tmp_path, site) == {}


# --- for people -----------------------------------------------------------------------------------
def test_the_command_fetches_and_says_where(site: str, tmp_path: Path) -> None:
    arguments = ["pull", site, "--cache-dir", str(tmp_path / "cache")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "fetched" in result.output
    assert "up to date" in CliRunner().invoke(cli.app, arguments).output
    nowhere = ["pull", "http://127.0.0.1:9/", "--cache-dir", str(tmp_path / "cache")]
    assert CliRunner().invoke(cli.app, nowhere).exit_code == 1


def test_what_was_fetched_before_is_served_while_its_place_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "site" / "m", tmp_path / "cache"
    folder.mkdir(parents=True)
    (folder / "net.onnx").write_bytes(b"no model")
    served = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *arguments: Handler(*arguments, directory=str(tmp_path / "site")),
    )
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{served.server_port}/"
    monkeypatch.setattr(Handler, "breaks", 0)
    arguments = ["check", url, "--cache-dir", str(cache)]
    first = CliRunner().invoke(cli.app, arguments)
    served.shutdown()
    served.server_close()
    again = CliRunner().invoke(cli.app, arguments)
    assert "1 versions will be served" in first.output
    assert again.output == first.output
    pulled = CliRunner().invoke(cli.app, ["pull", *arguments[1:]])
    assert pulled.exit_code == 75
    assert "what was fetched before is still here" in pulled.output
    never = CliRunner().invoke(cli.app, ["check", url, "--cache-dir", str(tmp_path / "other")])
    assert never.exit_code == 2


@pytest.mark.parametrize("status", [404, 503])
def test_a_folder_that_cannot_be_listed_just_now_is_not_taken_for_gone(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    fetch(tmp_path, site)
    listing = Handler.send_head

    def refuse(self: Handler) -> Any:
        if self.path == "/m/1/":
            self.send_error(status)
            return None
        return listing(self)

    monkeypatch.setattr(Handler, "send_head", refuse)
    fsspec.get_filesystem_class("http").clear_instance_cache()
    with pytest.raises((ConfigurationError, Unavailable), match=site):
        fetch(tmp_path, site)
    assert here(tmp_path, site) == {"m/1/weights": CONTENT}


def test_urls_are_served_from_their_folders_here(tmp_path: Path) -> None:
    def bring(urls: list[str], cache_dir: str) -> None:
        assert urls == ["s3://bucket/models"]
        Path(folder_of(urls[0], cache_dir)).mkdir(parents=True)

    (tmp_path / "own").mkdir()
    given: dict[str, object] = {
        "repositories": ("s3://bucket/models", f"file://{tmp_path}/own"),
        "cache_dir": str(tmp_path / "cache"),
    }
    served = load_settings(given, bring).repositories
    assert served[1] == str(tmp_path / "own")
    assert served[0].startswith(str(tmp_path / "cache"))
    assert is_url("hf://a/b")
    assert not is_url("/a:/b")
