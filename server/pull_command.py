"""`overcommit pull`: bring repositories from elsewhere up to date, with a bar for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from overcommit.runtime.errors import ConfigurationError, OvercommitError
from overcommit.runtime.telemetry import show_bytes
from overcommit.server.fetching import Fetcher, is_url
from overcommit.server.settings import DEFAULT_CACHE_DIR, ENV_PREFIX


def pull_repositories(urls: Sequence[str], cache_dir: str | None, console: Console) -> int:
    """Fetch each; return 1 if one could not be."""
    for url in urls:
        if not is_url(url) or url.startswith("file://"):
            raise ConfigurationError(
                f"'{url}' is here already: give a URL, as in s3://bucket/models"
            )
    chosen = cache_dir or os.environ.get(f"{ENV_PREFIX}CACHE_DIR") or DEFAULT_CACHE_DIR
    folder = os.path.abspath(os.path.expanduser(chosen))
    failed = 0
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, TimeRemainingColumn(), console=console
    ) as bars:
        for url in urls:
            task = bars.add_task(escape(url), total=None)
            try:
                fetcher = Fetcher(url, folder, _to_bar(bars, task))
                came = fetcher.fetch()
            except OvercommitError as error:
                failed += 1
                console.print(f"[red]{escape(error.message)}[/]", highlight=False, soft_wrap=True)
                continue
            text = (
                f"{escape(url)}: {show_bytes(came)} fetched"
                if came
                else f"{escape(url)}: up to date"
            )
            console.print(
                f"{text}, in {escape(str(fetcher.models))}", highlight=False, soft_wrap=True
            )
    return 1 if failed else 0


def _to_bar(bars: Progress, task: TaskID) -> Callable[[int, int], None]:
    return lambda done, total: bars.update(task, completed=done, total=total)
