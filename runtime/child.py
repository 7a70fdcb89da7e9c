"""Entry of every child process: `python -P -m overcommit.runtime.child KIND CONTROL_FD PARENT_PID`.

First the child binds its life to its parent's, then it runs the `main(control_fd)` of its kind.

Invariants
 1. A child never outlives its parent: PR_SET_PDEATHSIG first, then a look whether the parent died
    before that.  The control socket's EOF is the second line of defence.
 2. Terminal signals are the supervisor's business: a child ignores SIGINT and SIGTERM and waits to
    be told, so that Ctrl-C drains instead of cutting requests off.
 3. A child that fails says why on stderr and exits non-zero; it never unwinds into its parent.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
import traceback
from typing import Final

from overcommit.runtime import _shm

# Names, not imports: the fork server must not import uvicorn, nor a front end torch.
MODULE_OF_KIND: Final = {
    "front_end": "overcommit.server.frontend",
    "worker": "overcommit.runtime.worker_process",
    "mover": "overcommit.runtime.mover",
    "packer": "overcommit.runtime.packer",
    "fork_server": "overcommit.runtime.forkserver",
}


def tie_to_parent(parent_pid: int) -> None:
    """Die with the parent; leave at once if it is already gone."""
    _shm.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def run_child(kind: str, control_fd: int, parent_pid: int) -> None:
    """Become a child of this kind.  Does not return."""
    status = 1
    try:
        tie_to_parent(parent_pid)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        logging.basicConfig(
            level=os.environ.get("OVERCOMMIT_CHILD_LOG_LEVEL", "INFO"),
            format=f"%(asctime)s %(levelname)s {kind}[{os.getpid()}] %(message)s",
            force=True,
        )
        gc.disable()  # what is imported stays: to look through it again and again takes a sixth of the time
        main = importlib.import_module(MODULE_OF_KIND[kind]).main
        gc.enable()
        main(control_fd)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except EOFError:
        status = 0  # the supervisor is gone, and so are we
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)


def _low(fd: int) -> int:
    """Move a descriptor to the lowest free number: `select` takes none over 1023.

    Under that number a supervisor that holds a GPU's chunks made it.
    """
    low = os.dup(fd)
    os.close(fd)
    return low


if __name__ == "__main__":
    run_child(sys.argv[1], _low(int(sys.argv[2])), int(sys.argv[3]))
