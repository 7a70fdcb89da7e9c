"""`overcommit pull`: bring repositories from elsewhere up to date, with a bar for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

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

from overcommit.runtime.errors import ConfigurationError, OvercommitError, Unavailable
from overcommit.runtime.telemetry import show_bytes
from overcommit.server.fetching import Fetcher, is_here, is_url
from overcommit.server.settings import chosen_cache_dir

EXIT_FAILED: Final = 1
EXIT_BEFORE: Final = 75  # EX_TEMPFAIL


def pull_repositories(urls: Sequence[str], cache_dir: str | None, console: Console) -> int:
    """Fetch each; return an exit status.

    EXIT_FAILED: one could not be fetched.  EXIT_BEFORE: it cannot be reached just now, but has been fetched
    whole before.
    """
    for url in urls:
        if not is_url(url) or url.startswith("file://"):
            raise ConfigurationError(
                f"'{url}' is here already: give a URL, as in s3://bucket/models"
            )
    folder = chosen_cache_dir(cache_dir)
    status = 0
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
                text = error.message
                if isinstance(error, Unavailable) and is_here(url, folder):
                    text += "; what was fetched before is still here"
                    status = status or EXIT_BEFORE
                else:
                    status = EXIT_FAILED
                console.print(f"[red]{escape(text)}[/]", highlight=False, soft_wrap=True)
                continue
            text = (
                f"{escape(url)}: {show_bytes(came)} fetched"
                if came
                else f"{escape(url)}: up to date"
            )
            console.print(
                f"{text}, in {escape(str(fetcher.models))}", highlight=False, soft_wrap=True
            )
    return status


def _to_bar(bars: Progress, task: TaskID) -> Callable[[int, int], None]:
    return lambda done, total: bars.update(task, completed=done, total=total)
