"""`overcommit prune`: remove what nothing has needed for long from the cache folder, now.

Servers do it by themselves (`--cache-keep-days`).  One that runs says every hour what it needs, so that
it is safe beside any number of them.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.image_cache import prune
from overcommit.runtime.pack_limits import DAY_S


def prune_cache(cache_dir: str, keep_days: float, console: Console, *, is_dry: bool) -> int:
    """Remove, or count, and say what; return 1 if something could not be removed.

    Raises ConfigurationError where there is no such folder.
    """
    if not Path(cache_dir).is_dir():
        raise ConfigurationError(f"there is no cache folder {cache_dir}: name one by --cache-dir")
    with console.status(f"looking through {cache_dir}"):
        removed = prune(cache_dir, set(), time.time(), keep_days * DAY_S, is_dry=is_dry)
    verb = "would remove" if is_dry else "removed"
    console.print(f"{cache_dir}: {verb} {removed}; {removed.kept:,} are kept", soft_wrap=True)
    if removed.failed:
        console.print(f"not all of it: {removed.failed}", soft_wrap=True)
    return 1 if removed.failed else 0
