"""What clients have told the server to remember: shared memory regions, trace and log settings.

A client tells one front end; all of them have to know, and one that is started later too.  So it is
written here, in the supervisor, and told to every front end before the client is answered: a front end
reads its control socket before it says that it knows no such region.

Invariants
 1. A region's name is there once, and stays until it is removed; at most REGIONS_MAX are there.
 2. Whoever is told of a change is told before the change is answered.
 3. No file is opened here: that is the front ends' part.

Called by administration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import msgspec

from overcommit.runtime.children import Child
from overcommit.runtime.config import REGIONS_MAX
from overcommit.runtime.errors import BadRequest
from overcommit.runtime.front_end_messages import Admin, Region, RegionsChanged
from overcommit.runtime.house import House
from overcommit.runtime.messages import LogLevel
from overcommit.runtime.wire_settings import LogSettings, TraceSettings

log = logging.getLogger("overcommit")

_Key = tuple[str, int, int]


class ClientBooks:
    """Answers the operations `region_add`, `region_remove`, `trace` and `log`."""

    def __init__(self, house: House, set_packer_level: Callable[[str], None]) -> None:
        self._set_packer_level = set_packer_level
        self._house = house
        self._regions: dict[str, Region] = {}
        self._told: set[_Key] = set()  # children that know all that they have to
        self._is_level_set = False
        self._trace = TraceSettings()
        self._log = LogSettings.of(house.settings.log_level)
        self.operations: dict[str, Callable[[Admin], bytes]] = {
            "region_add": self._add_region,
            "region_remove": self._remove_region,
            "trace": self._set_trace,
            "log": self._set_log,
        }

    def tell_new(self) -> None:
        """Tell children that are new what the others know; front ends, before they hear of any model."""
        for child in self._house.fleet.children.values():
            if _key(child) in self._told:
                continue
            self._told.add(_key(child))
            if child.seat.kind == "front_end":
                for region in self._regions.values():  # each a message: names may be long
                    child.post(RegionsChanged(upsert=(region,)))
            if self._is_level_set:  # who was forked has the level of the fork server's start
                child.post(LogLevel(level=self._log.level))

    # --- shared memory --------------------------------------------------------------------------
    def _add_region(self, request: Admin) -> bytes:
        try:
            region = msgspec.convert(request.arguments, Region)
        except msgspec.ValidationError as error:
            raise BadRequest(f"'region_add': {error}") from error
        if region.name in self._regions:
            raise BadRequest(f"shared memory region '{region.name}' already in manager")
        if len(self._regions) >= REGIONS_MAX:
            raise BadRequest(
                f"shared memory region '{region.name}': {REGIONS_MAX} regions are registered, "
                f"which is the limit; unregister one"
            )
        self._regions[region.name] = region
        self._tell(RegionsChanged(upsert=(region,)))
        return b"{}"

    def _remove_region(self, request: Admin) -> bytes:
        """Forget one region, or all of them; one that is not there is no error, as for Triton."""
        name = request.arguments.get("name")
        names = [each for each in self._regions if not name or each == name]
        for each in names:
            del self._regions[each]
            self._tell(RegionsChanged(removed=(each,)))
        return b"{}"

    # --- settings -------------------------------------------------------------------------------
    def _set_trace(self, request: Admin) -> bytes:
        model = str(request.arguments.get("model", ""))
        if model and not self._house.registry.has(model):
            raise BadRequest(f"Request for unknown model: '{model}' is not found")
        changes = request.arguments.get("changes")
        if changes is not None:
            self._trace.change(model, _object(str(changes)))
        return msgspec.json.encode(self._trace.of(model))

    def _set_log(self, request: Admin) -> bytes:
        changes = request.arguments.get("changes")
        if changes is not None:
            self._log = self._log.changed(_object(str(changes)))
            level = self._log.level
            logging.getLogger().setLevel(level)
            os.environ["OVERCOMMIT_CHILD_LOG_LEVEL"] = level  # of children that are started later
            self._is_level_set = True
            for child in self._house.fleet.children.values():
                if _key(child) in self._told:
                    child.post(LogLevel(level=level))
            self._set_packer_level(level)
            log.info("a client has set the log level to %s", level)
        return msgspec.json.encode(self._log.as_dict())

    def _tell(self, message: RegionsChanged) -> None:
        for front in self._house.fleet.of_kind("front_end", ready=False):
            if _key(front) in self._told:
                front.post(message)


def _key(child: Child) -> _Key:
    return child.seat.kind, *child.incarnation


def _object(text: str) -> dict[str, object]:
    value = msgspec.json.decode(text)
    if not isinstance(value, dict):
        raise BadRequest("the settings must be a JSON object")
    return value
