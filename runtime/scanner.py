"""Looking at the repository again and again: everything at first, then a few folders at a time.

Looking at 20,000 folders takes the better part of a second of CPU.  So only the first look is at all of
them; each later one lists the roots, looks at what is new there, at what was changing the last time, and
then goes on where the one before stopped, for as long as its share of a core allows.  A small repository is
looked at whole each time.  Who loads a model has its folder looked at, and no other.  (Threads for the first
look were tried: with nothing cached, four took as long as one.)

Invariants
 1. A model that is added or removed is seen by the next look; a change inside of a model's folder is seen
    within one round, and a round takes one look or 1 / LOOK_SHARE of the time that looking needs.
 2. `sources` is ordered by root and name, and changes only when a look has seen a change: then it is
    another list, in which what has not changed are the same objects.
 3. A name that two roots hold is the first root's; more than VERSIONS_MAX versions are cut off.
 4. A root that was unmounted is one that cannot be read, not one without models.
 5. What somebody asks for is taken as it is now: he says that nobody is copying into it.

Called from the thread of `watch`.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.runtime.config import VERSIONS_MAX
from overcommit.runtime.folder_walk import is_skipped
from overcommit.runtime.known_configs import FILE_NAME, KnownConfigs
from overcommit.runtime.misfits import missing_versions
from overcommit.runtime.repository import (
    SETTLE_NS,
    Folder,
    VersionSource,
    is_lone,
    model_folders,
    scan_model,
    settled_before_ns,
)

log = logging.getLogger("overcommit.scanner")

LOOK_SHARE: Final = 0.03  # of a core, from the second look on
WHOLE_MAX: Final = 256  # models that each look is at, whatever it takes
SAVE_PERIOD_S: Final = 60.0
Sources = tuple[VersionSource, ...]


@dataclass(slots=True)
class _Root:
    path: str  # real
    listed_ns: int = 0  # when the listing began
    changed_ns: int = 0  # the folder's own time then
    device: int | None = None  # the file system it was in when it was listed


class Scanner:
    """See the module.  `cache_dir` None: nothing is kept across starts."""

    def __init__(self, roots: Sequence[Path], cache_dir: Path | None = None) -> None:
        self.sources: list[VersionSource] = []
        self._roots = [_Root(os.path.realpath(root)) for root in roots]
        self._configs = KnownConfigs(None if cache_dir is None else cache_dir / FILE_NAME)
        # By name, in order: number of the root, and whether it is a symlink.
        self._folders: dict[str, tuple[int, bool]] = {}
        self._models: dict[str, Sources] = {}
        self._inside: dict[str, str] = {}  # models in folders of folders -> the outermost one
        self._unsettled: set[str] = set()
        self._round: list[str] = []  # names that this round has not come to
        self._looked_s = 0.0
        self._is_saved = False
        self._saved_s = 0.0

    # --- looking --------------------------------------------------------------------------------
    def first(self) -> None:
        """Look at everything.  Raises OSError when a root cannot be read."""
        began_s = time.monotonic()
        self._list_roots(always=True)
        names = list(self._folders)
        for name in names:
            self._look_at(name, None)
        self._round = []
        self._collect()
        taken_s = time.monotonic() - began_s
        log.info("%d model folders looked at in %.2f s", len(names), taken_s)
        known = len(self._configs)
        self._configs.forget()
        self._is_saved = known == sum(source.config is not None for source in self.sources)
        self._save(time.monotonic())
        self._looked_s = time.monotonic()

    def look(self) -> bool:
        """Look at some of it; return whether anything has changed.  Raises OSError as `first`."""
        began_s = time.monotonic()
        budget_s = LOOK_SHARE * (began_s - self._looked_s)
        self._looked_s = began_s
        before_ns = settled_before_ns()
        # Once a round whatever their times say: a symlink may have got a target, a clock may be coarse.
        new, is_changed = self._list_roots(always=not self._round)
        done: set[str] = set()
        for name in itertools.chain(new, tuple(self._unsettled)):
            if name not in done and name in self._folders:
                done.add(name)
                is_changed = self._look_at(name, before_ns) or is_changed
        if not self._round:
            self._round = list(reversed(self._folders))
        while self._round:
            name = self._round.pop()
            if name in done or name not in self._folders:
                continue
            is_changed = self._look_at(name, before_ns) or is_changed
            if time.monotonic() - began_s >= budget_s and len(self._folders) > WHOLE_MAX:
                break
        if is_changed:
            self._collect()
            self._is_saved = False
        if not self._is_saved and time.monotonic() - self._saved_s >= SAVE_PERIOD_S:
            self._save(time.monotonic())
        return is_changed

    def look_at(self, names: Iterable[str]) -> bool:
        """Look at these models' folders, as they are now; return whether anything has changed.

        Raises OSError as `first`.
        """
        is_changed = False
        for name in names:
            if name not in self._inside and not self._place(name):
                # It is gone, or lies further down in a folder that nobody has looked at.
                new, is_gone = self._list_roots(always=True)
                is_changed = is_changed or is_gone
                for each in new:
                    is_changed = self._look_at(each, settled_before_ns()) or is_changed
            outermost = self._inside.get(name, name)
            if outermost in self._folders:
                is_changed = self._look_at(outermost, None) or is_changed
        if is_changed:
            self._collect()
            self._is_saved = False
        return is_changed

    def _place(self, name: str) -> bool:
        """Take note of a folder of this name; return whether there is one in a root."""
        if not name or is_skipped(name) or os.sep in name:
            return False
        for number, root in enumerate(self._roots):
            path = os.path.join(root.path, name)
            if os.path.isdir(path):
                where = (number, os.path.islink(path))
                if self._folders.get(name) != where:
                    self._folders[name] = where
                    # By root and name, as a listing has them.
                    rows = sorted(self._folders.items(), key=lambda row: (row[1][0], row[0]))
                    self._folders = dict(rows)
                return True
        return False

    def _list_roots(self, *, always: bool) -> tuple[list[str], bool]:
        """Take note of folders that came and went.

        Return the names of those that came, and whether any went.
        """
        if not always and not any(_must_list(root) for root in self._roots):
            return [], False
        folders: dict[str, tuple[int, bool]] = {}
        for number, root in enumerate(self._roots):
            here = ((number, False), (number, True))  # two objects, however many folders
            listed_ns, facts = time.time_ns(), os.stat(root.path)
            found = model_folders(root.path)
            if not found and root.device not in (None, facts.st_dev):
                raise OSError(
                    f"{root.path} is empty and in another file system than before: what was mounted "
                    "there is gone"
                )
            root.listed_ns, root.changed_ns = listed_ns, facts.st_mtime_ns
            root.device = facts.st_dev
            for folder in found:
                folders.setdefault(folder.name, here[folder.is_link])
        former, self._folders = self._folders, folders
        gone = [name for name in former if name not in folders]
        for name in gone:
            self._models.pop(name, None)
            self._unsettled.discard(name)
        new = [name for name in folders if former.get(name) != folders[name]]
        return new, bool(gone)

    def _look_at(self, name: str, before_ns: int | None) -> bool:
        number, is_link = self._folders[name]
        root = self._roots[number].path
        folder = Folder(name, os.path.join(root, name), is_link)
        former = self._models.get(name, ())
        found = tuple(scan_model(root, folder, before_ns, self._configs, former))
        if any(source.settling for source in found):
            self._unsettled.add(name)
        else:
            self._unsettled.discard(name)
        if found == former and name in self._models:
            return False
        self._models[name] = found
        if not is_lone(found):
            for model, group in itertools.groupby(found, key=lambda source: source.name):
                for text in missing_versions([*group]):
                    log.warning("model '%s': %s", model, text)
        for source in found:
            if source.name != name:
                self._inside[source.name] = name
        return True

    def _collect(self) -> None:
        """Make the list anew."""
        models = self._models
        chosen = 0
        self.sources = []
        for source in (source for name in self._folders for source in models.get(name, ())):
            chosen += not source.spare
            if chosen > VERSIONS_MAX:
                break
            self.sources.append(source)

    def _save(self, now_s: float) -> None:
        self._saved_s = now_s
        if not self._is_saved:
            self._configs.save(
                (source.folder, source.fingerprint, source.config)
                for source in self.sources
                if source.config is not None
            )
            self._is_saved = True


def _must_list(root: _Root) -> bool:
    """Whether a folder may have come or gone: a folder's time is too coarse for what is recent."""
    changed_ns = os.stat(root.path).st_mtime_ns
    return changed_ns != root.changed_ns or changed_ns > root.listed_ns - SETTLE_NS
