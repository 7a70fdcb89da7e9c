"""What was learnt survives a restart; a torn file loses facts and invents none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import demand_file
from overcommit.runtime.demand import Demand
from overcommit.runtime.gaps import Pool
from overcommit.runtime.memories import Memories
from overcommit.runtime.prefetch import Prefetcher

NAMES = ("minilm", "größe", "a/b")


def demand(seed: int) -> Demand:
    made = Demand(0.0, Pool())
    for k in range(20):
        made.use(seed * 100.0 + k * 7000.0)
    return made


def facts(made: Demand) -> tuple[object, ...]:
    week = made.week
    return (
        *(made.last_s, made.mean_s, made.visits, made.scores, bytes(made.bins)),
        *(week.born, week.hour, week.is_used, bytes(week.cells)),
    )


def write(folder: Path) -> dict[str, bytes]:
    fields = {name: demand_file.encode(demand(seed)) for seed, name in enumerate(NAMES)}
    demand_file.write(folder, [demand_file.record_of(name, f) for name, f in fields.items()])
    return fields


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    fields = write(tmp_path)
    assert demand_file.read(tmp_path) == fields
    for seed, name in enumerate(NAMES):
        made = demand_file.decode(fields[name], Pool())
        assert made is not None
        assert facts(made) == facts(demand(seed))
    assert [path.name for path in tmp_path.iterdir()] == [demand_file.FILE_NAME]


def test_a_file_that_ends_anywhere_loses_facts_and_invents_none(tmp_path: Path) -> None:
    fields = write(tmp_path)
    path = tmp_path / demand_file.FILE_NAME
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = demand_file.read(tmp_path)
        assert found.items() <= fields.items()
        assert len(found) < len(NAMES)


@given(position=st.integers(0, 10_000), value=st.integers(1, 255))
def test_a_file_with_a_wrong_byte_invents_none(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("demand")
    fields = write(folder)
    path = folder / demand_file.FILE_NAME
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= value
    path.write_bytes(data)
    assert demand_file.read(folder).items() <= fields.items()


def test_a_foreign_file_and_none_are_no_facts(tmp_path: Path) -> None:
    assert demand_file.read(tmp_path) == {}
    (tmp_path / demand_file.FILE_NAME).write_bytes(b"something else altogether" * 100)
    assert demand_file.read(tmp_path) == {}


def test_fields_of_another_length_or_without_sense_are_refused() -> None:
    fields = demand_file.encode(demand(1))
    assert demand_file.decode(fields[:-1], Pool()) is None
    assert demand_file.decode(b"\xff" * len(fields), Pool()) is None


# --- whose it is --------------------------------------------------------------------------------
def learnt(folder: Path, names: dict[int, str]) -> tuple[Memories, Prefetcher]:
    prefetcher = Prefetcher()
    return Memories(folder, prefetcher, names.get), prefetcher


def test_a_version_begins_with_what_its_name_was_known_for(tmp_path: Path) -> None:
    names = {1: "minilm", 2: "minilm", 3: "other"}
    memories, prefetcher = learnt(tmp_path, names)
    for k in range(5):
        prefetcher.use(1, k * 7000.0)
        memories.on_use(1)
    memories.on_ready(2, "minilm")
    memories.on_ready(3, "other")
    first, second = prefetcher.demand(1), prefetcher.demand(2)
    assert first is not None
    assert second is not None
    assert facts(first) == facts(second)
    assert prefetcher.demand(3) is None
    prefetcher.use(2, 99_000.0)
    assert facts(first) != facts(second), "each goes on by itself"


def test_what_was_learnt_survives_a_restart_and_a_removal(tmp_path: Path) -> None:
    memories, prefetcher = learnt(tmp_path, {1: "minilm", 2: "gone"})
    for slot in (1, 2):
        for k in range(5):
            prefetcher.use(slot, k * 7000.0)
            memories.on_use(slot)
    before = prefetcher.demand(1)
    assert before is not None
    memories.on_removed(2, "gone")
    assert prefetcher.demand(2) is None
    memories.close()

    memories, prefetcher = learnt(tmp_path, {7: "minilm", 8: "gone"})
    assert len(memories) == 2
    memories.on_ready(7, "minilm")
    memories.on_ready(8, "gone")
    after = prefetcher.demand(7)
    assert after is not None
    assert facts(after) == facts(before)
    assert prefetcher.demand(8) is not None


def test_nothing_is_written_where_nothing_was_learnt(tmp_path: Path) -> None:
    memories, _ = learnt(tmp_path, {})
    memories.close()
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_taken_in_pieces_and_what_cannot_be_written_is_no_catastrophe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "not there"
    memories, prefetcher = learnt(folder, {1: "minilm"})
    prefetcher.use(1, 0.0)
    memories.on_use(1)
    memories.close()
    assert "could not be written" in caplog.text
