"""The same engine in a bare loop: what a model gives when nothing is served.

Run as `python -m overcommit.bench.bare_loop`, with a `Loop` as one line of JSON on standard input:
maps the image, binds the program as a worker does, and runs full batches one after the other.
Prints the rows a second of each round as soon as the line `go` comes.
"""

from __future__ import annotations

import mmap
import sys
import time

import msgspec
import numpy as np


class Loop(msgspec.Struct, frozen=True, kw_only=True):
    """What to run."""

    image: str
    batch: int
    tokens: int
    threads: int
    seconds: float
    vocabulary: int


def main() -> None:
    """Run rounds until standard input ends."""
    loop = msgspec.json.decode(sys.stdin.buffer.readline(), type=Loop)
    from overcommit.runtime import engines, preload
    from overcommit.runtime.image import read_payload

    preload.preload(())  # the environment of a worker
    engines.set_up(loop.threads)
    header, payload = read_payload(loop.image)
    memory = mmap.mmap(-1, header.nbytes)  # aligned, as an arena is
    memory[:] = payload
    program = engines.load_program(header, allow_code=False)
    model = program.bind(header, memoryview(memory))
    random = np.random.default_rng(1)
    shape = (loop.batch, loop.tokens)
    ids = random.integers(1, loop.vocabulary, size=shape, dtype=np.int64)
    print("ready", flush=True)
    while sys.stdin.buffer.readline():
        batches = 0
        started_s = time.perf_counter()
        while (elapsed_s := time.perf_counter() - started_s) < loop.seconds:
            model.run({"input_ids": ids.copy(), "attention_mask": np.ones_like(ids)})
            batches += 1
        print(batches * loop.batch / elapsed_s, flush=True)


if __name__ == "__main__":
    main()
