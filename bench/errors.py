"""What can go wrong in the harness itself, as opposed to a condition that the server misses."""

from __future__ import annotations

from overcommit.runtime.errors import OvercommitError


class BenchError(OvercommitError):
    """A scenario cannot be run or cannot be trusted: no server, no models, no references."""

    code = "bench"
