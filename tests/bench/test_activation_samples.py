"""What the server says of activations, joined; and the line through their times."""

from __future__ import annotations

from typing import Any

import pytest

from overcommit.bench.activation_samples import STAGES, Sample, fit, median, pair, samples_of


def a_load(slot: int, generation: int, at_ns: int) -> dict[str, Any]:
    names = ("decided_ns", "received_ns", "began_ns", "ended_ns", "done_ns")
    instants = {name: at_ns + 10 * number for number, name in enumerate(names, 1)}
    return {"slot": slot, "generation": generation, "source": "host", "read_ns": 0, **instants}


def an_attach(slot: int, generation: int, asked_ns: int, placed_ns: int) -> dict[str, Any]:
    attach = {
        "slot": slot,
        "generation": generation,
        "asked_ns": asked_ns,
        "placed_ns": placed_ns,
        "mapped_ns": placed_ns + 5,
        "ready_ns": placed_ns + 9,
    }
    return {"worker": 0, "nbytes": 4096, "attach": attach}


def test_a_wish_before_the_load_was_served_by_it_and_one_after_found_it_there() -> None:
    status = {
        "activations": [a_load(3, 1, 1000)],
        "attaches": [an_attach(3, 1, 1000, 1060), an_attach(3, 1, 9000, 9010)],
    }
    loaded, attached = samples_of(status)
    assert (loaded.source, attached.source) == ("host", "device")
    assert loaded.seconds == pytest.approx(65e-9)
    assert attached.between("placed_ns", "mapped_ns") == pytest.approx(5e-9)
    assert "decided_ns" not in attached.instants


def test_the_stages_of_a_load_follow_each_other_and_add_up() -> None:
    status = {"activations": [a_load(3, 2, 500)], "attaches": [an_attach(3, 2, 500, 560)]}
    (sample,) = samples_of(status)
    assert [end for _, _, end in STAGES[:-1]] == [begin for _, begin, _ in STAGES[1:]]
    parts = sum(sample.between(begin, end) for _, begin, end in STAGES)
    assert parts == pytest.approx(sample.seconds)
    assert median([sample, sample], lambda one: one.seconds) == sample.seconds


def test_the_line_is_found_again_whatever_the_spread_of_sizes() -> None:
    points = [(nbytes, 3e-4 + nbytes / 25e9) for nbytes in (1 << 20, 1 << 26, 1 << 31)]
    fixed_s, rate = fit(points)
    assert fixed_s == pytest.approx(3e-4)
    assert rate == pytest.approx(25e9)


def test_each_load_is_held_against_the_raw_move_beside_it_however_the_machine_drifts() -> None:
    def a_sample(number: int, seconds: float) -> Sample:
        instants = {"asked_ns": 0, "mapped_ns": round(seconds * 1e9)}
        return Sample(4096, "host", instants, (3, number))

    # Half of the time everything takes twice as long; the raw moves were measured there mostly.
    samples = [a_sample(number, 10e-3 if number < 4 else 20e-3) for number in range(7)]
    raw = {(3, number): 9e-3 if number < 4 else 18e-3 for number in range(2, 7)}
    found = pair(4096, samples, raw)
    assert found.share == pytest.approx(0.9)
    assert found.seconds == pytest.approx(20e-3)
    with pytest.raises(ValueError):
        pair(4096, samples, {})


def test_the_share_of_the_raw_bandwidth_is_found_beside_a_fixed_cost() -> None:
    raws = [size / 28e9 for size in (1 << 20, 1 << 26, 1 << 28, 1 << 31)]
    fixed_s, share = fit([(raw_s, 7e-4 + raw_s / 0.97) for raw_s in raws])
    assert fixed_s == pytest.approx(7e-4)
    assert share == pytest.approx(0.97)
