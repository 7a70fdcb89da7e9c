"""A thread for what is too slow for a worker's loop: reading headers, importing, recording.

Invariants
 1. Work is done in the order in which it was asked for, one piece at a time, by all helpers of a
    process together: two threads that import parts of torch in another order find halves of them.
 2. The thread touches nothing but its two queues and the bell; what work raises is its result.
 3. The thread is started with the first piece of work.
 4. After `close` the bell is not rung: it may be another one's file by then.

Called by the rooms of a worker; `key` tells them what a result is for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from overcommit.runtime.errors import ModelError

Key = TypeVar("Key")
Result = TypeVar("Result")

_turn: Final = threading.Lock()  # held by the helper that is at work


class Helper(Generic[Key, Result]):
    """One thread and its results."""

    def __init__(self, name: str, ring: Callable[[], None]) -> None:
        self._name = name
        self._ring: Callable[[], None] | None = ring
        self._lock = threading.Lock()  # guards _ring
        self._wanted: queue.SimpleQueue[tuple[Key, Callable[[], Result]]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Key, Result | Exception]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, key: Key, work: Callable[[], Result]) -> None:
        """Have this done; the bell rings when it is."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._wanted.put((key, work))

    def try_take(self) -> tuple[Key, Result | Exception] | None:
        """Return one result, or what its work raised; None when there is none."""
        try:
            return self._done.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """Nobody listens any more; what is being done is done for nobody."""
        with self._lock:
            self._ring = None

    def _run(self) -> None:
        while True:
            # In a frame of its own: what was made is in no variable here while the next work is waited for.
            self._do(*self._wanted.get())
            with self._lock:
                if self._ring is not None:
                    self._ring()

    def _do(self, key: Key, work: Callable[[], Result]) -> None:
        try:
            with _turn:
                result = work()
            self._done.put((key, result))
        except Exception as error:  # foreign code runs here: what it raises is its result
            self._done.put((key, error))
        except BaseException as error:  # it ends neither this thread nor the process
            self._done.put((key, ModelError.of(error)))
