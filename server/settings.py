"""What the operator chose: flags, then `OVERCOMMIT_*` variables, then the defaults of `config`.

A field `device_memory` is the flag `--device-memory` and the variable `OVERCOMMIT_DEVICE_MEMORY`.

Invariants
 1. What `load_settings` returns can be served as far as one can tell without starting anything; or
    ConfigurationError names the flag, the variable, the value and what would be right.

Called by the command line.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from overcommit.runtime.config import (
    BODY_BYTES_MAX,
    FRONT_ENDS_MAX,
    HALF_LIFE_S,
    HALF_LIFE_S_MIN,
    METRICS_MODELS,
    METRICS_MODELS_MAX,
    MIB,
    PACK_TIMEOUT_S,
    PAYLOAD_BYTES,
    PREFETCH_BYTES_PER_S,
    PREFETCH_SHARE,
    REQUEST_TIMEOUT_MS,
    STAY_S_MAX,
    WORKERS_MAX,
    Settings,
)
from overcommit.runtime.device_choice import read_devices
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.model_names import is_text
from overcommit.runtime.pack_limits import CACHE_KEEP_DAYS, CACHE_KEEP_DAYS_MAX, CACHE_KEEP_DAYS_MIN
from overcommit.server import tls
from overcommit.server.fetching import folder_of, is_url

Fetch = Callable[[list[str], str], None]  # URLs, the cache folder

ENV_PREFIX: Final = "OVERCOMMIT_"
GRPC_PORT: Final = 8001  # where the HTTP port has no next one
DEFAULT_CACHE_DIR: Final = "~/.cache/overcommit"

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWER: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE_MAX: Final = 1 << 50


def parse_size(text: str | int) -> int:
    """Read `1GB` (10^9), `512MiB` (2^20 each), `1.5G`, or plain bytes.

    Raises ValueError.
    """
    found = _SIZE.fullmatch(str(text).strip())
    if found is None:
        raise ValueError("a size is a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    number, unit, binary = found.groups()
    if binary and not unit:
        raise ValueError("a size is a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    nbytes = int(float(number) * (1024 if binary else 1000) ** _POWER[unit.lower()])
    if nbytes > _SIZE_MAX:
        raise ValueError("the size is larger than any machine")
    return nbytes


def _split_paths(value: object) -> object:
    """Read /a:/b, where the colon of a URL parts nothing."""
    if not isinstance(value, str):
        return value
    return tuple(part for part in re.split(rf"{os.pathsep}(?!//)", value) if part)


def _check_keep_days(days: float) -> float:
    if days and not CACHE_KEEP_DAYS_MIN <= days <= CACHE_KEEP_DAYS_MAX:
        raise ValueError(
            f"it is 0 (nothing is removed) or from {CACHE_KEEP_DAYS_MIN:.3g} to {CACHE_KEEP_DAYS_MAX:,} "
            "days: servers that share the folder say every hour what they need"
        )
    return days


def _check_policy(name: str) -> str:
    from overcommit.runtime.policy import make_policy

    try:
        make_policy(name)
    except ConfigurationError as error:
        raise ValueError(error.message) from error
    return name


Size = Annotated[int, BeforeValidator(parse_size)]
Paths = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_paths)]
# -1: auto, a free one.
GrpcPort = Annotated[
    int, Field(ge=-1, le=65_535), BeforeValidator(lambda given: -1 if given == "auto" else given)
]
LogLevel = Literal["debug", "info", "warning", "error"]


def chosen_cache_dir(given: str | None) -> str:
    """Return the cache folder that a command means: that of its flag, of the environment, or ours."""
    chosen = given or os.environ.get(f"{ENV_PREFIX}CACHE_DIR") or DEFAULT_CACHE_DIR
    return os.path.abspath(os.path.expanduser(chosen))


class ServeSettings(BaseSettings):
    """One field per flag of `overcommit serve`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore")

    repositories: Paths = ()
    cache_dir: str = DEFAULT_CACHE_DIR
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    grpc_port: GrpcPort | None = None
    grpc: bool | None = None
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    front_ends: Annotated[int, Field(ge=1, le=FRONT_ENDS_MAX)] = 1
    workers: Annotated[int, Field(ge=1, le=WORKERS_MAX)] = 1
    worker_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    devices: Annotated[str, AfterValidator(read_devices)] = "auto"
    device_memory: Size | None = None
    host_memory: Size | None = None
    host_packing: Literal["auto", "off", "on"] = "auto"
    allow_code: bool = False
    policy: Annotated[str, AfterValidator(_check_policy)] = "cost_aware"
    policy_half_life: Annotated[float, Field(ge=HALF_LIFE_S_MIN, le=STAY_S_MAX)] = HALF_LIFE_S
    min_resident: Annotated[float, Field(ge=0, le=STAY_S_MAX)] = 0.0
    ttl: Annotated[float, Field(ge=0, le=STAY_S_MAX)] = 0.0
    metrics_models: Annotated[int, Field(ge=0, le=METRICS_MODELS_MAX)] = METRICS_MODELS
    admission: bool = True
    damping: bool = True
    prefetch: bool = True
    prefetch_rate: Annotated[Size, Field(ge=1)] = PREFETCH_BYTES_PER_S
    prefetch_share: Annotated[float, Field(ge=0, le=1)] = PREFETCH_SHARE
    start_method: Literal["forkserver", "spawn"] = "forkserver"
    verify: Literal["first", "always", "never"] = "first"
    payload_memory: Annotated[Size, Field(ge=MIB)] = PAYLOAD_BYTES
    max_body: Annotated[Size, Field(ge=1)] = BODY_BYTES_MAX
    client_shared_memory: bool = False
    load_overrides: bool = False
    request_timeout: Annotated[float, Field(gt=0, le=86_400)] = REQUEST_TIMEOUT_MS / 1000
    drain_timeout: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    scan_interval: Annotated[float, Field(ge=0.05, le=86_400)] = 2.0
    cache_keep_days: Annotated[float, AfterValidator(_check_keep_days)] = CACHE_KEEP_DAYS
    pack_timeout: Annotated[float, Field(ge=1, le=86_400)] = PACK_TIMEOUT_S
    spin_us: Annotated[float, Field(ge=0, le=1_000_000)] | None = None
    log_level: LogLevel = "info"


def load_settings(flags: dict[str, object], fetch: Fetch | None = None) -> Settings:
    """Join flags (None: not given) with the environment, and check the whole.

    Repositories elsewhere are brought here by `fetch`, and are its folders from then on.

    Raises ConfigurationError.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if not given.get("repositories"):
        given.pop("repositories", None)
    try:
        # Not checked statically: the values come as the strings that the operator typed.
        chosen = ServeSettings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError("; ".join(_complaints(error, given))) from error
    certificate, key = tls.check_files(chosen.ssl_certfile, chosen.ssl_keyfile)
    repositories = _check_repositories(_bring(chosen, fetch))
    return Settings(
        repositories=repositories,
        cache_dir=check_cache_dir(chosen.cache_dir, repositories),
        host=chosen.host,
        port=chosen.port,
        grpc_port=_choose_grpc_port(chosen),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        front_ends=chosen.front_ends,
        workers=chosen.workers,
        worker_threads=chosen.worker_threads,
        devices=chosen.devices,
        device_memory_bytes=chosen.device_memory,
        host_memory_bytes=chosen.host_memory,
        host_packing=chosen.host_packing,
        start_method=chosen.start_method,
        allow_code=chosen.allow_code,
        policy=chosen.policy,
        policy_half_life_s=chosen.policy_half_life,
        admission=chosen.admission,
        damping=chosen.damping,
        prefetch=chosen.prefetch,
        prefetch_bytes_per_s=chosen.prefetch_rate,
        prefetch_share=chosen.prefetch_share,
        min_resident_s=chosen.min_resident,
        ttl_s=chosen.ttl,
        metrics_models=chosen.metrics_models,
        verify=chosen.verify,
        payload_bytes=chosen.payload_memory,
        body_bytes_max=chosen.max_body,
        client_shared_memory=chosen.client_shared_memory,
        load_overrides=chosen.load_overrides,
        spin_ns=None if chosen.spin_us is None else int(chosen.spin_us * 1000),
        scan_interval_s=chosen.scan_interval,
        cache_keep_days=chosen.cache_keep_days,
        pack_timeout_s=chosen.pack_timeout,
        request_timeout_ms=max(1, round(chosen.request_timeout * 1000)),
        drain_timeout_s=chosen.drain_timeout,
        log_level=chosen.log_level,
    )


def _choose_grpc_port(chosen: ServeSettings) -> int | None:
    """Return the port of gRPC: 0 for a free one, None for none.

    Raises ConfigurationError when it is wanted and cannot be had.
    """
    is_wanted = chosen.grpc or (chosen.grpc is None and chosen.grpc_port not in (None, 0))
    if chosen.grpc is False or (chosen.grpc_port == 0 and not is_wanted):
        return None
    if importlib.util.find_spec("google") is None or not importlib.util.find_spec(
        "google.protobuf"
    ):
        if is_wanted:
            raise ConfigurationError(
                "gRPC needs the package protobuf: pip install 'overcommit[grpc]', or say --no-grpc"
            )
        return None
    if chosen.grpc_port == -1 or (chosen.grpc_port is None and chosen.port == 0):
        return 0
    if not chosen.grpc_port:
        return GRPC_PORT if chosen.port == 65_535 else chosen.port + 1
    return chosen.grpc_port


def _complaints(error: ValidationError, given: dict[str, object]) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = str(problem["loc"][0])
        source = f"--{name.replace('_', '-')}"
        if name not in given:
            source = f"{ENV_PREFIX}{name.upper()} (or {source})"
        text = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{source} is {problem['input']!r}: {text[:1].lower()}{text[1:]}")
    return lines


def _bring(chosen: ServeSettings, fetch: Fetch | None) -> tuple[str, ...]:
    """Replace URLs by the folders here that hold what they hold."""
    cache_dir = os.path.abspath(os.path.expanduser(chosen.cache_dir))
    urls = [path for path in chosen.repositories if is_url(path)]
    away = [url for url in urls if not url.startswith("file://")]
    if away and fetch is not None:
        fetch(away, cache_dir)
    return tuple(folder_of(p, cache_dir) if p in urls else p for p in chosen.repositories)


def _check_repositories(paths: tuple[str, ...]) -> tuple[str, ...]:
    if not paths:
        raise ConfigurationError(
            "no model repository: give a folder, as in `overcommit serve ./models`, or make one "
            "to try with `overcommit demo ./models`"
        )
    checked: list[str] = []
    for path in paths:
        folder = os.path.abspath(os.path.expanduser(path))
        if not os.path.isdir(folder):
            what = "is no folder" if os.path.exists(folder) else "does not exist"
            raise ConfigurationError(
                f"the model repository {folder} {what}: give a folder that holds one folder per "
                f"model, or make one to try with `overcommit demo {path}`"
            )
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ConfigurationError(f"the model repository {folder} cannot be read: permissions")
        _check_text("model repository", folder)
        if folder not in checked:
            checked.append(folder)
    return tuple(checked)


def _check_text(what: str, folder: str) -> None:
    """Processes tell each other paths as UTF-8."""
    if not (is_text(folder) and is_text(os.path.realpath(folder))):
        raise ConfigurationError(
            f"the path of the {what} {os.fsencode(folder).decode('utf-8', 'backslashreplace')} is no "
            f"UTF-8: rename the folder"
        )


def check_cache_dir(path: str, repositories: tuple[str, ...]) -> str:
    """Return the absolute cache folder, made and writable.

    Raises ConfigurationError.
    """
    folder = os.path.abspath(os.path.expanduser(path))
    _check_text("cache", folder)
    for repository in repositories:
        # Its folders would show up as models, and every packed image as a change.
        inside = os.path.relpath(os.path.realpath(folder), os.path.realpath(repository))
        if not inside.startswith("..") and (inside == "." or not inside.startswith(".")):
            raise ConfigurationError(
                f"the cache {folder} lies inside the model repository {repository}: choose another "
                f"--cache-dir"
            )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"the cache {folder} cannot be made: {error.strerror}; choose another --cache-dir"
        ) from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"the cache {folder} cannot be written: permissions; choose another --cache-dir"
        )
    return folder
