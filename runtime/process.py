"""Starting, watching and ending the child processes of a server.

Owns the launch of children (by exec, or through the fork server), their control sockets and their
pidfds.  Knows nothing of models or rings.

Invariants
 1. A child is dead when its pidfd says so, not when it is silent: until then what it could write to
    stays its own.
 2. Whatever was started is ended: `Process.close` is called once for each, on every path.
 3. A start that fails leaves nothing: no process, no descriptor, no child that is waited for.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overcommit.runtime.config import REAP_TIMEOUT_S
from overcommit.runtime.control import ControlSocket, socket_pair
from overcommit.runtime.messages import Exited, Fork, Forked, Kind, Preload, Unfit, Unforked

log = logging.getLogger("overcommit.process")


@dataclass(slots=True, eq=False, weakref_slot=True)
class Process:
    """One running child: its pid, its pidfd (None until the fork server has answered), its socket."""

    kind: str
    control: ControlSocket
    pid: int | None = None
    pidfd: int | None = None
    popen: subprocess.Popen[bytes] | None = None
    kill_asked: bool = False
    is_mute: bool = False  # it has closed its control socket
    code: int | None = None  # of a forked one that ended; a signal is negative

    def kill(self) -> None:
        """SIGKILL; a child that the fork server has not named yet is killed when it is."""
        self.kill_asked = True
        if self.pidfd is not None:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return

    def close(self) -> str:
        """Reap and release everything; return how it ended, in words."""
        ending = "reaped by the fork server" if self.pid is not None else "it never began"
        if self.popen is not None:
            self.code = self.popen.wait()
        elif self.code is None and self.pid is not None:
            self.code = _code_of_zombie(self.pid)
        if self.code is not None:
            ending = _in_words(self.code)
        elif self.pidfd is not None and not _is_dead(self.pidfd):
            ending = "left behind: it does not die"  # only a driver that hangs can do that
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        self.control.close()
        return ending


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:  # one that Python has no name for
        return f"signal {-code}"


def _code_of_zombie(pid: int) -> int | None:
    """Return how a process ended that is dead and not reaped yet; None: it is, or does not die."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(") ")[2].split()  # from the state on, the third of the file's
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == "Z" else None


def _is_dead(pidfd: int) -> bool:
    waiting = select.poll()  # not select: a supervisor that holds a GPU's chunks has high numbers
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(REAP_TIMEOUT_S * 1000))


def spawn(kind: str) -> Process:
    """Start a child by exec, in a fresh interpreter.

    Raises OSError where the machine has no process or descriptor left; then nothing is.
    """
    ours, theirs = socket_pair()
    process = Process(kind, ControlSocket(ours))
    try:
        # -P: the working directory must not get onto the child's import path.
        process.popen = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "overcommit.runtime.child"),
                *(kind, str(theirs), str(os.getpid())),
            ],
            pass_fds=(theirs,),
            stdin=subprocess.DEVNULL,
        )
        process.pid = process.popen.pid
        process.pidfd = os.pidfd_open(process.pid)
    except BaseException:
        if process.popen is not None:
            process.popen.kill()
        process.close()
        raise
    finally:
        os.close(theirs)
    return process


class ForkServer:
    """The supervisor's handle on the fork server.

    `on_forked(process)` is called when a child of it has got its pidfd, `on_unborn(process, why)` when
    there will be none.
    """

    def __init__(
        self,
        on_forked: Callable[[Process], None],
        on_unborn: Callable[[Process, str], None],
    ) -> None:
        self.process = spawn("fork_server")
        self.is_ready = False
        self.unfit: str | None = None
        self._on_forked = on_forked
        self._on_unborn = on_unborn
        self._waiting: dict[int, Process] = {}
        self._children: weakref.WeakValueDictionary[int, Process] = weakref.WeakValueDictionary()
        self._ticket = 0

    def fork(self, kind: Kind) -> Process:
        """Ask for a child; its pid and pidfd come later.  Raises OSError as `spawn`."""
        ours, theirs = socket_pair()
        child = Process(kind, ControlSocket(ours))
        try:
            self._ticket += 1
            message = Fork(kind=kind, ticket=self._ticket, fds=("control",))
            self.process.control.post(message, (theirs,))
        except BaseException:
            child.close()
            raise
        finally:
            os.close(theirs)
        self._waiting[self._ticket] = child
        return child

    def preload(self, modules: tuple[str, ...]) -> None:
        """Import these in the fork server, for the children to come."""
        self.process.control.post(Preload(modules=modules))

    def on_message(self, message: object, fds: dict[str, int]) -> None:
        """Handle what the fork server said."""
        if isinstance(message, Forked):
            child = self._waiting.pop(message.ticket)
            child.pid, child.pidfd = message.pid, fds["pidfd"]
            self._children[message.pid] = child
            if child.kill_asked:
                child.kill()
            self._on_forked(child)
        elif isinstance(message, Unforked):
            self._on_unborn(self._waiting.pop(message.ticket), message.reason)
        elif isinstance(message, Unfit):
            self.unfit = message.reason
            log.warning("the fork server is unfit (%s): workers are spawned", message.reason)
        elif isinstance(message, Exited):
            child_or_none = self._children.pop(message.pid, None)
            if child_or_none is not None:
                child_or_none.code = message.code
            if message.code:
                log.warning("forked process %d ended: %s", message.pid, _in_words(message.code))

    def abandon(self) -> None:
        """The server is dead: the children that were asked for will never come."""
        while self._waiting:
            _, child = self._waiting.popitem()
            self._on_unborn(child, "the fork server ended")
