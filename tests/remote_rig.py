"""A repository at a place elsewhere that fsspec reaches: what each such place has to hold.

The tests of a place start a server of it, and say with which file system it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from overcommit.runtime.errors import Unavailable
from overcommit.server import fetching
from overcommit.server.fetching import Fetcher, folder_of

BUCKET = "models"
FILES = {"a/1/model.onnx": b"one" * 1000, "a/config.pbtxt": b"", "b/w": b"flat" * 1000}


@dataclass
class Place:
    """The folder `team` of a bucket, by the file system `kind`; `bucket` is one of these."""

    url: str
    kind: Any
    bucket: Any

    def put(self, **files: bytes) -> None:
        """Write files there."""
        for path, content in files.items():
            self.bucket.pipe(f"{BUCKET}/team/{path}", content)
        self.bucket.invalidate_cache()

    def fetch(self, cache: Path) -> int:
        """Fetch what is new there, as a process of its own; return how many bytes came."""
        self.kind.clear_instance_cache()
        return Fetcher(self.url, str(cache), lambda done, total: None).fetch()

    def here(self, cache: Path) -> dict[str, bytes]:
        """What has been fetched."""
        root = Path(folder_of(self.url, str(cache)))
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def check_that_only_what_has_changed_comes_again(place: Place, cache: Path) -> None:
    """Files come once; one that changed comes again, and one that went goes."""
    place.put(**FILES)
    assert place.fetch(cache) == sum(map(len, FILES.values()))
    assert place.here(cache) == FILES
    assert place.fetch(cache) == 0
    # As long as before: its tag or generation alone says that it is another.
    place.put(**{"b/w": b"tall" * 1000})
    assert place.fetch(cache) == 4000
    place.bucket.rm(f"{BUCKET}/team/a", recursive=True)
    assert place.fetch(cache) == 0
    assert place.here(cache) == {"b/w": b"tall" * 1000}


def check_that_a_fetch_goes_on_where_it_broke_off(
    place: Place, cache: Path, patch: pytest.MonkeyPatch
) -> None:
    """What came before the connection broke is not asked for again, and is not served alone."""
    content = bytes(range(256)) * 64
    place.put(**{"m/weights": content})
    patch.setattr(fetching, "PIECE_BYTES", 4096)
    patch.setattr(fetching, "TRIES", 1)
    asked: list[int] = []
    whole = place.kind.cat_file

    def cut(self: Any, path: str, *args: Any, start: int, end: int, **more: Any) -> bytes:
        asked.append(start)
        if len(asked) == 3:
            raise ConnectionResetError("cut")
        return bytes(whole(self, path, *args, start=start, end=end, **more))

    patch.setattr(place.kind, "cat_file", cut)
    with pytest.raises(Unavailable, match="broke off at byte 8192 of 16384"):
        place.fetch(cache)
    assert place.here(cache) == {}
    assert place.fetch(cache) == len(content)
    assert asked == [0, 4096, 8192, 8192, 12288]
    assert place.here(cache) == {"m/weights": content}
