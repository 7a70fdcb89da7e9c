"""When the cache folder is looked after: soon after the start, every hour, and when it is full."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from overcommit.runtime.cache_keeper import CacheKeeper
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.pack_limits import (
    CACHE_FIRST_S,
    CACHE_FULL_PERIOD_S,
    CACHE_RENEW_S,
)

S_NS = 10**9
HOUR_S = 3600.0


def an_entry(cache: Path, key: str) -> Entry:
    path = str(cache / "images" / f"{key}.image")
    state = State.READY
    return Entry(0, key, "1", "", "", ModelConfig(), state, image_path=path, program_key="ab")


class Rig:
    """A cache folder with an image in use and one that is not, both old."""

    def __init__(self, cache: Path, keep_days: float = 7.0) -> None:
        self.images = cache / "images"
        self.images.mkdir(parents=True)
        self.entries = [an_entry(cache, "aa")]
        self.keeper = CacheKeeper(str(cache), keep_days, lambda: iter(self.entries))
        self.make("aa", 9 * 24)
        self.make("bb", 9 * 24)

    def make(self, key: str, hours: float) -> None:
        path = self.images / f"{key}.image"
        path.write_bytes(b"x" * 5000)
        then_s = time.time() - hours * HOUR_S
        os.utime(path, (then_s, then_s))

    def step(self, now_s: float) -> None:
        """Let it be this time, and wait for what is begun."""
        self.keeper.step(int(now_s * S_NS))
        self.keeper.close()

    def there(self) -> list[str]:
        return sorted(path.stem for path in self.images.iterdir())

    def age_s(self, key: str) -> float:
        return time.time() - (self.images / f"{key}.image").stat().st_mtime


def test_what_nothing_needs_goes_soon_after_the_start_and_every_hour(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.step(1000)
    rig.step(1000 + CACHE_FIRST_S - 1)
    assert rig.there() == ["aa", "bb"]
    rig.step(1000 + CACHE_FIRST_S)
    assert rig.there() == ["aa"]
    assert rig.age_s("aa") < HOUR_S
    rig.make("cc", 9 * 24)
    rig.make("dd", 6 * 24)
    rig.step(1000 + CACHE_FIRST_S + CACHE_RENEW_S - 1)
    assert rig.there() == ["aa", "cc", "dd"]
    rig.step(1000 + CACHE_FIRST_S + CACHE_RENEW_S)
    assert rig.there() == ["aa", "dd"]


def test_with_0_days_everything_stays_and_is_renewed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 0.0)
    rig.step(1)
    rig.keeper.make_room(S_NS)
    rig.step(2 + CACHE_FIRST_S)
    assert rig.there() == ["aa", "bb"]
    assert rig.age_s("aa") < HOUR_S
    assert rig.age_s("bb") > HOUR_S


def test_a_full_disk_has_room_made_at_once_and_not_again_and_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.make("bb", 3)
    rig.make("cc", 1)
    rig.step(1)
    rig.keeper.make_room(2 * S_NS)
    rig.step(2)
    assert rig.there() == ["aa", "cc"]
    rig.make("dd", 3)
    rig.keeper.make_room(3 * S_NS)
    rig.step(3)
    assert rig.there() == ["aa", "cc", "dd"]
    rig.keeper.make_room(int((3 + CACHE_FULL_PERIOD_S) * S_NS))
    rig.step(3 + CACHE_FULL_PERIOD_S)
    assert rig.there() == ["aa", "cc"]


def test_it_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("overcommit.runtime.image_cache.prune", lambda *_: 1 / 0)
        rig.step(1)
        rig.step(1 + CACHE_FIRST_S)
    assert "cannot be looked after" in caplog.text
    rig.step(1 + CACHE_FIRST_S + CACHE_RENEW_S)
    assert rig.there() == ["aa"]
