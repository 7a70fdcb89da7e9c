"""The physical limits: they are measured, not how high they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from overcommit.bench import limits, loopback
from overcommit.bench.errors import BenchError
from overcommit.runtime.config import MIB


def test_a_copy_has_a_rate() -> None:
    one, many = limits.measure_copy(4 * MIB, passes=1)
    assert one > 0
    assert many > 0


def test_a_read_has_a_rate_on_files_of_any_size(tmp_path: Path) -> None:
    (tmp_path / "a.image").write_bytes(bytes(9 * MIB))
    (tmp_path / "b.image").write_bytes(bytes(4096))
    rate, _ = limits.measure_read(sorted(tmp_path.iterdir()), total_bytes=32 * MIB)
    assert rate > 0


def test_without_images_there_is_nothing_to_measure() -> None:
    with pytest.raises(BenchError, match="no weight image"):
        limits.measure_read([])


def test_the_loop_back_has_rates_and_its_figures_name_a_limit() -> None:
    trips = loopback.measure_round_trips((1, 2), seconds=0.05)
    found = loopback.Loopback(trips, loopback.measure_bandwidth(MIB, seconds=0.05))
    assert trips.keys() == {1, 2}
    assert all(rate > 0 for rate in (*trips.values(), found.bandwidth))
    assert loopback.figures(found, copy=1e10)[-1].ratio is not None


@pytest.mark.slow
def test_a_matrix_product_has_a_rate() -> None:
    compute = limits.measure_compute(rows=64)
    assert compute > 0
    names = [figure.name for figure in limits.figures(limits.Limits(1, 2, 3, True), compute)]
    assert "FP32 matrix product, all cores" in names
