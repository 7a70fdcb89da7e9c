"""What the server says of activations, joined; and the line through their times."""

from __future__ import annotations

from typing import Any

import pytest

from overcommit.bench.activation_samples import STAGES, fit, median, samples_of


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
