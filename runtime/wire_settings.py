"""The trace and log settings that Triton's clients read and write, and what they mean here.

The server writes no trace files, so tracing is off and cannot be turned on; the other settings are kept
as they are given, for clients that write them and read them back.  Log settings choose the level of the
supervisor, the front ends, the workers and the mover: the finest that is on.  Where a log goes is the
operator's business alone.

Invariants
 1. A change is taken whole or not at all.
 2. A model's settings are the server's, but for what was set for the model itself.

Pure; raises BadRequest.  Called by `client_books`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from overcommit.runtime.config import TRACED_MODELS_MAX
from overcommit.runtime.errors import BadRequest

_DEFAULTS: Final[dict[str, object]] = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
_LOWEST: Final = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}
_NUMBER_MAX: Final = (1 << 31) - 1


class TraceSettings:
    """Of the server, and of single models."""

    def __init__(self) -> None:
        self._server: dict[str, object] = {}
        self._models: dict[str, dict[str, object]] = {}

    def of(self, model: str) -> dict[str, object]:
        """Return the settings of a model; of the server, where `model` is empty."""
        return {**_DEFAULTS, **self._server, **self._models.get(model, {})}

    def change(self, model: str, changes: dict[str, object]) -> None:
        """Set what is given; None: as it was before it was set.  Unknown names are ignored."""
        own = dict(self._models.get(model, {}) if model else self._server)
        for name, value in changes.items():
            if name not in _DEFAULTS:
                continue
            if value is None:
                own.pop(name, None)
            else:
                own[name] = _checked_trace(name, value)
        if not model:
            self._server = own
        elif own:
            if model not in self._models and len(self._models) >= TRACED_MODELS_MAX:
                raise BadRequest(
                    f"model '{model}': {TRACED_MODELS_MAX} models have trace settings of their "
                    f"own, which is the limit; clear those of another (null)"
                )
            self._models[model] = own
        else:
            self._models.pop(model, None)


def _checked_trace(name: str, value: object) -> object:
    if name == "trace_file":
        raise BadRequest("trace file location can not be updated through network protocol")
    if name == "trace_mode":
        raise BadRequest("trace mode can not be updated through network protocol")
    if name == "trace_level":
        levels = value if isinstance(value, list) else [value]
        for level in levels:
            if level in ("TIMESTAMPS", "TENSORS"):
                raise BadRequest(
                    f"Attempting to set invalid trace setting: trace_level {level}; this server "
                    f"writes no trace files, its times are in the statistics and metrics"
                )
            if not isinstance(level, str):
                raise BadRequest("Unable to parse 'trace_level': it is a list of strings")
        return ["OFF"]
    text = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise BadRequest(f"Unable to parse '{name}', got: {value}")
    try:
        number = int(str(text)[:32])
    except ValueError as error:
        raise BadRequest(f"Unable to parse '{name}', got: {str(text)[:100]}") from error
    if not _LOWEST[name] <= number <= _NUMBER_MAX:
        raise BadRequest(
            f"Unable to parse '{name}', got: {number}; it is {_LOWEST[name]} to {_NUMBER_MAX}"
        )
    return str(number)


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is logged; in the order in which Triton writes it."""

    log_file: str = ""
    log_info: bool = True
    log_warning: bool = True
    log_error: bool = True
    log_verbose_level: int = 0
    log_format: str = "default"

    @classmethod
    def of(cls, level: str) -> LogSettings:
        """Return the settings of a server that was started with this level."""
        names = ("debug", "info", "warning", "error")
        rank = names.index(level.lower()) if level.lower() in names else 1
        return cls(
            log_info=rank <= 1, log_warning=rank <= 2, log_verbose_level=1 if rank == 0 else 0
        )

    @property
    def level(self) -> str:
        """The finest level that is on, as `logging` names it."""
        if self.log_verbose_level:
            return "DEBUG"
        if self.log_info:
            return "INFO"
        if self.log_warning:
            return "WARNING"
        return "ERROR" if self.log_error else "CRITICAL"

    def changed(self, changes: dict[str, object]) -> LogSettings:
        """Return the settings with what is given; unknown names are ignored."""
        if changes.get("log_file"):
            raise BadRequest("log file location can not be updated through network protocol")
        known = {name: value for name, value in changes.items() if name in self.__struct_fields__}
        try:
            new = msgspec.convert({**self.as_dict(), **known}, LogSettings)
        except msgspec.ValidationError as error:
            raise BadRequest(f"log settings: {error}") from error
        if not 0 <= new.log_verbose_level <= _NUMBER_MAX:
            raise BadRequest("log settings: log_verbose_level is a whole number of at least 0")
        if new.log_format not in ("default", "ISO8601"):
            raise BadRequest("log settings: log_format is 'default' or 'ISO8601'")
        return new

    def as_dict(self) -> dict[str, object]:
        """Return what a client reads."""
        return msgspec.structs.asdict(self)
