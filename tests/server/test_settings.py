"""Flags and variables: read, checked, refused in words."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from overcommit.runtime.config import Settings
from overcommit.runtime.errors import ConfigurationError
from overcommit.server.settings import ServeSettings, load_settings, parse_size


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("OVERCOMMIT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "models").mkdir()


def load(tmp_path: Path, **flags: object) -> Settings:
    return load_settings({"repositories": (str(tmp_path / "models"),), **flags})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("12345", 12345),
        (7, 7),
        ("10B", 10),
        ("1KB", 1000),
        ("1k", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 * 1024**2),
        ("512mib", 512 * 1024**2),
        ("1GB", 10**9),
        ("1.5 GiB", 3 * 1024**3 // 2),
        ("2Gi", 2 * 1024**3),
        (" 1TB ", 10**12),
    ],
)
def test_a_size_is_read_with_its_unit(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "x", "-1", "1XB", "1iB", "1e9", "GB", "1 2", "99999TB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_without_flags_the_settings_are_the_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path)
    folder = str(tmp_path / "models")
    cache = str(tmp_path / "home/.cache/overcommit")
    assert settings == Settings(repositories=(folder,), cache_dir=cache, grpc_port=8001)
    assert os.path.isdir(cache)


def test_every_flag_arrives(tmp_path: Path) -> None:
    flags = {
        "host": "::1",
        "port": "0",
        "front_ends": "2",
        "workers": "3",
        "worker_threads": "4",
        "devices": "1",
        "device_memory": "1GB",
        "host_memory": "0",
        "host_packing": "on",
        "cache_dir": str(tmp_path / "c"),
        "allow_code": True,
        "policy": "lru",
        "policy_half_life": "3600",
        "min_resident": "1.5",
        "ttl": "300",
        "metrics_models": "7",
        "admission": False,
        "damping": False,
        "prefetch": False,
        "prefetch_rate": "1MiB",
        "prefetch_share": "0.2",
        "start_method": "spawn",
        "verify": "always",
        "payload_memory": "32MiB",
        "max_body": "1MiB",
        "client_shared_memory": True,
        "load_overrides": True,
        "request_timeout": "1.5",
        "drain_timeout": "2",
        "scan_interval": "0.3",
        "pack_timeout": "90",
        "cache_keep_days": "30",
        "spin_us": "20",
        "log_level": "debug",
        "ssl_certfile": "",
        "ssl_keyfile": "",
        "grpc": True,
        "grpc_port": "7001",
    }
    assert flags.keys() | {"repositories"} == ServeSettings.model_fields.keys()
    assert load(tmp_path, **flags) == Settings(
        repositories=(str(tmp_path / "models"),),
        host="::1",
        port=0,
        front_ends=2,
        workers=3,
        worker_threads=4,
        devices="1",
        device_memory_bytes=10**9,
        host_memory_bytes=0,
        host_packing="on",
        cache_dir=str(tmp_path / "c"),
        allow_code=True,
        policy="lru",
        policy_half_life_s=3600.0,
        min_resident_s=1.5,
        ttl_s=300.0,
        metrics_models=7,
        admission=False,
        damping=False,
        prefetch=False,
        prefetch_bytes_per_s=1024 * 1024,
        prefetch_share=0.2,
        start_method="spawn",
        verify="always",
        payload_bytes=32 * 1024**2,
        body_bytes_max=1024**2,
        client_shared_memory=True,
        load_overrides=True,
        request_timeout_ms=1500,
        drain_timeout_s=2,
        scan_interval_s=0.3,
        pack_timeout_s=90,
        cache_keep_days=30,
        spin_ns=20_000,
        log_level="debug",
        grpc_port=7001,
    )


def test_a_flag_wins_over_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERCOMMIT_WORKERS", "5")
    monkeypatch.setenv("OVERCOMMIT_DEVICE_MEMORY", "2GiB")
    monkeypatch.setenv("OVERCOMMIT_PORT", "")
    monkeypatch.setenv("OVERCOMMIT_CHILD_LOG_LEVEL", "not ours to read")
    settings = load(tmp_path, workers="2", device_memory=None)
    assert (settings.workers, settings.device_memory_bytes) == (2, 2 * 1024**3)
    assert settings.port == 8000


def test_repositories_can_come_from_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more").mkdir()
    folders = (str(tmp_path / "models"), str(tmp_path / "more"))
    monkeypatch.setenv("OVERCOMMIT_REPOSITORIES", os.pathsep.join(folders))
    assert load_settings({"repositories": None}).repositories == folders


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("port", "65536"),
        ("port", "http"),
        ("workers", "0"),
        ("workers", "65"),
        ("front_ends", "33"),
        ("device_memory", "lots"),
        ("payload_memory", "10"),
        ("request_timeout", "0"),
        ("scan_interval", "0"),
        ("verify", "sometimes"),
        ("start_method", "fork"),
        ("policy", "nope"),
        ("log_level", "loud"),
        ("host", ""),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag_and_itself(
    tmp_path: Path, flag: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, **{flag: value})
    assert caught.value.message.startswith(f"--{flag.replace('_', '-')} is {value!r}: ")
    if value:
        monkeypatch.setenv(f"OVERCOMMIT_{flag.upper()}", value)
        with pytest.raises(ConfigurationError, match=f"OVERCOMMIT_{flag.upper()}"):
            load(tmp_path)


def test_every_wrong_value_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--port .*; --workers "):
        load(tmp_path, port="x", workers="y")


def test_no_repository_says_how_to_give_one() -> None:
    with pytest.raises(ConfigurationError, match="overcommit demo"):
        load_settings({})


@pytest.mark.parametrize(
    ("name", "said"), [("nowhere", "does not exist"), ("file", "is no folder")]
)
def test_a_repository_that_is_no_folder_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match=said):
        load_settings({"repositories": (str(tmp_path / name),)})


def test_a_repository_that_is_given_twice_counts_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "models")
    assert load_settings({"repositories": (folder, folder + "/")}).repositories == (folder,)


@pytest.mark.parametrize("inside", ["", "cache", "a/b"])
def test_a_cache_inside_a_repository_is_refused(tmp_path: Path, inside: str) -> None:
    with pytest.raises(ConfigurationError, match="inside the model repository"):
        load(tmp_path, cache_dir=str(tmp_path / "models" / inside))


def test_a_hidden_cache_inside_a_repository_is_fine(tmp_path: Path) -> None:
    assert load(tmp_path, cache_dir=str(tmp_path / "models" / ".cache"))


def test_a_repository_inside_the_cache_is_fine(tmp_path: Path) -> None:
    assert load(tmp_path, cache_dir=str(tmp_path))


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="--cache-dir"):
        load(tmp_path, cache_dir=str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize(
    ("flags", "port"),
    [
        ({}, 8001),
        ({"port": "9000"}, 9001),
        ({"port": "0"}, 0),
        ({"port": "65535"}, 8001),
        ({"grpc_port": "7000"}, 7000),
        ({"grpc_port": "auto"}, 0),
        ({"grpc_port": "0"}, None),
        ({"grpc": False}, None),
        ({"grpc": False, "grpc_port": "7000"}, None),
        ({"grpc": True, "grpc_port": "0"}, 8001),
    ],
)
def test_grpc_has_the_port_behind_that_of_http(
    tmp_path: Path, flags: dict[str, object], port: int | None
) -> None:
    assert load(tmp_path, **flags).grpc_port == port


def test_without_protobuf_grpc_is_off_or_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name.startswith("google") else find(name, *more),
    )
    assert load(tmp_path).grpc_port is None
    for flags in ({"grpc": True}, {"grpc_port": "8001"}):
        with pytest.raises(ConfigurationError, match=r"pip install 'overcommit\[grpc\]'"):
            load(tmp_path, **flags)


def test_paths_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder = os.path.join(tmp_path, os.fsdecode(b"bad\xff"))
    os.mkdir(folder)
    for flags in ({"repositories": (folder,)}, {"cache_dir": folder}):
        with pytest.raises(ConfigurationError, match=r"bad\\xff is no UTF-8"):
            load(tmp_path, **flags)
