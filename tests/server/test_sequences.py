"""Models with state through a running server: what each request gets says what came before it."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from sequence_rig import COUNTER, FIRST, add_adder, add_counter
from serving import WATCHDOG_S, Answer, Server
from tritonclient.utils import InferenceServerException

import overcommit
from overcommit.runtime.errors import BadRequest

IDLE_US = 1_000_000
# What has come so far, and again what has come so far of that.
FLOATS = ("adder", "first", "chain")
CHAIN = """
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, 2]
[[output]]
name = "y"
datatype = "FP32"
shape = [-1, 2]
[[ensemble.step]]
model = "adder"
inputs = { x = "x" }
outputs = { y = "middle" }
[[ensemble.step]]
model = "first"
inputs = { x = "middle" }
outputs = { y = "y" }
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    add_counter(root, "counter")
    add_counter(root, "text", strategy="oldest", id_type="BYTES")
    add_counter(root, "narrow", batch=1, idle_us=IDLE_US)
    add_counter(root, "apart", process="true")
    with (root / "apart" / "model.toml").open("a") as file:
        file.write('[rollout]\nweights = { "1" = 10 }\n')
    add_adder(root, "adder")
    add_adder(root, "first", from_file=True)
    (root / "chain").mkdir()
    (root / "chain" / "model.toml").write_text(CHAIN)
    flags = ("--allow-code", "--front-ends", "2", "--workers", "2")
    with Server(root, cache=tmp_path_factory.mktemp("cache"), flags=flags) as running:
        running.wait_until(
            lambda: all(row["state"] == "READY" for row in running.models().values())
        )
        yield running


def ask(server: Server, model: str, value: float, **parameters: Any) -> Answer:
    datatype, columns = ("FP32", 2) if model in FLOATS else ("INT32", 1)
    given = {"name": "x", "datatype": datatype, "shape": [1, columns], "data": [value] * columns}
    body = {"inputs": [given], "outputs": [{"name": "y"}], "parameters": parameters}
    return server.post(f"/v2/models/{model}/infer", body)


def step(
    server: Server,
    model: str,
    key: int | str,
    value: float,
    *,
    start: bool = False,
    end: bool = False,
) -> Any:
    """One request of a sequence; the first number that it answers."""
    flags = {"sequence_start": start, "sequence_end": end}
    answer = ask(server, model, value, sequence_id=key, **flags)
    assert answer.status == 200, answer.body
    return answer.json()["outputs"][0]["data"][0]


@pytest.mark.parametrize(
    ("model", "bonus"), [("counter", 0), ("text", 0), ("apart", 0), ("adder", 1)]
)
def test_interleaved_sequences_have_sums_of_their_own(
    server: Server, model: str, bonus: float
) -> None:
    keys = [7, 8, "nine"] if model in ("text", "adder") else [7, 8, 9]
    for key in keys:
        assert step(server, model, key, 1, start=True) == 1 + bonus
    for number, key in enumerate([*keys, *reversed(keys)]):
        assert step(server, model, key, 10) == (11 if number < 3 else 21)
    for key in keys:
        assert step(server, model, key, 100, end=True) == 121
        assert ask(server, model, 1, sequence_id=key).status == 400


def test_a_first_state_comes_from_its_file_and_again_for_the_next_sequence(server: Server) -> None:
    for _ in range(2):
        assert step(server, "first", 5, 1, start=True) == FIRST[0] + 1 + 1
        assert step(server, "first", 5, 1, end=True) == FIRST[0] + 2


def test_a_start_in_the_middle_begins_anew(server: Server) -> None:
    for model, bonus in (("counter", 0), ("adder", 1)):
        step(server, model, 20, 5, start=True)
        assert step(server, model, 20, 2, start=True) == 2 + bonus
        assert step(server, model, 20, 2, end=True) == 4


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "must specify a non-zero or non-empty correlation ID"),
        ({"sequence_id": 0, "sequence_start": True}, "non-zero or non-empty correlation ID"),
        ({"sequence_id": "", "sequence_start": True}, "non-zero or non-empty correlation ID"),
        (
            {"sequence_id": 42},
            "inference request for sequence 42 to model 'counter' must specify the START",
        ),
        (
            {"sequence_id": 44, "sequence_end": True},
            "must specify the START flag on the first request",
        ),
        ({"sequence_id": 1.5, "sequence_start": True}, "Unable to parse 'sequence_id'"),
        ({"sequence_id": -1, "sequence_start": True}, "Unable to parse 'sequence_id'"),
        ({"sequence_id": 2**64, "sequence_start": True}, "Unable to parse 'sequence_id'"),
        ({"sequence_id": 5, "sequence_start": "yes"}, "Unable to parse 'sequence_start'"),
        ({"sequence_id": 5, "sequence_start": True, "sequence_end": 1}, "'sequence_end'"),
        ({"sequence_id": "x" * 129, "sequence_start": True}, "cannot be longer than 128"),
        ({"sequence_id": "x", "sequence_start": True}, "the model takes a number"),
    ],
)
def test_what_belongs_to_no_sequence_is_refused(
    server: Server, parameters: dict[str, Any], text: str
) -> None:
    answer = ask(server, "counter", 1, **parameters)
    assert answer.status == 400
    assert text in answer.json()["error"]


def test_a_request_has_one_row(server: Server) -> None:
    given = {"name": "x", "datatype": "INT32", "shape": [2, 1], "data": [1, 2]}
    parameters = {"sequence_id": 6, "sequence_start": True}
    answer = server.post("/v2/models/counter/infer", {"inputs": [given], "parameters": parameters})
    assert answer.status == 400
    assert "must specify batch-size 1" in answer.json()["error"]


def test_who_finds_no_slot_waits_and_is_told_so_and_idle_sequences_give_theirs_up(
    server: Server,
) -> None:
    # Two workers with a slot each: of three sequences one finds none.
    begun: list[int] = []
    for key in (1, 2, 3):
        answer = ask(server, "narrow", 1, sequence_id=key, sequence_start=True, timeout=100_000)
        if answer.status != 200:
            break
        begun.append(key)
    late = key
    assert answer.status == 503
    assert "timeout of the corresponding sequence has been expired" in answer.json()["error"]
    # Whose sequences are idle for long enough make room, and are over.
    assert step(server, "narrow", late, 4, start=True) == 4
    assert step(server, "narrow", late, 4, end=True) == 8
    server.wait_until(lambda: ask(server, "narrow", 1, sequence_id=begun[0]).status == 400)


def test_a_failed_request_changes_nothing_and_its_sequence_goes_on(server: Server) -> None:
    step(server, "counter", 30, 5, start=True)
    assert ask(server, "counter", -2, sequence_id=30).status == 500
    assert step(server, "counter", 30, 1, end=True) == 6


def test_a_sequence_whose_first_request_failed_has_not_begun(server: Server) -> None:
    assert ask(server, "counter", -2, sequence_id=31, sequence_start=True).status == 500
    assert ask(server, "counter", 1, sequence_id=31).status == 400


def test_an_answer_that_does_not_fit_its_block_is_computed_once(server: Server) -> None:
    step(server, "counter", 32, 1, start=True)
    wide = ask(server, "counter", 5000, sequence_id=32)
    assert wide.json()["outputs"][0]["data"] == [5001] * 5000
    assert step(server, "counter", 32, 1, end=True) == 5002


def test_a_model_whose_process_died_says_that_its_sequences_are_lost(server: Server) -> None:
    step(server, "apart", 40, 1, start=True)
    assert ask(server, "apart", -1, sequence_id=40).status == 500
    answer = ask(server, "apart", 1, sequence_id=40)
    assert answer.status == 502
    assert "begin it again with sequence_start" in answer.json()["error"]
    assert step(server, "apart", 40, 3, start=True) == 3
    assert step(server, "apart", 40, 3, end=True) == 6


def test_the_steps_of_an_ensemble_get_the_sequence_of_its_request(server: Server) -> None:
    assert step(server, "chain", 70, 1, start=True) == 1 + 1 + 100 + 1
    assert step(server, "chain", 70, 1) == 2 + 102
    assert step(server, "chain", 70, 1, end=True) == 3 + 104
    answer = ask(server, "chain", 1, sequence_id=70)
    assert answer.status == 400
    assert "step 1: " in answer.json()["error"]


def test_a_messagepack_body_may_be_of_a_sequence(server: Server) -> None:
    tensor = {"name": "x", "datatype": "INT32", "shape": [1, 1], "data": b"\5\0\0\0"}
    for number, flags in enumerate(({"sequence_start": True}, {"sequence_end": True}), 1):
        asked = {"inputs": [tensor], "parameters": {"sequence_id": "mp"} | flags}
        headers = {"Content-Type": "application/msgpack"}
        body = msgspec.msgpack.encode(asked)
        answer = server.request("POST", "/v2/models/text/infer", body, headers)
        (y, *_) = msgspec.msgpack.decode(answer.body)["outputs"]
        assert y["data"] == bytes([5 * number, 0, 0, 0])


def http_infer(client: Any, model: str, value: int, **more: Any) -> int:
    given = http_client.InferInput("x", [1, 1], "INT32")
    given.set_data_from_numpy(np.array([[value]], np.int32))
    return int(client.infer(model, [given], **more).as_numpy("y")[0, 0])


def test_our_own_clients_speak_of_sequences(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}"
    with overcommit.Client(url) as client:
        for number, ends in enumerate(({"sequence_start": True}, {}, {"sequence_end": True}), 1):
            result = client.infer("counter", {"x": [[2]]}, sequence_id=90, **ends)
            assert result["y"].tolist() == [[2 * number]]
        with pytest.raises(BadRequest, match="must specify the START flag"):
            client.infer("counter", {"x": [[2]]}, sequence_id=90)

    async def ask_twice() -> list[Any]:
        async with overcommit.AsyncClient(url) as client:
            first = await client.infer("text", {"x": [[3]]}, sequence_id="own", sequence_start=True)
            last = await client.infer("text", {"x": [[3]]}, sequence_id="own", sequence_end=True)
            return [first["y"].tolist(), last["y"].tolist()]

    assert asyncio.run(ask_twice()) == [[[3]], [[6]]]


def test_tritons_http_client_speaks_of_sequences(server: Server) -> None:
    with http_client.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=4) as client:
        assert http_infer(client, "counter", 3, sequence_id=50, sequence_start=True) == 3
        assert http_infer(client, "text", 4, sequence_id="a", sequence_start=True) == 4
        assert http_infer(client, "counter", 3, sequence_id=50) == 6
        assert http_infer(client, "text", 4, sequence_id="a", sequence_end=True) == 8
        assert http_infer(client, "counter", 3, sequence_id=50, sequence_end=True) == 9
        with pytest.raises(InferenceServerException, match="must specify the START flag"):
            http_infer(client, "counter", 3, sequence_id=50)


def test_tritons_grpc_stream_carries_interleaved_sequences(server: Server) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        expected = {}
        sums = dict.fromkeys((60, 61, 62), 0)
        for number in range(30):
            key = 60 + number % 3
            sums[key] += number
            expected[str(number)] = sums[key]
            given = grpc_client.InferInput("x", [1, 1], "INT32")
            given.set_data_from_numpy(np.array([[number]], np.int32))
            client.async_stream_infer(
                "counter",
                [given],
                request_id=str(number),
                sequence_id=key,
                sequence_start=number < 3,
                sequence_end=number >= 27,
            )
        found = {}
        for _ in range(30):
            result, error = answers.get(timeout=WATCHDOG_S)
            assert error is None, error
            found[result.get_response().id] = int(result.as_numpy("y")[0, 0])
        client.stop_stream()
    assert found == expected


def test_a_grpc_call_in_the_middle_of_nothing_is_an_invalid_argument(server: Server) -> None:
    given = grpc_client.InferInput("x", [1, 1], "INT32")
    given.set_data_from_numpy(np.array([[1]], np.int32))
    with (
        grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client,
        pytest.raises(InferenceServerException, match="must specify the START flag") as raised,
    ):
        client.infer("counter", [given], sequence_id=63)
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_new_version_of_a_model_with_state_tries_out_and_takes_over(
    server: Server, root: Path
) -> None:
    folder = root / "narrow"
    (folder / "model.py").write_text(COUNTER.replace("int(x[row, 0])", "2 * int(x[row, 0])"))
    answers = []

    def has_taken_over() -> bool:
        parameters = {"sequence_id": 80, "sequence_start": True, "sequence_end": True}
        answers.append(ask(server, "narrow", 3, **parameters))
        return bool(answers[-1].json()["outputs"][0]["data"] == [6])

    server.wait_until(has_taken_over)
    assert {answer.status for answer in answers} == {200}


def test_many_sequences_at_once_add_up(server: Server) -> None:
    wrong: list[object] = []

    def run(key: int, model: str, bonus: int) -> None:
        try:
            for number in range(12):
                ends = {"start": number == 0, "end": number == 11}
                got = step(server, model, key, 1, **ends)
                if got != number + 1 + (bonus if number == 0 else 0):
                    wrong.append((key, number, got))
        except BaseException as error:
            wrong.append(error)

    threads = [
        threading.Thread(target=run, args=(100 + number, *which))
        for number in range(6)
        for which in (("counter", 0), ("adder", 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert not wrong


def test_a_killed_worker_loses_its_sequences_and_says_so(server: Server) -> None:
    keys = range(200, 208)
    for key in keys:
        step(server, "adder", key, 1, start=True)
    victim = server.pids("worker")[0]
    os.kill(victim, signal.SIGKILL)
    server.wait_until(
        lambda: victim not in server.pids("worker") and len(server.pids("worker")) == 2
    )
    statuses = []
    for key in keys:
        answer = ask(server, "adder", 1, sequence_id=key)
        statuses.append(answer.status)
        if answer.status == 200:
            assert answer.json()["outputs"][0]["data"][0] == 2
            step(server, "adder", key, 1, end=True)
            continue
        # Also by the front end that has not seen the sequence before.
        assert answer.status == 502
        assert f"sequence {key} is lost" in answer.json()["error"]
        assert step(server, "adder", key, 3, start=True) == 4
        for sum_so_far in range(4, 12):  # by any front end, whatever it has seen before
            assert step(server, "adder", key, 1) == sum_so_far
        assert step(server, "adder", key, 1, end=True) == 12
    assert 200 in statuses
    assert 502 in statuses


def test_shares_of_versions_with_sequences_are_refused_or_said_to_mean_nothing(
    server: Server,
) -> None:
    text = "the rollout's weights of version 1 mean nothing"
    server.wait_for_log(f"model 'apart': {text}")
    said = server.post("/v2/overcommit/models/counter/rollout", {"weights": {"1": 10}})
    assert said.status == 400
    assert text in said.json()["error"]


BREAKS_SOON = """
from overcommit.runtime import seats
from overcommit.server.cli import main
seats.RESTART_BUDGET = 2
main()
"""


def test_sequences_of_a_seat_that_broke_for_good_are_served_by_others(tmp_path: Path) -> None:
    add_counter(tmp_path / "models", "counter")
    flags = ("--allow-code", "--front-ends", "2", "--workers", "2")
    serve = ("-c", BREAKS_SOON, "serve")
    models, cache = tmp_path / "models", tmp_path / "cache"
    with Server(models, cache=cache, flags=flags, serve=serve) as server:
        server.wait_until(lambda: server.models()["counter/1"]["state"] == "READY")

        def row() -> Any:
            workers = [row for row in server.status()["processes"] if row["kind"] == "worker"]
            return next(row for row in workers if row["seat"] == 0)

        for deaths in (1, 2):
            server.wait_until(lambda: row()["state"] == "LIVE")
            os.kill(row()["pid"], signal.SIGKILL)
            server.wait_until(lambda count=deaths: row()["deaths"] == count)
        assert row()["state"] == "BROKEN"
        for key in range(1, 9):
            assert step(server, "counter", key, 1, start=True) == 1
            assert step(server, "counter", key, 1, end=True) == 2


def test_metadata_and_configuration_tell_what_clients_send(server: Server) -> None:
    metadata = server.get("/v2/models/adder").json()
    assert [each["name"] for each in metadata["inputs"]] == ["x"]
    assert [each["name"] for each in metadata["outputs"]] == ["y"]
    config = server.get("/v2/models/adder/config").json()
    assert [each["name"] for each in config["input"]] == ["x"]
    batching = config["sequence_batching"]
    assert batching["max_sequence_idle_microseconds"] == 60_000_000
    assert batching["direct"] == {"max_queue_delay_microseconds": 0, "minimum_slot_utilization": 0}
    assert batching["control_input"][0]["name"] == "start"
    assert batching["state"][0]["output_name"] == "sum_out"
    assert "dynamic_batching" not in config


def test_unloading_ends_the_sequences(server: Server) -> None:
    step(server, "text", "gone", 1, start=True)
    assert server.post("/v2/repository/models/text/unload", {}).status == 200
    server.wait_until(lambda: ask(server, "text", 1, sequence_id="gone").status == 404)
    assert server.post("/v2/repository/models/text/load", {}).status == 200
    # Or 502 from a worker whose predecessor was killed: it might have been there.
    server.wait_until(lambda: ask(server, "text", 1, sequence_id="gone").status in (400, 502))
    assert step(server, "text", "gone", 1, start=True, end=True) == 1
