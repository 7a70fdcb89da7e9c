"""The bench's own gRPC client, which is written apart from the server, against the real server."""

from __future__ import annotations

import asyncio
import threading

from serving import Server

from overcommit.bench.dialect import Grpc
from overcommit.bench.echo import EchoPlan
from overcommit.bench.loadgen import Plan, drive
from overcommit.bench.workload import make_workload


def run(port: int, models: tuple[str, ...], scales: tuple[float, ...]) -> tuple[int, int, int]:
    workload = EchoPlan(dialect=Grpc(), models=models, scales=scales)
    plan = Plan(workload=workload, port=port, connections=8, seconds=0.3)
    tally = asyncio.run(drive(plan, make_workload(workload, 1), threading.Event()))
    return tally.right, tally.wrong, tally.errors


def test_every_answer_is_right(server: Server) -> None:
    right, wrong, errors = run(server.grpc_port, ("faulty", "echo-fp32"), (2.0, 1.0))
    assert right > 8
    assert (wrong, errors) == (0, 0)


def test_wrong_answers_and_failed_calls_are_counted(server: Server) -> None:
    right, wrong, _ = run(server.grpc_port, ("faulty",), (3.0,))
    assert (right, wrong > 0) == (0, True)
    right, _, errors = run(server.grpc_port, ("nope",), (1.0,))
    assert (right, errors > 0) == (0, True)
