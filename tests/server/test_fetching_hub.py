"""Repositories on the Hugging Face hub, by its own client, from a server that answers as the hub does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hub_server import Hub, Repo
from huggingface_hub import constants, hf_file_system

from overcommit.runtime.errors import ConfigurationError, Unavailable
from overcommit.server import fetching
from overcommit.server.fetching import Fetcher, folder_of

URL = "hf://team/net"
WEIGHTS = bytes(range(256)) * 64  # 16 KiB: kept apart
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "1_Pooling/config.json": b"[]"}
HERE = {f"net/{path}": content for path, content in FILES.items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with `team/net`; the client, which read its environment when it was imported, asks it."""
    served = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        served.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    served.repos["team/net"] = Repo()
    served.repos["team/net"].commit(FILES)
    yield served
    served.close()


def fetch(cache: Path, url: str = URL) -> int:
    fsspec.get_filesystem_class("hf").clear_instance_cache()  # as a process of its own
    return Fetcher(url, str(cache), lambda done, total: None).fetch()


def here(cache: Path, url: str = URL) -> dict[str, bytes]:
    root = Path(folder_of(url, str(cache)))
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def ranges_of(hub: Hub, path: str) -> list[str]:
    return [
        text.removeprefix("bytes=")
        for asked, text in hub.asked
        if asked.startswith("/large/") and asked.endswith(f"/{path}")
    ]


def test_everything_comes_once_and_then_only_what_has_changed(hub: Hub, tmp_path: Path) -> None:
    size = sum(map(len, FILES.values()))
    assert fetch(tmp_path) == size
    assert here(tmp_path) == HERE
    assert fetch(tmp_path) == 0
    # As long as before, on the same branch.
    hub.repos["team/net"].commit({**FILES, "config.json": b"[]"})
    assert fetch(tmp_path) == 2
    assert here(tmp_path) == {**HERE, "net/config.json": b"[]"}


def test_pieces_are_asked_for_as_long_as_they_are_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PIECE_BYTES", 6000)
    fetch(tmp_path)
    assert ranges_of(hub, "model.safetensors") == ["0-5999", "6000-11999", "12000-16383"]


def test_a_branch_that_moves_meanwhile_does_not_mix_two_commits(hub: Hub, tmp_path: Path) -> None:
    repo, newer = hub.repos["team/net"], {"config.json": b"{2}", "model.safetensors": WEIGHTS[::-1]}
    moved: list[str] = []

    def move(path: str) -> None:
        if not moved:
            moved.append(repo.commit(newer))

    hub.on_resolve = move
    fetch(tmp_path)
    assert moved
    assert here(tmp_path) == HERE
    fetch(tmp_path)
    assert here(tmp_path) == {f"net/{path}": content for path, content in newer.items()}


def test_a_revision_is_a_branch_a_tag_with_slashes_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repos["team/net"]
    first = repo.branches["main"]
    repo.commit({"config.json": b"of a pull request"}, branch="refs/pr/1")
    repo.commit({"config.json": b"newest"})
    for revision, expected in (
        (first, FILES["config.json"]),
        ("refs/pr/1", b"of a pull request"),
        ("main", b"newest"),
    ):
        url = f"{URL}@{revision}"
        fetch(tmp_path, url)
        assert here(tmp_path, url)["net/config.json"] == expected


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PIECE_BYTES", 4096)
    hub.breaks["model.safetensors"] = 1
    fetch(tmp_path)
    assert here(tmp_path) == HERE
    ranges = ranges_of(hub, "model.safetensors")
    assert ranges == ["0-4095", "4096-8191", "4096-8191", "8192-12287", "12288-16383"]


def test_the_next_fetch_goes_on_where_one_was_given_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PIECE_BYTES", 4096)
    monkeypatch.setattr(fetching, "TRIES", 1)
    whole = hf_file_system.http_backoff
    # The client's own tries would go on for half a minute.
    monkeypatch.setattr(
        hf_file_system,
        "http_backoff",
        lambda *given, **more: whole(*given, **{**more, "max_retries": 0}),
    )
    hub.breaks["model.safetensors"] = 1
    with pytest.raises(Unavailable, match=r"model\.safetensors broke off at byte 4096 of 16384"):
        fetch(tmp_path)
    assert here(tmp_path) == {}
    fetch(tmp_path)
    assert here(tmp_path) == HERE
    ranges = ranges_of(hub, "model.safetensors")
    assert ranges == ["0-4095", "4096-8191", "4096-8191", "8192-12287", "12288-16383"]


@pytest.mark.parametrize(
    ("path", "digest"), [("config.json", "git_sha1"), ("model.safetensors", "sha256")]
)
def test_bytes_that_do_not_fit_their_digest_are_not_served(
    hub: Hub, tmp_path: Path, path: str, digest: str
) -> None:
    hub.spoiled.add(path)
    with pytest.raises(Unavailable, match=rf"{URL}: net/{path} has the {digest}"):
        fetch(tmp_path)
    assert here(tmp_path) == {}
    hub.spoiled.clear()
    fetch(tmp_path)
    assert here(tmp_path) == HERE


def test_a_file_that_is_gone_is_said_with_its_name(hub: Hub, tmp_path: Path) -> None:
    hub.lost.add("model.safetensors")
    with pytest.raises(ConfigurationError, match=r"does not give net/model\.safetensors.*address"):
        fetch(tmp_path)
    assert here(tmp_path) == {}


def test_a_private_model_says_which_token_it_wants(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["team/net"].token = "hf_right"
    for token in ("", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ConfigurationError, match=r"hf://team/net .*HF_TOKEN to a token"):
            fetch(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch(tmp_path)
    assert here(tmp_path) == HERE


def test_names_that_nothing_has_are_said_at_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"hf://team/nobody .*is the name right"):
        fetch(tmp_path, "hf://team/nobody")
    with pytest.raises(ConfigurationError, match="a branch, a tag or a commit of it after the @"):
        fetch(tmp_path, f"{URL}@v9")
    with pytest.raises(ConfigurationError, match=r"hf://OWNER/NAME@REVISION"):
        fetch(tmp_path, "hf://net")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing is
    with pytest.raises(Unavailable, match=r"hf://team/net cannot be looked at.*try again"):
        fetch(tmp_path)


def test_the_command_brings_it_and_checks_it(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "overcommit", "pull", URL, "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert here(tmp_path) == HERE
