"""Serve with a wall clock that a test sets: `python wallclock.py FILE serve ...`.

The file holds local seconds since the epoch.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from overcommit.runtime import supervisor
from overcommit.server.cli import app


def main(path: str) -> None:
    """Run the command line with a supervisor that looks at this clock."""
    clock = Path(path)
    supervisor.Supervisor = functools.partial(  # type: ignore[misc,assignment]
        supervisor.Supervisor, wall_s=lambda: float(clock.read_text())
    )
    app()


if __name__ == "__main__":
    main(sys.argv.pop(1))
