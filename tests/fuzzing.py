"""Feeding a reader with bytes that are nearly right.

Inputs are made of good ones: bits flipped, pieces cut out, doubled, moved, exchanged with pieces of
another, numbers replaced by the ones at the ends of their types.  `OVERCOMMIT_FUZZ` multiplies how
many there are (1: seconds, 1000: about an hour for all targets), `OVERCOMMIT_FUZZ_SEED` takes others.

    mutate -> target(bytes)     fine: it returns, or raises one of `refuses`
                                not: anything else, longer than HANG_S, memory that stays

A failure shows the seed, the number and the bytes, with which it can be repeated.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

HANG_S = 60.0  # for one input: a watchdog, not a measure
GROWTH_BYTES_MAX = 1 << 20  # that the second half of a run may keep, where nothing is remembered
_ENDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
_TEXTS = (
    b"-1",
    b"0",
    b"1e999",
    b"99999999999999999999",
    b"null",
    b"[[[[",
    b'"',
    b"\\ud800",
    b"\xff",
)
Target = Callable[[bytes], object]


def runs(times: int) -> int:
    """How many inputs a test takes."""
    return max(1, int(times * float(os.environ.get("OVERCOMMIT_FUZZ", "1"))))


def mutate(draw: random.Random, corpus: Sequence[bytes]) -> bytes:
    """Make one input out of good ones."""
    data = bytearray(draw.choice(corpus))
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 2, 4, 8, 32, 256)))
        kind = draw.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            piece = data[at:end]
            del data[at:end]
            to = draw.randrange(len(data) + 1)
            data[to:to] = piece
        elif kind == 4:
            other = draw.choice(corpus)
            start = draw.randrange(len(other) + 1)
            data[at:end] = other[start : start + draw.choice((1, 4, 16, 64))]
        elif kind == 5:
            width = draw.choice((1, 2, 4, 8))
            order = draw.choice(("little", "big"))
            data[at : at + width] = (draw.choice(_ENDS) & ((1 << 8 * width) - 1)).to_bytes(
                width,
                order,  # type: ignore[arg-type]
            )
        elif kind == 6:
            data[at:end] = draw.choice(_TEXTS)
        elif kind == 7:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
        else:
            del data[at:]
    return bytes(data)


def fuzz(
    target: Target,
    corpus: Sequence[bytes],
    times: int,
    refuses: tuple[type[Exception], ...] = (),
    *,
    grown_max: int = GROWTH_BYTES_MAX,
) -> int:
    """Feed a target; return how many inputs it took without refusing them."""
    seed = int(os.environ.get("OVERCOMMIT_FUZZ_SEED", "1"))
    draw = random.Random(seed)
    for good in corpus:
        target(good)  # else it would be fuzzed with nonsense
    taken = 0
    kept = 0
    count = runs(times)
    tracemalloc.start()
    try:
        for number in range(count):
            if number == count // 2:
                kept = _kept()
            data = mutate(draw, corpus)
            try:
                with _watched():
                    target(data)
                taken += 1
            except refuses:
                pass
            except BaseException as error:
                error.add_note(f"seed {seed}, input {number}: {data!r}")
                raise
        grown = _kept() - kept
    finally:
        tracemalloc.stop()
    assert grown <= grown_max, f"the last {count - count // 2} inputs left {grown} bytes"
    return taken


def _kept() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    def too_long(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it takes longer than {HANG_S:.0f} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
