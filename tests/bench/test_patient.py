"""Clients that do as they are told, against a server that refuses every other request."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np

from overcommit.bench import wire
from overcommit.bench.dialect import V2
from overcommit.bench.echo import EchoPlan, EchoWorkload
from overcommit.bench.patient import Book, Group, measure

REFUSAL = b"HTTP/1.1 503 Busy\r\nretry-after: 1\r\nretry-after-ms: 3\r\ncontent-length: 2\r\n\r\n{}"


HELD_S = 0.2


def serve(
    listener: socket.socket, refusing: bool = False, right: bool = True, held_s: float = 0.0
) -> None:
    """Answer one connection: an echo of everything, after a refusal of each; hold the first back."""
    connection, _ = listener.accept()
    data, number = b"", 0
    with connection, connection.makefile("rb") as file:
        while head := file.readline():
            length = 0
            while head.strip():
                if head.lower().startswith(b"content-length:"):
                    length = int(head.split(b":")[1])
                head = file.readline()
            data = file.read(length)
            number += 1
            time.sleep(held_s if number == 1 else 0.0)
            if refusing and number % 2:
                connection.sendall(REFUSAL)
                continue
            values = np.frombuffer(data[-64:], np.float32) if right else np.zeros(16, np.float32)
            connection.sendall(V2(binary=True).answer("echo", values.reshape(1, 16)))


def run(*, refusing: bool = False, right: bool = True, timeout_ns: int = 10**12) -> Book:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener, refusing, right), daemon=True)
        thread.start()
        workload = EchoWorkload(EchoPlan(dialect=V2(binary=True)), 1)
        (book,) = measure(listener.getsockname()[1], [Group("a", workload, 1, timeout_ns)], 0.3)
        thread.join()
    assert book.sent == book.accounted > 0
    return book


def test_right_answers_are_in_time_or_late_by_their_deadline() -> None:
    assert run().in_time > 0
    book = run(timeout_ns=1)
    assert book.in_time == 0
    assert book.late > 0
    assert book.lateness_ns > 0


def test_a_group_that_waits_for_its_last_answer_takes_nothing_from_the_other_ones_rate() -> None:
    plan = EchoPlan(dialect=V2(binary=True))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Whichever connects first is served at once.
        servers = [threading.Thread(target=serve, args=(listener,), daemon=True)]
        servers += [
            threading.Thread(target=serve, args=(listener,), kwargs={"held_s": HELD_S}, daemon=True)
        ]
        for each in servers:
            each.start()
        groups = [Group(name, EchoWorkload(plan, 1), 1) for name in "ab"]
        books = measure(listener.getsockname()[1], groups, HELD_S / 10)
        for each in servers:
            each.join()
    quick, held = sorted(books, key=lambda book: book.seconds)
    assert held.seconds >= HELD_S
    assert quick.seconds < held.seconds - HELD_S / 4, "it ended when its own clients had"


def test_wrong_answers_are_counted_as_that() -> None:
    book = run(right=False)
    assert book.wrong == book.sent
    assert book.examples


def test_who_is_refused_comes_back_with_the_same_request_and_is_counted_as_true() -> None:
    book = run(refusing=True)
    assert book.refused in (book.in_time, book.in_time + 1)
    assert book.came_back == book.kept == book.in_time
    assert book.truth == 1.0


def test_a_timeout_is_in_the_requests_parameters() -> None:
    array = {"x": np.zeros((1, 4), np.float32)}
    with_it = wire.infer_request("/p", array, "y", binary=False, timeout_us=5000)
    assert b'"parameters":{"timeout":5000}' in with_it
    assert b"timeout" not in wire.infer_request("/p", array, "y", binary=False)
