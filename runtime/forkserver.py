"""The fork server: a process that has torch imported and forks workers in milliseconds.

It runs no torch operation and asks CUDA nothing, so that a child may initialise CUDA itself, and it
has exactly one OS thread, so that fork copies a sane process.  `gc.freeze` keeps the collector from
writing to the object headers that children share.

Invariants
 1. One thread, before every fork.  The self-check after each preload tests it; if it fails the
    supervisor is told `Unfit` and starts children by spawn from then on.
 2. A child is not reaped before its pidfd has been sent: the pid cannot be reused until then; nor before
    it was said how it ended.
 3. A Fork is answered by Forked or, where the machine has no process or descriptor left, by Unforked;
    then there is no child, and those that were forked before live on.
 4. The supervisor's death ends this process, and this process's death ends its children.

The supervisor starts it by exec and talks to it as to any other child.
"""

from __future__ import annotations

import logging
import os
import select
import signal
from collections.abc import Callable

from overcommit.runtime import preload
from overcommit.runtime.child import run_child
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.messages import Exited, Fork, Forked, Preload, Ready, Stop, Unfit, Unforked

log = logging.getLogger("overcommit.forkserver")


def main(control_fd: int) -> None:
    """Serve Fork messages until Stop or until the supervisor is gone."""
    control = ControlSocket(control_fd)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    _check(control, lambda: preload.preload(()), Ready(pid=os.getpid()))
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        select.select((control.fileno(), wake_read), (), ())
        _drain(wake_read)
        while (received := control.try_receive()) is not None:
            message, fds = received
            if isinstance(message, Stop):
                return
            if isinstance(message, Preload):
                modules = message.modules
                _check(control, lambda modules=modules: preload.preload(modules), None)  # type: ignore[misc]
            elif isinstance(message, Fork):
                _fork(control, message, fds["control"], (wake_read, wake_write))
        _reap(control)


def _check(control: ControlSocket, import_all: Callable[[], None], ready: Ready | None) -> None:
    import_all()
    reason = preload.self_check()
    if reason is not None:
        control.send(Unfit(reason=reason))
    elif ready is not None:
        control.send(ready)


def _fork(
    control: ControlSocket, message: Fork, child_control: int, private: tuple[int, ...]
) -> None:
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(child_control)
        control.send(Unforked(ticket=message.ticket, reason=str(error)))
        return
    if pid == 0:
        # The child keeps nothing of the fork server's: a stray copy of the control socket would
        # hide the supervisor's death from it.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        for fd in private:
            os.close(fd)
        run_child(message.kind, child_control, parent)
    os.close(child_control)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        control.send(Unforked(ticket=message.ticket, reason=str(error)))
        return
    control.send(Forked(ticket=message.ticket, pid=pid, fds=("pidfd",)), (pidfd,))
    os.close(pidfd)


def _reap(control: ControlSocket) -> None:
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        control.send(Exited(pid=ended.si_pid, code=code))
        os.waitpid(ended.si_pid, 0)


def _drain(fd: int) -> None:
    try:
        os.read(fd, 4096)
    except BlockingIOError:
        return
