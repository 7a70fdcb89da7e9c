"""The load generator against a tiny server: what is right, and every fault that it must notice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from v2server import Asked, V2Server

from overcommit.bench.loadgen import Load, Plan, drive
from overcommit.bench.references import References, fixed_inputs
from overcommit.bench.tally import Tally
from overcommit.bench.workload import EmbeddingPlan, make_workload

REQUESTS = 60
WATCHDOG_S = 60.0


@pytest.fixture
def references(tmp_path: Path) -> References:
    random = np.random.default_rng(0)
    inputs = fixed_inputs(100)
    outputs = [
        random.standard_normal((3, 1, tensors["input_ids"].shape[1], 4), np.float32)
        for tensors in inputs
    ]
    references = References(("a", "b", "c"), inputs, outputs)
    references.save(tmp_path / "references.npz")
    return references


@pytest.fixture
def plan(tmp_path: Path, references: References) -> Plan:
    workload = EmbeddingPlan(references=str(tmp_path / "references.npz"), json_share=0.5)
    return Plan(workload=workload, port=0, connections=3, seconds=WATCHDOG_S, timeout_s=WATCHDOG_S)


def run(server: V2Server, plan: Plan, requests: int = REQUESTS) -> Tally:
    """Drive until the server has seen that many requests, or the plan ends."""

    async def main() -> Tally:
        stop = threading.Event()
        inner = server.fault

        def fault(asked: Asked) -> str | None:
            if asked.number >= requests:
                stop.set()
            return inner(asked)

        server.fault = fault
        async with server.running():
            changed = replace(plan, port=server.port)
            return await drive(changed, make_workload(plan.workload, plan.seed), stop)

    return asyncio.run(main())


def only(fault: str, number: int = 10) -> Callable[[Asked], str | None]:
    return lambda asked: fault if asked.number == number else None


def test_right_answers_are_counted_and_timed(references: References, plan: Plan) -> None:
    server = V2Server(references)
    tally = run(server, plan)
    assert tally.right == tally.sent == len(server.asked) >= REQUESTS
    assert tally.times().count == tally.right
    assert sum(tally.targets.values()) == tally.right
    assert tally.rate > 0
    assert {asked.binary for asked in server.asked} == {True, False}
    assert len({asked.id for asked in server.asked}) == len(server.asked)


@pytest.mark.parametrize("fault", ["wrong variant", "nan", "wrong id"])
def test_a_wrong_answer_is_noticed(references: References, plan: Plan, fault: str) -> None:
    tally = run(V2Server(references, only(fault)), plan)
    assert tally.wrong == 1
    assert tally.right == tally.sent - 1
    assert tally.examples[0].startswith("WRONG")


def test_the_answer_of_another_variant_is_named(references: References, plan: Plan) -> None:
    server = V2Server(references, lambda asked: "wrong variant" if asked.model == "a" else None)
    tally = run(server, plan)
    assert tally.wrong == sum(asked.model == "a" for asked in server.asked)
    assert all("got the answer of b" in text for text in tally.examples)


def test_an_error_status_is_counted_by_its_number(references: References, plan: Plan) -> None:
    tally = run(V2Server(references, only("502")), plan)
    assert (tally.errors, tally.wrong, tally.broken) == (1, 0, 0)
    assert tally.statuses == {"502": 1}
    assert "asked for" in tally.examples[0]


def test_a_lost_connection_is_counted_and_opened_again(references: References, plan: Plan) -> None:
    tally = run(V2Server(references, only("hang up")), plan)
    assert tally.broken == 1
    assert tally.connects == plan.connections + 1
    assert tally.sent == tally.accounted
    assert tally.right == tally.sent - 1


def test_a_connection_that_is_closed_after_its_answer_loses_nothing(
    references: References, plan: Plan
) -> None:
    tally = run(V2Server(references, only("close")), plan)
    assert tally.right == tally.sent
    assert tally.connects == plan.connections + 1


def test_without_reconnecting_the_run_ends_when_every_connection_was_closed(
    references: References, plan: Plan
) -> None:
    plan = replace(plan, reconnect=False)
    server = V2Server(references, lambda asked: "close" if asked.number >= 10 else None)
    tally = run(server, plan, requests=10_000)
    assert tally.right == tally.sent == len(server.asked)
    assert tally.connects == plan.connections


def test_an_answer_too_many_is_noticed(references: References, plan: Plan) -> None:
    tally = run(V2Server(references, only("twice")), plan)
    # The copy comes when the next request is already out, or before: in both cases it is seen.
    assert tally.unexpected + tally.wrong >= 1


def test_a_request_without_an_answer_is_given_up_and_counted(
    references: References, plan: Plan
) -> None:
    plan = replace(plan, timeout_s=0.2)
    tally = run(V2Server(references, only("silence")), plan, requests=200)
    assert tally.unanswered == 1
    assert tally.sent == tally.accounted


def test_a_refused_connection_is_counted_apart(references: References, plan: Plan) -> None:
    async def main() -> Tally:
        async with V2Server(references).running() as server:
            port = server.port
        changed = replace(plan, port=port, reconnect=False)
        return await drive(changed, make_workload(plan.workload, 1), threading.Event())

    tally = asyncio.run(main())
    assert (tally.sent, tally.broken) == (0, 0)
    assert tally.connect_errors == plan.connections


def test_two_processes_share_the_connections_and_add_up(
    references: References, plan: Plan, tmp_path: Path
) -> None:
    async def main() -> tuple[Tally, list[Asked]]:
        server = V2Server(references)
        async with server.running():
            changed = replace(plan, port=server.port)
            with Load(changed, tmp_path / "load.log", processes=2) as load:
                while load.progress.right < REQUESTS:
                    assert load.is_running, (tmp_path / "load.log").read_text()
                    await asyncio.sleep(0.01)
                load.stop()
                tally = await asyncio.to_thread(load.wait)
        return tally, server.asked

    tally, asked = asyncio.run(main())
    assert tally.right == tally.sent == len(asked) >= REQUESTS
    assert tally.connects == plan.connections
    assert len({one.id for one in asked}) == len(asked)


def test_explanations_that_differ_in_numbers_only_are_kept_once_unless_wrong() -> None:
    tally = Tally()
    for text in ("m-1: HTTP 503: in 5 s", "m-2: HTTP 503: in 4 s", "WRONG: m-1", "WRONG: m-2"):
        tally.note(text)
    assert tally.examples == ["m-1: HTTP 503: in 5 s", "WRONG: m-1", "WRONG: m-2"]
