"""The process of a worker: set up with what `Start` says, then the worker's loop until the end.

Invariants
 1. Engines, and torch with them, are imported once `Start` is there: importing this room costs no
    other kind of process anything.
 2. Code of a model is run only if the server and the model's config both allow it.
 3. The process is the worker's own: its switch interval, torch's threads and its garbage are set here.

Started as a child by the supervisor, see `child.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Final

from overcommit.runtime.arena import Ranges
from overcommit.runtime.bound import Opened, Opener
from overcommit.runtime.config import START_TIMEOUT_S
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.messages import Start
from overcommit.runtime.numa import move_to_site
from overcommit.runtime.payload_pins import PayloadPins
from overcommit.runtime.worker import Worker
from overcommit.runtime.worker_memory import open_memory
from overcommit.runtime.worker_messages import VersionInfo

# The helper thread imports code for seconds; with CPython's 5 ms it would delay each batch by that.
SWITCH_INTERVAL_S: Final = 0.0005


def main(control_fd: int) -> None:
    """Be a worker on this control socket until Stop or until the supervisor is gone."""
    control = ControlSocket(control_fd)
    start, fds = control.receive(START_TIMEOUT_S) or (None, {})
    if not isinstance(start, Start):
        raise ProtocolError("a worker's first message must be Start")
    # Engines import torch: only now, and in a worker only.
    from overcommit.runtime import engines
    from overcommit.runtime.image import read_header

    memory = open_memory(control, start, fds)
    if memory is None:
        return
    threads = _threads(start)
    if start.cuda_device is None:
        move_to_site(start.site, start.sites)
    engines.set_up(threads, memory.place, memory.backend)

    code_is_allowed = start.settings.allow_code

    def open_program(info: VersionInfo) -> Opened:
        header, _ = read_header(info.image_path)
        allow_code = code_is_allowed and info.config.allow_code
        return header, engines.load_program(header, allow_code=allow_code)

    digest_of = memory.digest_of if start.settings.verify == "always" else None
    serve(control, start, fds, open_program, memory.ranges, memory.pins, digest_of)


def serve(
    control: ControlSocket,
    start: Start,
    fds: dict[str, int],
    open_program: Opener,
    ranges: Ranges | None = None,
    pins: PayloadPins | None = None,
    digest_of: Callable[[int, int], int] | None = None,
) -> None:
    """Run a worker in this process, which is its own."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    worker = Worker(control, start, fds, open_program, ranges, pins)
    worker.versions.digest_of = digest_of
    worker.garbage.take_over()
    worker.run()


def _threads(start: Start) -> int:
    threads = start.settings.worker_threads
    if threads is None:
        threads = len(os.sched_getaffinity(0)) // (start.settings.workers * start.sites)
    return max(1, threads)
