"""What a comparison measures beside the servers: the loop-back, and CPU time."""

from __future__ import annotations

import os

import numpy as np
import pytest

from overcommit.bench import cpu, pingpong
from overcommit.bench.dialect import PlainJson
from overcommit.bench.processes import read_row


def test_plain_json_names_the_model_in_a_header_where_the_server_wants_it() -> None:
    row = np.zeros((1, 2), np.float32)
    dialect = PlainJson(path="/", model_header="which")
    assert b"\r\nwhich: mine\r\n" in dialect.request("mine", row)
    assert b"which" not in PlainJson(path="/").request("mine", row)


@pytest.mark.slow
def test_ping_pong_goes_there_and_back() -> None:
    assert pingpong.measure(2, 0.2) > 10


def test_cpu_time_of_this_process_grows() -> None:
    row = read_row(os.getpid())
    assert row is not None
    before = cpu.seconds_of([row])
    assert before > 0
    while cpu.seconds_of([row]) == before:
        sum(range(10_000))


def test_a_process_that_is_gone_has_used_nothing() -> None:
    row = read_row(os.getpid())
    assert row is not None
    gone = type(row)(2**30, row.parent, row.session, row.started_ticks)
    assert cpu.seconds_of([gone]) == 0.0
