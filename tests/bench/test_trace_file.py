"""Traces from files: what is read, in which forms, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from overcommit.bench.catalogue_trace import Request, draw_models
from overcommit.bench.errors import BenchError
from overcommit.bench.trace_file import read, read_sizes


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_csv_is_sorted_by_time_and_models_are_numbered_by_their_requests(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "time_s,model,bytes\n30,b,5\n10,a,7\n20,b,5\n")
    loaded = read(path)
    assert loaded.names == ["b", "a"]
    assert loaded.trace == [Request(0.0, 1), Request(10.0, 0), Request(20.0, 0)]
    assert loaded.sizes == [5, 7]


def test_json_lines_and_timestamps_are_read_too(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        '{"timestamp": "2023-11-16 18:15:46.5", "model": "m"}\n\n'
        '{"timestamp": "2023-11-16T18:15:48.0", "model": "m"}\n',
    )
    loaded = read(path)
    assert loaded.trace == [Request(0.0, 0), Request(1.5, 0)]
    assert loaded.sizes is None


def test_without_models_they_are_drawn_and_only_times_come_from_the_file(tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:15:{n:02}.0000000,9,9\n" for n in range(50))
    path = write(tmp_path / "azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    loaded = read(path, seed=3)
    assert [request.time_s for request in loaded.trace] == [float(n) for n in range(50)]
    assert [request.model for request in loaded.trace] == draw_models(3, 50)
    assert len(loaded.names) == max(draw_models(3, 50)) + 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("time_s,model\n", "empty"),
        ("when,model\n1,a\n", "no time_s or timestamp"),
        ("time_s,model\n1,a\nsoon,a\n", "line 3"),
        ("time_s,model\n1,a\n2,\n", "none in others"),
        ("time_s,model,bytes\n1,a,5\n2,b,\n", "no bytes for model 'b'"),
        ("time_s,model,bytes\n1,a,many\n", "many"),
    ],
)
def test_what_is_no_trace_is_refused_in_words(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(BenchError) as caught:
        read(write(tmp_path / "t.csv", text))
    assert problem in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"no\.csv"):
        read(tmp_path / "no.csv")
    with pytest.raises(BenchError, match=r"no\.csv"):
        read_sizes(tmp_path / "no.csv")


def test_sizes_are_read_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", "model,bytes\na,5\nb,7\n")
    assert read_sizes(path) == {"a": 5, "b": 7}
    with pytest.raises(BenchError, match="columns"):
        read_sizes(write(tmp_path / "bad.csv", "name,size\na,5\n"))
