"""The supervisor: the one process that decides, and that every other process hangs on.

It owns the memory descriptors, the registry, residency and the seats.  It never touches weights, is
never on the path of a request, and imports neither torch nor CUDA.  One thread, one place where it
blocks (`Supervisor.run`); the repository scan runs in a helper thread because it waits for the disk.

Invariants
 1. Everything that is started or made is ended or closed in `close`, on every path out.
 2. An event is handled to its end before the next one is looked at.  What fails, an event or a part of a
    turn, ends there (`boundary`): the others go on, and it is tried again.
 3. Only what fails before the loop ends the server: settings that cannot be served.
 4. SIGTERM or SIGINT: no new connections, every accepted request is answered, exit 0.  A second
    signal ends at once.

State machine

    STARTING --first front end, worker, mover ready [_on_ready]--> SERVING
    STARTING | SERVING --SIGTERM, SIGINT [_drain]--> DRAINING
    DRAINING --last front end gone, or drain_timeout_s over [_step]--> STOPPED

Called by the command line: `run(settings)` returns the exit status.
"""

from __future__ import annotations

import enum
import gc
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from overcommit.runtime.administration import Administration
from overcommit.runtime.catalogue import Catalogue
from overcommit.runtime.children import Child
from overcommit.runtime.config import HERALD_SPIN_NS, STOP_TIMEOUT_S, Settings
from overcommit.runtime.errors import OvercommitError, ProtocolError
from overcommit.runtime.front_end_messages import Admin, Counters, LinkBroken, Rehearsed, Used
from overcommit.runtime.house import House
from overcommit.runtime.listening import listen
from overcommit.runtime.messages import ArenaMade, Chunks, ChunksTaken, Drain, Ready
from overcommit.runtime.mover_messages import LoadDone, Populated
from overcommit.runtime.prefetching import local_s
from overcommit.runtime.process import Process
from overcommit.runtime.seat_news import Seats
from overcommit.runtime.worker_messages import Activate, Attaches, BindFailed

if TYPE_CHECKING:
    from _typeshed import HasFileno

log = logging.getLogger("overcommit")

TICK_S: Final = 0.5


class Phase(enum.Enum):
    """What the whole server is doing."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class Supervisor:
    """The event loop around a `House`."""

    def __init__(self, settings: Settings, wall_s: Callable[[], float] = local_s) -> None:
        self.phase = Phase.STARTING
        self._selector = selectors.DefaultSelector()
        self._deadline_ns = self._heralded_ns = 0
        self._started_ns = time.monotonic_ns()
        self.house = House(
            settings, self._watch_forked, self._on_child_gone, wall_s, self._on_unborn
        )
        self._run = self.house.boundary.run
        self._seats = Seats(self.house.fleet, self.house.occupied)
        self.catalogue = Catalogue(self.house)
        self.administration = Administration(self.house, self.catalogue)
        self._signals, self._signals_write = socket.socketpair()

    # --- life -----------------------------------------------------------------------------------
    def run(self) -> int:
        """Serve until told to stop; return the exit status."""
        house = self.house
        try:
            self._listen()
            self._catch_signals()
            self._register(house.fleet.bell, "the bell", self._on_bell)
            self._register(self.catalogue.watch.fd, "the repository scan", self._on_scanned)
            self.catalogue.start()
            while self.phase is not Phase.STOPPED:
                self._turn()
        finally:
            self.close()
        return 0

    def close(self) -> None:
        """End every child and release everything."""
        self.catalogue.close()
        self.house.fleet.stop()
        self.house.close()
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._signals.close()
        self._signals_write.close()

    def _listen(self) -> None:
        """Bind the ports, with a socket for each front end."""
        settings, fleet = self.house.settings, self.house.fleet
        count = settings.front_ends
        fds, fleet.port = listen(settings.host, settings.port, count, "--port")
        fleet.listen_fds["listen"] = fds
        if settings.grpc_port is not None:
            fds, port = listen(
                settings.host, settings.grpc_port, count, "--grpc-port (or --no-grpc)"
            )
            fleet.listen_fds["grpc"], fleet.grpc_port = fds, port

    def _catch_signals(self) -> None:
        self._signals.setblocking(False)
        self._signals_write.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._signals_write.fileno(), warn_on_full_buffer=False)
        self._register(self._signals, "a signal", self._on_signal)

    # --- one turn -------------------------------------------------------------------------------
    def _turn(self) -> None:
        """Do what is due and what happens next; what the bell has announced comes before what is due."""
        is_heralded = time.monotonic_ns() < self._heralded_ns
        timeout_s: float | None = 0.0
        if not is_heralded:
            self._step()
            timeout_s = self._run("the time of the next turn", self._timeout_s)
        events = self._selector.select(TICK_S if timeout_s is None else timeout_s)
        for key, _ in events:
            key.data()
        if is_heralded and events:  # what is due waits for no second bell
            self._heralded_ns = 0
        if pause_s := self.house.boundary.pause_s():
            time.sleep(pause_s)

    def _timeout_s(self) -> float:
        now_ns = time.monotonic_ns()
        times = [now_ns + int(TICK_S * 1e9)]
        if (tick_ns := self.house.next_tick_ns()) is not None:
            times.append(tick_ns)
        # A seat that is already due waits for something else, which is an event of its own.
        starts = [seat.start_at_ns() for seat in self.house.fleet.seats]
        times += [at for at in starts if at is not None and at > now_ns]
        if self.phase is Phase.DRAINING:
            times.append(self._deadline_ns)
        if any(c.process.control.has_backlog for c in self.house.fleet.children.values()):
            times.append(now_ns + 1_000_000)
        return max(0.0, (min(times) - now_ns) / 1e9)

    def _step(self) -> None:
        now_ns = time.monotonic_ns()
        house, administration, run = self.house, self.administration, self._run
        run("the start of processes", house.fleet.start_due, now_ns)
        if house.fleet.fork_server is not None:
            run("listening to a process", self._watch, house.fleet.fork_server.process, None)
        for child in house.fleet.children.values():
            run("listening to a process", self._watch, child.process, child)
        house.tick(now_ns)
        if house.prefetching is not None and self.phase is Phase.SERVING:
            run("prefetching", house.prefetching.step, now_ns)
        run("the end of hung processes", house.fleet.kill_overdue, now_ns)
        run("telling front ends of clients", administration.books.tell_new)
        run("gathering counts", administration.gathering.step, now_ns)
        self.catalogue.step(now_ns)
        run("loads of clients", administration.loads.step, now_ns)
        if self.catalogue.packing.process is not None:
            run("listening to a process", self._watch, self.catalogue.packing.process, None)
        run("telling front ends of seats", self._seats.step)
        if self.phase is Phase.DRAINING:
            fronts = list(house.fleet.of_kind("front_end", ready=False))
            if not fronts or now_ns >= self._deadline_ns:
                if fronts:
                    log.error("%d front ends did not drain in time", len(fronts))
                self.phase = Phase.STOPPED

    # --- events ---------------------------------------------------------------------------------
    def _register(self, source: HasFileno | int, what: str, do: Callable[[], None]) -> None:
        """Do this whenever there is something to read."""
        self._selector.register(source, selectors.EVENT_READ, partial(self._run, what, do))

    def _watch(self, process: Process, child: Child | None) -> None:
        """Listen to a process's socket and death; safe to repeat."""
        known = self._selector.get_map()
        if process.control.fileno() not in known and not process.is_mute:
            what = f"listening to a {process.kind}"
            self._register(process.control, what, partial(self._on_control, process, child))
        if process.pidfd is not None and process.pidfd not in known:
            what = f"the end of a {process.kind}"
            self._register(process.pidfd, what, partial(self._on_death, process, child))
        try:
            process.control.flush()
        except OSError:
            process.is_mute = True

    def _watch_forked(self, process: Process) -> None:
        for child in self.house.fleet.children.values():
            if child.process is process:
                child.seat.on_started(process.pid or 0, time.monotonic_ns())
                self._watch(process, child)
                return
        self._watch(process, None)

    def _unwatch(self, process: Process) -> None:
        known = self._selector.get_map()
        for fileobj in (process.control, process.pidfd):
            if fileobj is not None and fileobj in known:
                self._selector.unregister(fileobj)

    def _on_control(self, process: Process, child: Child | None) -> None:
        """Handle everything that a child has said."""
        while True:
            try:
                received = process.control.try_receive()
            except EOFError:
                # It closed its end, so it is leaving; what counts is the pidfd.
                process.is_mute = True
                if process.control.fileno() in self._selector.get_map():
                    self._selector.unregister(process.control)
                return
            except ProtocolError:
                log.exception("%s broke the control protocol: killed", process.kind)
                process.kill()
                return
            if received is None:
                return
            message, fds = received
            what = f"a {type(message).__name__} from a {process.kind}"
            self._run(what, self._on_message, process, child, message, fds)

    def _on_message(
        self, process: Process, child: Child | None, message: object, fds: dict[str, int]
    ) -> None:
        now_ns = time.monotonic_ns()
        house = self.house
        server = house.fleet.fork_server
        if child is None:
            if server is not None and process is server.process:
                if isinstance(message, Ready):
                    server.is_ready = True
                    log.info("the fork server is ready after %s s", self._age_s())
                server.on_message(message, fds)
            elif process is self.catalogue.packing.process:
                self.catalogue.packing.on_message(message, now_ns)
            return
        if isinstance(message, Ready):
            self._on_ready(child, message, now_ns)
        elif isinstance(message, Activate):
            house.site_of(child).activations.on_activate(child, message, now_ns)
        elif isinstance(message, LoadDone):
            activations = house.site_of(child).activations
            running = activations.load(message.job)
            activations.on_load_done(message, now_ns)
            if running is not None and not message.ok and not running.is_cancelled:
                self.catalogue.mend(running.message.slot, now_ns)
        elif isinstance(message, Admin):
            self.administration.on_admin(child, message, now_ns)
        elif isinstance(message, Counters):
            self.administration.on_counters(child, message)
        elif isinstance(message, Used):
            self.catalogue.departures.on_used(child, message, now_ns)
        elif isinstance(message, Rehearsed):
            self.catalogue.rehearsals.on_rehearsed(child, message, now_ns)
        elif isinstance(message, LinkBroken):
            worker = house.fleet.worker(message.seat)
            if worker is not None and worker.epoch == message.epoch:
                house.fleet.kill(worker, "broke the rules of its ring", now_ns)
        elif isinstance(message, Attaches):
            house.site_of(child).activations.on_attaches(child, message)
        elif isinstance(message, BindFailed):
            self.catalogue.on_bind_failed(message.slot, message.message)
        elif isinstance(message, Chunks):
            house.fleet.on_chunks(child, message, fds)
        elif isinstance(message, ArenaMade):
            house.fleet.on_arena(child, message)
        elif isinstance(message, ChunksTaken):
            house.fleet.on_chunks_taken(child, message.count)
        elif isinstance(message, Populated):
            log.info("the arenas are warm after %.1f s", message.seconds)

    def _on_ready(self, child: Child, message: Ready, now_ns: int) -> None:
        house = self.house
        house.fleet.on_ready(child, message.pid, now_ns)
        if child.seat.kind == "front_end":
            house.greet(child)
        if child.seat.kind == "mover":
            house.site_of(child).activations.on_mover_ready(now_ns)
        if (
            self.phase is Phase.STARTING
            and any(house.fleet.of_kind("front_end"))
            and all(site.is_complete or site.is_lost for site in house.sites)
            and any(site.is_complete for site in house.sites)
        ):
            self.phase = Phase.SERVING
            gc.freeze()  # thousands of models: to look through all of them takes 0.1 s, now and then
            gc.enable()
            self.catalogue.announce(self._age_s())
        if self.phase is Phase.DRAINING and child.seat.kind == "front_end":
            child.post(Drain(timeout_s=house.settings.drain_timeout_s))

    def _on_death(self, process: Process, child: Child | None) -> None:
        self._on_control(process, child)  # what it said before it died still counts
        server = self.house.fleet.fork_server
        if server is not None and process is not server.process and process.popen is None:
            self._on_control(server.process, None)  # how it ended, if it is reaped already
        self._unwatch(process)
        house = self.house
        if child is not None:
            house.fleet.reap(child, time.monotonic_ns())
        elif process is self.catalogue.packing.process:
            self.catalogue.packing.on_dead(process.close())
        elif house.fleet.fork_server is not None and process is house.fleet.fork_server.process:
            log.warning("the fork server ended: %s", process.close())
            server, house.fleet.fork_server = house.fleet.fork_server, None
            server.abandon()

    def _on_unborn(self, process: Process, why: str) -> None:
        """The fork server will not make what it was asked for."""
        log.error("a %s could not be forked: %s", process.kind, why)
        self._unwatch(process)
        for child in list(self.house.fleet.children.values()):
            if child.process is process:
                self.house.fleet.reap(child, time.monotonic_ns())
                return
        if process is self.catalogue.packing.process:
            self.catalogue.packing.on_dead(process.close())

    def _on_child_gone(self, child: Child) -> None:
        now_ns = time.monotonic_ns()
        if child.seat.kind == "worker":
            self.house.on_worker_gone(child, now_ns)
        elif child.seat.kind == "front_end":
            self.administration.on_front_end_gone(child)
            self.catalogue.departures.on_front_end_gone(child, now_ns)

    def _on_bell(self) -> None:
        """A worker dropped a lease while somebody waits for room; else one is about to ask for a version."""
        try:
            os.eventfd_read(self.house.fleet.bell)
        except BlockingIOError:
            return
        was_hungry = self.house.is_hungry
        self.house.on_bell(time.monotonic_ns())
        if not was_hungry:
            self._heralded_ns = time.monotonic_ns() + HERALD_SPIN_NS

    def _on_scanned(self) -> None:
        try:
            now_ns = time.monotonic_ns()
            self.administration.loads.on_looked(self.catalogue.on_scanned(now_ns), now_ns)
        except OvercommitError as error:
            log.error("the repository scan failed: %s", error)

    # --- stopping -------------------------------------------------------------------------------
    def _on_signal(self) -> None:
        numbers = self._signals.recv(4096)
        if not any(number in (signal.SIGTERM, signal.SIGINT) for number in numbers):
            return
        if self.phase in (Phase.DRAINING, Phase.STOPPED):
            log.warning("second signal: stopping at once")
            self.phase = Phase.STOPPED
            return
        self._drain()

    def _drain(self) -> None:
        house = self.house
        timeout_s = house.settings.drain_timeout_s
        log.info("draining: no new connections, at most %.0f s for what is in flight", timeout_s)
        self.phase = Phase.DRAINING
        house.fleet.is_draining = True
        self._deadline_ns = time.monotonic_ns() + int((timeout_s + STOP_TIMEOUT_S) * 1e9)
        for child in house.fleet.of_kind("front_end", ready=False):
            child.post(Drain(timeout_s=timeout_s))
        house.fleet.close_listeners()

    def _age_s(self) -> str:
        return f"{(time.monotonic_ns() - self._started_ns) / 1e9:.2f}"


def run(settings: Settings) -> int:
    """Serve with these settings until SIGTERM or SIGINT.

    Raises ConfigurationError before anything is started when the settings cannot be served.
    """
    gc.disable()  # until it serves: what is made now stays
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s supervisor %(message)s",
    )
    os.environ["OVERCOMMIT_CHILD_LOG_LEVEL"] = settings.log_level.upper()
    # Importing torch's compiler makes a folder, by default one that stays in /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(settings.cache_dir, "inductor"))
    return Supervisor(settings).run()
