"""`overcommit pack`: make every image of some repositories now, in this process.

The server finds them in the pack index and starts without packing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

from overcommit.runtime import repository
from overcommit.runtime.config import imaged
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.packer_messages import Pack, PackDone
from overcommit.runtime.registry import Registry
from overcommit.server.tables import PackRow, pack_table

PackOne = Callable[[Pack, Callable[[int, int], None]], PackDone]


def pack_repositories(
    roots: tuple[str, ...],
    cache_dir: str,
    allow_code: bool,
    console: Console,
    pack_one: PackOne,
    *,
    packs: bool = False,
) -> int:
    """Pack what has no image yet and print a table; return 1 if a version could not be packed.

    `packs`: with weights in their packed form.
    """
    registry = Registry(cache_dir, packs=packs)
    try:
        changes = registry.apply_scan(repository.scan(roots))
    except OSError as error:
        raise ConfigurationError(f"a repository cannot be read: {error}") from error
    seconds: dict[int, float] = {}
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        for number, slot in enumerate(changes.to_pack):
            entry = registry.by_slot(slot)
            assert entry is not None, "a slot to pack is registered"
            count = f"({number + 1} of {len(changes.to_pack)})"
            task = progress.add_task(f"{entry.name} {entry.version} {count}", total=None)
            started_s = time.monotonic()
            done = pack_one(_job(entry, cache_dir, allow_code, packs), _to_bar(progress, task))
            seconds[slot] = time.monotonic() - started_s
            registry.on_packed(slot, done)
            progress.remove_task(task)
    rows = [_row(entry, seconds.get(entry.slot)) for entry in registry.entries()]
    console.print(pack_table(rows))
    failed = [row for row in rows if row.error]
    for row in failed:
        text = f"{escape(row.name)} version {escape(row.version)}: {escape(row.error)}"
        console.print(text, highlight=False, soft_wrap=True)
    console.print(f"{len(rows) - len(failed)} versions are ready to serve, {len(failed)} are not")
    return 1 if failed else 0


def _job(entry: Entry, cache_dir: str, allow_code: bool, packs: bool) -> Pack:
    return Pack(
        job=entry.slot,
        name=entry.name,
        version=entry.version,
        folder=entry.folder,
        config=imaged(entry.config),
        cache_dir=cache_dir,
        allow_code=allow_code,
        packs=packs,
    )


def _to_bar(progress: Progress, task: TaskID) -> Callable[[int, int], None]:
    return lambda done, total: progress.update(task, completed=done, total=total)


def _row(entry: Entry, seconds: float | None) -> PackRow:
    error = "" if entry.state is State.READY else entry.reason or "it could not be packed"
    return PackRow(entry.name, entry.version, entry.engine, entry.nbytes, seconds, error)
