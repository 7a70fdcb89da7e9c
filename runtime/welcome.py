"""What an operator reads when the server begins to serve: where, how much, and a request to try.

Invariants
 1. A request is shown once, for the first model that can be asked in one line; not before it can be sent.

Called by the catalogue.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from overcommit.runtime.entries import Entry, to_route
from overcommit.runtime.example import example_body, example_request
from overcommit.runtime.hints import hint_of
from overcommit.runtime.house import House

log = logging.getLogger("overcommit.welcome")


class Welcome:
    """See the module."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.is_said = False
        self._is_example_shown = False

    def say(
        self, age_s: str, versions: int, ready: Sequence[Entry], to_pack: int, broken: int
    ) -> None:
        """Say that the server serves, after so many seconds."""
        self.is_said = True
        house = self._house
        if house.fleet.grpc_port is not None:
            log.info("gRPC on %s:%d", house.settings.host, house.fleet.grpc_port)
        log.info(
            "serving on %s after %s s: %d versions, %d ready to use, %d to pack%s",
            *(self._url(), age_s, versions, len(ready), to_pack),
            f", {broken} that cannot be served" if broken else "",
        )
        if not versions:
            for hint in filter(None, map(hint_of, house.settings.repositories)):
                log.warning("nothing to serve: %s", hint)
        for site in house.sites:
            log.info("%s", site.residency)
        for entry in ready:
            self.show_example(entry)

    def show_example(self, entry: Entry) -> None:
        """Print a request to try, for a model that is ready."""
        if not self.is_said or self._is_example_shown:
            return
        route = to_route(entry)
        if example_body(route) is not None:
            self._is_example_shown = True
            print(example_request(self._url(), route), flush=True)

    def _url(self) -> str:
        settings = self._house.settings
        scheme = "https" if settings.ssl_certfile else "http"
        return f"{scheme}://{settings.host}:{self._house.fleet.port}"
