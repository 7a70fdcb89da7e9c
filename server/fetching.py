"""Repositories elsewhere (`s3://`, `gs://`, `hf://`, `http(s)://` ...), fetched into a folder here.

Files come through fsspec, a few at once, in pieces; one that broke off goes on where it stopped, if it is
still the same one.  Each is checked against its size, and its digest where its place tells one.  What is
served is exchanged when it is complete (`mirror.py`), so a server may run meanwhile, and notices.

    file:  (nothing) --pieces--> .part --size and digest right--> fetched --unit complete--> in place
           .part --another mark, wrong digest--> (nothing)

Invariants
 1. No file is in place whose size, or known digest, is another than its place said.
 2. A fetch that is killed loses at most the pieces in flight.
 3. What a person must change (credentials, an address) is not tried again.

Called by the command line, never by a server's processes.  `remote_places.py` knows the addresses and what
failures mean, `remote_files.py` what places say of their files.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import msgspec

from overcommit.runtime.config import MIB
from overcommit.runtime.errors import ConfigurationError, Unavailable, said_by
from overcommit.server import mirror
from overcommit.server.mirror import Files, RemoteFile, check_path
from overcommit.server.remote_files import describe, find_problem
from overcommit.server.remote_places import explain, open_place

PIECE_BYTES: Final = 8 * MIB
FILES_AT_ONCE: Final = 4
TRIES: Final = 4  # of one file, each from where the one before broke off
PAUSE_S: Final = 0.5  # before the second; doubled for each further one
RESERVE_BYTES: Final = 256 * MIB  # of the disk, left to others
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://.+")

Progress = Callable[[int, int], None]  # bytes that are there, bytes in all


class _Record(msgspec.Struct):
    """`mirror.json`."""

    url: str
    files: dict[str, RemoteFile]
    is_whole: bool = False  # every model has been fetched, if not its newest files


def is_here(url: str, cache_dir: str) -> bool:
    """Whether all models of a repository elsewhere have been fetched at some time."""
    record = _recall(Path(folder_of(url, cache_dir)).parent, url)
    return record is not None and record.is_whole


def _recall(home: Path, url: str) -> _Record | None:
    try:
        record = msgspec.json.decode((home / "mirror.json").read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError):
        return None
    return record if record.url == url else None


def is_url(path: str) -> bool:
    """Whether a repository is elsewhere; `file://` too."""
    return _URL.fullmatch(path) is not None


def folder_of(url: str, cache_dir: str) -> str:
    """Where a repository's models lie here.  `file://` lies where it is."""
    if url.startswith("file://"):
        return unquote(urlsplit(url).path)
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", url).strip("-.")[-60:]
    digest = hashlib.blake2b(url.encode(), digest_size=6).hexdigest()
    return os.path.join(cache_dir, "remote", f"{readable}-{digest}", "models")


class Fetcher:
    """Brings one repository up to date."""

    def __init__(self, url: str, cache_dir: str, on_progress: Progress) -> None:
        self.url = url
        self.models = Path(folder_of(url, cache_dir))
        self._home = self.models.parent
        self._fetched = self._home / "fetched"
        self._place = open_place(url)
        self._file_system = self._place.file_system
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._is_whole = False

    def fetch(self) -> int:
        """Fetch what has changed; return how many bytes came.

        Raises ConfigurationError (it cannot be done) and Unavailable (it broke off: try again).
        """
        self._home.mkdir(parents=True, exist_ok=True)
        with _locked(self._home / "lock", self.url):
            wanted, had = self._list(), self._had()
            work = mirror.plan(wanted, had)
            self._total = mirror.bytes_of(work, wanted, had)
            free = shutil.disk_usage(self._home).free
            if self._total > free - RESERVE_BYTES:
                raise ConfigurationError(
                    f"{self.url} needs {self._total} bytes, {free} are free in {self._home}: choose "
                    f"another --cache-dir"
                )
            self._tell(0)
            self.models.mkdir(exist_ok=True)
            for unit, paths in work.units.items():
                self._make(unit, paths, wanted, had)
                had = {path: file for path, file in had.items() if not _is_in(path, unit)}
                had |= {path: wanted[path] for path in paths}
                self._write(had)
            for unit in work.gone:
                self._drop(unit, wanted, had)
            self._is_whole = True
            self._write({path: file for path, file in had.items() if path in wanted})
            for name in ("fetched", "parts", "marks"):
                mirror.drop(self._home / name)
        return self._done

    # --- what there is --------------------------------------------------------------------------
    def _list(self) -> Files:
        try:
            found = self._file_system.find(self._place.base, detail=True, **self._place.listing)
        except Exception as error:  # each file system has errors of its own
            raise explain(self.url, "cannot be listed", error) from error
        files: dict[str, RemoteFile] = {}
        base, prefix = self._place.base.rstrip("/") + "/", self._place.prefix
        for name, info in found.items():
            relative = (
                name.lstrip("/") if not base.strip("/") else name.removeprefix(base).lstrip("/")
            )
            if not name.lstrip("/").startswith(base.lstrip("/")) or not relative:
                continue
            path = check_path(prefix + relative)
            if path is None or (not prefix and "/" not in path):
                continue  # beside the models
            if info.get("size") is None:
                info = self._info(name)
            files[path] = describe(info)
        if not files:
            raise ConfigurationError(f"{self.url} holds no model: is the address right?")
        return files

    def _info(self, name: str) -> dict[str, Any]:
        try:
            info: dict[str, Any] = self._file_system.info(name)
        except Exception as error:  # each file system has errors of its own
            raise explain(self.url, f"does not tell of {name}", error) from error
        if info.get("size") is None:
            raise ConfigurationError(f"{name}: its server does not say how long it is")
        return info

    def _had(self) -> Files:
        record = _recall(self._home, self.url)
        if record is None:
            return {}
        self._is_whole = record.is_whole
        # What somebody removed or cut here is fetched again.
        return {
            path: file
            for path, file in record.files.items()
            if _size(self.models / path) == file.size
        }

    def _write(self, files: Files) -> None:
        temporary = self._home / "mirror.json.tmp"
        temporary.write_bytes(msgspec.json.encode(_Record(self.url, dict(files), self._is_whole)))
        temporary.replace(self._home / "mirror.json")

    # --- units ----------------------------------------------------------------------------------
    def _make(self, unit: str, paths: list[str], wanted: Files, had: Files) -> None:
        """Fetch a unit's files, or link those that are here already, and put it in place."""
        with concurrent.futures.ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            jobs = [
                pool.submit(self._make_file, path, wanted[path], had.get(path)) for path in paths
            ]
            try:
                for job in concurrent.futures.as_completed(jobs):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        made = self._fetched / unit
        for found in [path for path in made.rglob("*") if path.is_file()] if made.is_dir() else ():
            if str(found.relative_to(self._fetched)) not in wanted:
                found.unlink()  # of a fetch that broke off, and is not wanted any more
        mirror.put(made, self.models / unit)

    def _make_file(self, path: str, file: RemoteFile, old: RemoteFile | None) -> None:
        place, mark = self._fetched / path, self._home / "marks" / path
        for each in (place, mark):
            each.parent.mkdir(parents=True, exist_ok=True)
        if old == file:
            place.unlink(missing_ok=True)
            os.link(self.models / path, place)
        elif _size(place) == file.size and _read(mark) == _mark(file):
            self._tell(file.size)  # of a fetch that broke off later
        else:
            place.unlink(missing_ok=True)
            self._fetch_file(path, file, place, mark)

    def _drop(self, unit: str, wanted: Files, had: Files) -> None:
        """Take a unit that is gone elsewhere out of its place, but nothing of others in it."""
        if not any(_is_in(path, unit) for path in wanted):
            aside = self._fetched / unit
            if (self.models / unit).exists():
                mirror.drop(aside)
                aside.parent.mkdir(parents=True, exist_ok=True)
                (self.models / unit).replace(aside)
        for path in had:
            if _is_in(path, unit) and path not in wanted:
                (self.models / path).unlink(missing_ok=True)
        model = self.models / unit.split("/")[0]
        if model.is_dir() and not any(model.iterdir()):
            model.rmdir()

    # --- files ----------------------------------------------------------------------------------
    def _fetch_file(self, path: str, file: RemoteFile, place: Path, mark: Path) -> None:
        part = self._home / "parts" / path
        part.parent.mkdir(parents=True, exist_ok=True)
        if not file.mark or _read(mark) != _mark(file) or (_size(part) or 0) > file.size:
            part.unlink(missing_ok=True)
        mark.write_text(_mark(file))
        self._tell(_size(part) or 0)
        for attempt in range(TRIES):
            try:
                self._append(path, file, part)
                break
            except Exception as error:  # each file system has errors of its own
                refusal = explain(self.url, f"does not give {path}", error)
                if isinstance(refusal, ConfigurationError):
                    raise refusal from error
                if attempt == TRIES - 1:
                    raise Unavailable(
                        f"{self.url}: {path} broke off at byte {_size(part) or 0} of {file.size}: "
                        f"{said_by(error)}; the next try goes on from there"
                    ) from error
                time.sleep(PAUSE_S * 2**attempt)
        problem = find_problem(part, file)
        if problem is not None:
            part.unlink(missing_ok=True)
            raise Unavailable(f"{self.url}: {path} {problem}; it is fetched anew by the next try")
        part.replace(place)

    def _append(self, path: str, file: RemoteFile, part: Path) -> None:
        """Add what is missing at the end.  Raises what fsspec raises."""
        name = self._name(path)
        with part.open("ab") as out:
            if self._is_stream(name, file.size):  # it cannot go on from anywhere but the beginning
                self._tell(-out.tell())
                out.truncate(0)
                with self._file_system.open(name, "rb", block_size=0) as source:
                    while out.tell() <= file.size and (piece := source.read(PIECE_BYTES)):
                        out.write(piece)
                        self._tell(len(piece))
            while (at := out.tell()) < file.size:
                end = min(at + PIECE_BYTES, file.size)
                piece = self._file_system.cat_file(name, start=at, end=end, **self._place.reading)
                if len(piece) != end - at:
                    raise EOFError(f"{end - at} bytes were asked for, {len(piece)} came")
                out.write(piece)
                self._tell(len(piece))
            out.flush()
            os.fsync(out.fileno())

    def _is_stream(self, name: str, size: int) -> bool:
        """Whether it comes in one piece: it is short, or from a server that knows no ranges."""
        if not self.url.startswith(("http://", "https://")):
            return False
        if size <= PIECE_BYTES:
            return True
        # Such a server sends everything; this way of reading gives up as soon as it sees that.
        with self._file_system.open(
            name, "rb", block_size=PIECE_BYTES, cache_type="none"
        ) as source:
            source.seek(1)
            try:
                return len(source.read(1)) != 1
            except ValueError:
                return True

    def _name(self, path: str) -> str:
        return f"{self._place.base.rstrip('/')}/{path.removeprefix(self._place.prefix)}"

    def _tell(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._on_progress(self._done, self._total)


def _mark(file: RemoteFile) -> str:
    return f"{file.size} {file.mark}"


@contextmanager
def _locked(path: Path, url: str) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(f"{url} is being fetched by another process") from error
        yield


def _is_in(path: str, unit: str) -> bool:
    return path == unit or path.startswith(f"{unit}/")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
