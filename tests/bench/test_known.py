"""Known answers: what is recognized without parsing, and that nothing wrong ever is."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from faultyserver import FaultyServer, run
from msgspec.structs import replace

from overcommit.bench.canned import Book
from overcommit.bench.connection import BULK_BYTES
from overcommit.bench.dialect import V2, Dialect, PlainJson, RawBytes
from overcommit.bench.echo import EchoPlan, EchoWorkload, scale_of
from overcommit.bench.errors import BenchError
from overcommit.bench.known import KnownWorkload
from overcommit.bench.loadgen import Plan
from overcommit.bench.payloads import PayloadPlan
from overcommit.bench.popularity import ByZipf
from overcommit.bench.run import Run
from overcommit.bench.tables import TablePlan, TableWorkload, rows_of
from overcommit.bench.workload import WorkloadPlan, make_workload

WATCHDOG_S = 60.0
DIALECTS: list[Dialect] = [
    V2(),
    V2(binary=True, input="INPUT0", output="OUTPUT0"),
    PlainJson(path="/predict/{model}"),
    PlainJson(path="/{model}", response_key="", is_nested=True),
    RawBytes(path="/{model}"),
]
LARGE = PayloadPlan(nbytes=2 * BULK_BYTES)
BINARY = EchoPlan(models=("a", "b", "c"), scales=(1.0, 1.5, 2.0), dialect=V2(binary=True), inputs=4)
SMALL = EchoPlan(models=("a", "b", "c"), scales=(1.0, 1.5, 2.0), inputs=4)


def plan_of(workload: WorkloadPlan) -> Plan:
    return Plan(workload=workload, port=0, connections=3, seconds=WATCHDOG_S, timeout_s=WATCHDOG_S)


def only(number: int, change: Callable[[bytes], bytes]) -> Callable[[int, bytes], bytes]:
    return lambda n, answer: change(answer) if n == number else answer


def flip_last(answer: bytes) -> bytes:
    return answer[:-1] + bytes([answer[-1] ^ 1])


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: type(d).__name__)
def test_every_dialect_is_understood_both_ways(dialect: Dialect) -> None:
    plan = EchoPlan(models=("a", "b"), scales=(1.0, 3.0), inputs=4, dialect=dialect)
    server = FaultyServer(plan_of(plan))
    tally = run(server)
    assert tally.right == tally.sent == len(server.seen) >= 300
    assert tally.times().count == tally.right
    assert sum(tally.targets.values()) == tally.right
    assert set(tally.targets) == {"a", "b"}


@pytest.mark.parametrize("workload", [BINARY, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_one_wrong_byte_in_an_answer_that_is_long_known_is_noticed(
    workload: WorkloadPlan, pieces: int
) -> None:
    tally = run(FaultyServer(plan_of(workload), only(200, flip_last), pieces=pieces), 250)
    assert (tally.wrong, tally.broken, tally.unexpected) == (1, 0, 0)
    assert tally.right == tally.sent - 1
    assert "values are wrong" in tally.examples[0]


@pytest.mark.parametrize("workload", [SMALL, LARGE], ids=["small", "large"])
def test_known_answers_are_not_judged_again(
    workload: WorkloadPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []
    inner = KnownWorkload.judge

    def judge(self: KnownWorkload, request: object, *rest: object) -> str | None:
        judged.append(request)
        return inner(self, request, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(KnownWorkload, "judge", judge)
    tally = run(FaultyServer(plan_of(workload)))
    kinds = 12 if workload is SMALL else 2
    # Each connection may wait for its first answer of a kind while another one learns it.
    assert kinds <= len(judged) <= 3 * kinds
    assert tally.right == tally.sent


def test_a_head_that_changes_is_read_anew_and_then_known() -> None:
    count = itertools.count()

    def dated(number: int, answer: bytes) -> bytes:
        return answer.replace(b"\r\n", b"\r\ndate: %d\r\n" % (1000 + next(count) // 50), 1)

    tally = run(FaultyServer(plan_of(SMALL), dated))
    assert tally.right == tally.sent


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("errors", lambda answer: answer.replace(b" 200 ", b" 500 ")),
        ("wrong", lambda answer: answer.replace(b'"model_name":"', b'"model_name":"x')),
        ("wrong", lambda answer: answer.replace(b"FP32", b"FP64")),
        ("wrong", lambda answer: b"no HTTP at all"),
    ],
)
def test_what_else_can_be_wrong_with_an_answer(what: str, change: Callable[[bytes], bytes]) -> None:
    def changed(answer: bytes) -> bytes:
        head, _, body = change(answer).partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
        length = [b"content-length: %d" % len(body)] if body else []
        return b"\r\n".join(lines + length) + b"\r\n\r\n" + body

    tally = run(FaultyServer(plan_of(SMALL), only(200, changed)))
    assert getattr(tally, what) == 1
    assert tally.right == tally.sent - 1 == tally.accounted - 1


def test_an_answer_that_is_cut_short_is_a_lost_one() -> None:
    plan = plan_of(SMALL)
    server = FaultyServer(plan, only(200, lambda answer: answer[:-1]))

    server.plan = replace(plan, timeout_s=0.2)
    tally = run(server)
    assert tally.unanswered == 1
    assert tally.right == tally.sent - 1


def test_the_answer_of_another_model_is_named() -> None:
    other = EchoWorkload(SMALL, 0)

    def swap(number: int, answer: bytes) -> bytes:
        return answer if number < 200 else swapped(answer)

    def swapped(answer: bytes) -> bytes:
        for model, name in enumerate("abc"):
            for number in range(4):
                expected = other.expected(model, number)
                if answer == other.dialect.answer(name, expected):
                    return other.dialect.answer(name, other.expected((model + 1) % 3, number))
        raise AssertionError

    tally = run(FaultyServer(plan_of(SMALL), swap), 210)
    assert tally.wrong >= 11
    assert all("got the answer of" in text for text in tally.examples)


def test_the_answer_to_another_input_is_named() -> None:
    workload = EchoWorkload(SMALL, 0)
    request = workload.request(1, 2)
    answer = workload.dialect.answer("b", workload.expected(1, 3))
    fault = workload.judge(request, {}, answer.partition(b"\r\n\r\n")[2])
    assert fault == "b: input 2: got the answer to input 3"


def test_a_head_is_known_only_with_its_own_length() -> None:
    workload = EchoWorkload(SMALL, 0)
    run = Run("", 0, workload, 0)
    one, two = workload.request(0, 0), workload.request(0, 1)
    for request, body in ((one, b"right"), (two, b"also right")):
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
        run.learn(request, head, {b"content-length": b"%d" % len(body)}, body)
    assert run.is_known(one, b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright")
    assert not run.is_known(one, b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nright")
    assert not run.is_known(one, b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright and more")
    assert not run.is_known(one, b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong")
    assert not run.is_known(two, b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright")


def test_an_answer_without_a_length_teaches_nothing() -> None:
    workload = EchoWorkload(SMALL, 0)
    run, request = Run("", 0, workload, 0), workload.request(0, 0)
    run.learn(request, b"HTTP/1.1 200 OK\r\n\r\n", {b"transfer-encoding": b"chunked"}, b"")
    assert request.body is None


def test_scales_are_exact_and_distinct() -> None:
    scales = [scale_of(number) for number in range(2000)]
    assert len(set(scales)) == 2000
    assert [float(np.float32(scale)) for scale in scales] == scales


def test_rows_of_a_table_do_not_depend_on_the_others_and_differ_by_seed() -> None:
    whole = rows_of(3, np.arange(1000))
    np.testing.assert_array_equal(rows_of(3, np.array([999, 5])), whole[[999, 5]])
    assert whole.dtype == np.float32
    assert (whole >= 1).all()
    assert (whole < 257).all()
    assert np.mean(whole == rows_of(4, np.arange(1000))) < 0.01


def test_a_table_answers_with_its_own_row() -> None:
    plan = TablePlan(models=("t", "u"), seeds=(7, 8), rows=1000, inputs=8)
    work = TableWorkload(plan, 0)
    for number, x in enumerate(work.inputs):
        row = rows_of(8, np.arange(1000))[int(x[0, 0])]
        np.testing.assert_array_equal(work.expected(1, number), x * row)


def test_popularity_decides_who_is_asked() -> None:
    names = tuple(f"m{number}" for number in range(10))
    plan = EchoPlan(models=names, scales=tuple(range(1, 11)), popularity=ByZipf(exponent=3.0))
    workload = make_workload(plan, 1)
    asked = [workload.draw(b"").target for _ in range(500)]
    assert max(asked.count(name) for name in names) > 300
    in_turn = make_workload(EchoPlan(models=names, scales=tuple(range(1, 11))), 1)
    assert [in_turn.draw(b"").target for _ in range(20)] == [*names, *names]


@pytest.mark.parametrize(
    "plan",
    [
        EchoPlan(models=("a",), scales=(1.0, 2.0)),
        EchoPlan(models=()),
        TablePlan(models=("a",), seeds=()),
        TablePlan(models=("a",), seeds=(1,), rows=0),
    ],
)
def test_a_plan_that_does_not_fit_itself_is_refused(plan: WorkloadPlan) -> None:
    with pytest.raises(BenchError):
        make_workload(plan, 0)


def test_a_book_has_an_answer_to_each_request_and_to_nothing_else() -> None:
    workload = EchoWorkload(SMALL, 0)
    book = Book(workload)
    assert book.answer(workload.request(2, 3).payload) is not None
    assert book.answer(b"GET / HTTP/1.1\r\n\r\n") is None
