"""The children of a supervisor in their seats, the memory that each one owns, and their links.

Owns per incarnation: a doorbell (eventfd) and, for a worker, its page (status and leases), for a
front end, its ingress and egress arenas.  Has a fresh link made for every pair of a live front end and
a live worker (`equipment`).

Invariants
 1. A seat is occupied by at most one process; its epoch grows with every incarnation.
 2. A link belongs to two incarnations.  It is announced when both are ready, and `LinkDown` is sent
    only when one of them is dead and reaped; it is never repaired or used again.
 3. Every descriptor that is made for an incarnation is closed when the incarnation is reaped, or when
    its start fails.
 4. A start that fails is a death of its seat, and of nobody else.  Who is started and cannot be given all
    that it needs, its links included, is killed.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import logging
import os
import selectors
import time
from collections.abc import Callable, Iterator, Sequence

from overcommit.runtime import _shm
from overcommit.runtime.bells import MoverBells, lend_doorbells, make_bell
from overcommit.runtime.boundary import Boundary
from overcommit.runtime.children import Child, close_all
from overcommit.runtime.chunk_feed import ChunkFeed
from overcommit.runtime.config import FORK_SERVER_PAUSE_S, STOP_TIMEOUT_S, Settings
from overcommit.runtime.equipment import link, make_fds, map_page
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.memory import SharedMemory
from overcommit.runtime.messages import ArenaMade, Chunks, Kind, LinkDown, Start, Stop
from overcommit.runtime.process import ForkServer, Process, spawn
from overcommit.runtime.seats import Seat, SeatState
from overcommit.runtime.vigil import Finding, Vigil
from overcommit.runtime.vigil_limits import BATCH_TIMEOUT_S

log = logging.getLogger("overcommit.fleet")


class Fleet:
    """All seats of a server: front ends, and for each site a mover and workers.

    `on_unborn(process, why)` is called when the fork server will not make what it was asked for,
    `on_gone(child)` after a child was reaped and its links were taken down,
    `on_shrunk(site, count)` when a GPU turned out to have memory for so many chunks only,
    `on_arena_gone(site)` when DEVICE died with its mover, and nobody is left who used it;
    `title_of(slot)` says for the log which version that is.
    """

    def __init__(
        self,
        settings: Settings,
        memories: Sequence[SharedMemory],
        on_forked: Callable[[Process], None],
        on_gone: Callable[[Child], None],
        on_shrunk: Callable[[int, int], None] = lambda site, count: None,
        on_arena_gone: Callable[[int], None] = lambda site: None,
        on_unborn: Callable[[Process, str], None] = lambda process, why: None,
        boundary: Boundary | None = None,
        title_of: Callable[[int], str] = str,
    ) -> None:
        self.boundary = boundary or Boundary()
        self.settings = settings
        self.memories = memories  # by site
        self.seats: list[Seat] = [
            *(Seat("front_end", index) for index in range(settings.front_ends)),
            *(Seat("mover", site, site) for site in range(len(memories))),
            *(
                Seat("worker", index, index // settings.workers)
                for index in range(settings.workers * len(memories))
            ),
        ]
        self.children: dict[int, Child] = {}  # by id(seat)
        # By what is spoken there; one for each front end.
        self.listen_fds: dict[str, list[int]] = {}
        self.port = settings.port
        self.grpc_port: int | None = None
        self.feeds = [None if m.vault is None else ChunkFeed(m.vault) for m in memories]
        self.bell = make_bell()
        self.mover_bells = MoverBells(len(memories))
        self.is_closing = False
        self.is_draining = False
        self.fork_server: ForkServer | None = None
        self._on_forked = on_forked
        self._on_gone = on_gone
        self._on_shrunk = on_shrunk
        self._on_arena_gone = on_arena_gone
        self._on_unborn = on_unborn
        self._title_of = title_of
        self._fork_server_at_ns = 0

    # --- looking --------------------------------------------------------------------------------
    def of_kind(
        self, kind: Kind, *, ready: bool = True, site: int | None = None
    ) -> Iterator[Child]:
        """Iterate over the children of a kind, by default only those that are ready."""
        for seat in self.seats:
            child = self.children.get(id(seat))
            if child is None or seat.kind != kind or site not in (None, seat.site):
                continue
            if child.is_ready or not ready:
                yield child

    def worker(self, index: int) -> Child | None:
        """Return the ready worker in this seat."""
        return next((c for c in self.of_kind("worker") if c.seat.index == index), None)

    def lease_pages(self, site: int) -> tuple[_shm.LeasePage, ...]:
        """Return the lease pages of every worker of a site that is not reaped."""
        workers = self.of_kind("worker", ready=False, site=site)
        return tuple(child.leases for child in workers if child.leases is not None)

    # --- starting -------------------------------------------------------------------------------
    def start_due(self, now_ns: int) -> None:
        """Start every seat whose time has come, and the fork server before them."""
        self.boundary.run("the start of the fork server", self._start_fork_server, now_ns)
        for site, memory in enumerate(self.memories):
            if memory.is_gone and not any(self.of_kind("worker", ready=False, site=site)):
                memory.is_gone = False
                self._on_arena_gone(site)
        for seat in self.seats:
            if self.is_draining and seat.kind == "front_end":
                continue
            if seat.kind != "front_end" and self.memories[seat.site].is_gone:
                continue
            if id(seat) not in self.children and seat.can_start(now_ns):
                what = f"the start of a {seat.kind}"
                if not self.boundary.run(what, self._start, seat, now_ns):
                    seat.on_start_failed(now_ns)

    def _start_fork_server(self, now_ns: int) -> None:
        """Where there is to be one and is none, start it: at first, and after its death."""
        is_due = self.fork_server is None and now_ns >= self._fork_server_at_ns
        if is_due and self.settings.start_method == "forkserver":
            self._fork_server_at_ns = now_ns + int(FORK_SERVER_PAUSE_S * 1e9)
            self.fork_server = ForkServer(self._on_forked, self._on_unborn)

    def start_torch(self, kind: Kind) -> Process | None:
        """Start a child that needs torch; None: the fork server is not ready yet.  Raises OSError."""
        server = self.fork_server
        if server is None and self.settings.start_method == "forkserver":
            return None
        if server is None or server.unfit is not None:
            return spawn(kind)
        # While torch is being imported there, a spawned child would not be sooner.
        return server.fork(kind) if server.is_ready else None

    def _start(self, seat: Seat, now_ns: int) -> bool:
        """Start a process in a seat, if the fork server is ready for it.

        Raises OSError where there is no descriptor or process left; then nothing was started.
        """
        fds = make_fds(seat.kind, self.settings)
        try:
            process = self.start_torch(seat.kind) if seat.kind == "worker" else spawn(seat.kind)
        except BaseException:
            close_all(fds)
            raise
        if process is None:
            close_all(fds)
            return True
        seat.on_started(process.pid or 0, now_ns)
        child = self.children[id(seat)] = Child(seat, process, seat.epoch, fds)
        self._must("the equipment of a", self._equip, child, now_ns)
        return True

    def _must(self, what: str, do: Callable[[Child], bool], child: Child, now_ns: int) -> None:
        """Do what a child cannot serve without."""
        if not self.boundary.run(f"{what} {child.seat.kind}", do, child):
            self.kill(child, "has not got all that it needs", now_ns)

    def _equip(self, child: Child) -> bool:
        """Map what this incarnation owns and send Start."""
        seat, memory = child.seat, self.memories[child.seat.site]
        send: dict[str, int] = dict(child.fds)
        if seat.kind == "worker":
            map_page(child)
            send |= {"supervisor_bell": self.bell, "residency": memory.residency_fd}
        elif seat.kind == "front_end":
            send |= {name: fds[seat.index] for name, fds in self.listen_fds.items()}
        elif seat.kind == "mover":
            send["bell"] = self.mover_bells.fd(seat.site)
            if memory.host_fd is not None:
                send["host"] = memory.host_fd
        if seat.kind in ("worker", "mover") and memory.device_fd is not None:
            send["device"] = memory.device_fd
            send["residency"] = memory.residency_fd
        held = 0 if memory.vault is None else len(memory.vault)
        start = Start(
            kind=seat.kind,
            seat=seat.index,
            epoch=child.epoch,
            settings=self.settings,
            site=seat.site,
            sites=len(self.memories),
            device_bytes=memory.device_bytes,
            host_bytes=memory.host_bytes,
            cuda_device=memory.cuda_device,
            shares=memory.shares,
            chunks_held=held,
            chunks_count=0 if memory.vault is None else memory.vault.count,
            port=self.port,
            fds=tuple(send),
        )
        child.post(start, tuple(send.values()))
        if seat.kind == "worker" and memory.handle is not None:
            child.post(ArenaMade(handle=memory.handle))
        feed = self.feeds[seat.site]
        if feed is not None and seat.kind in ("worker", "mover"):
            limit = held if seat.kind == "mover" else feed.vault.count
            feed.add(id(child), child.post, limit, is_mover=seat.kind == "mover")
        return True

    # --- chunks of a GPU ------------------------------------------------------------------------
    def on_chunks(self, child: Child, message: Chunks, fds: dict[str, int]) -> None:
        """The mover made chunks.  Raises ProtocolError for what nobody asked for."""
        made = list(fds.values())
        feed = self.feeds[site := child.seat.site]
        if feed is None or child.seat.kind != "mover":
            for fd in made:
                os.close(fd)
            raise ProtocolError(f"{child.seat!r} sent chunks")
        feed.on_made(message.first, made)
        if 0 < message.count < feed.vault.count:
            self.shrink(site, message.count)
        feed.say_made()

    def shrink(self, site: int, count: int) -> None:
        """DEVICE has only so many chunks from now on; nobody may use the others any more."""
        if (feed := self.feeds[site]) is not None:
            feed.shrink(count)
        self._on_shrunk(site, count)

    def on_chunks_taken(self, child: Child, count: int) -> None:
        """A child has so many."""
        feed = self.feeds[child.seat.site]
        if feed is not None:
            feed.on_taken(id(child), count)

    def on_arena(self, mover: Child, message: ArenaMade) -> None:
        """The mover has made DEVICE, in one piece; workers that wait for it open it."""
        memory = self.memories[mover.seat.site]
        memory.handle = message.handle
        log.info("DEVICE is made: one allocation of GPU memory")
        for worker in self.of_kind("worker", ready=False, site=mover.seat.site):
            worker.post(message)

    def _lose_arena(self, mover: Child, now_ns: int) -> None:
        """What the mover had allocated went with it; whoever has it open must not touch it any more."""
        memory = self.memories[mover.seat.site]
        if memory.shares != "ipc" or self.is_closing:
            return
        memory.handle, memory.is_gone = None, True
        for worker in self.of_kind("worker", ready=False, site=mover.seat.site):
            self.kill(worker, "has memory open that is gone", now_ns)

    # --- links ----------------------------------------------------------------------------------
    def on_ready(self, child: Child, pid: int, now_ns: int) -> None:
        """Note that a child serves, and link it with every peer that does."""
        child.seat.on_ready(now_ns)
        child.is_ready = True
        child.vigil = Vigil(now_ns) if child.seat.kind == "worker" else None
        log.info("%s %d is ready (pid %d)", child.seat.kind, child.seat.index, pid)
        self._must("the links of a", self._link_all, child, now_ns)

    def _link_all(self, child: Child) -> bool:
        if child.seat.kind == "worker":
            for front in self.of_kind("front_end"):
                link(front, child, self.settings)
            lend_doorbells(self.of_kind("mover", site=child.seat.site), (child,))
        elif child.seat.kind == "mover":
            lend_doorbells((child,), self.of_kind("worker", site=child.seat.site))
        elif child.seat.kind == "front_end":
            for worker in self.of_kind("worker"):
                link(child, worker, self.settings)
        return True

    # --- ending ---------------------------------------------------------------------------------
    def kill(self, child: Child, reason: str, now_ns: int) -> None:
        """SIGKILL a child that cannot go on."""
        log.error("%r %s: killed", child.seat, reason)
        child.seat.on_kill_sent(now_ns)
        child.process.kill()

    def reap(self, child: Child, now_ns: int) -> None:
        """Handle a death: release, tell the peers, let the seat decide when to start again."""
        was_born = child.process.pid is not None
        ending = child.process.close()
        if was_born:
            child.seat.on_dead(now_ns)
        else:
            child.seat.on_start_failed(now_ns)
        del self.children[id(child.seat)]
        try:
            self._take_leave(child, ending, now_ns)
        finally:
            # The page is read in on_gone, for what the worker was doing; only then it goes.
            child.status = child.leases = None
            child.page = None
            close_all(child.fds)

    def _take_leave(self, child: Child, ending: str, now_ns: int) -> None:
        # At the end all are killed, also who has left already; of who had not it is said (`kill`).
        expected = self.is_closing or (self.is_draining and not child.process.kill_asked)
        log.log(
            logging.INFO if expected else logging.WARNING,
            *("%s %d ended: %s", child.seat.kind, child.seat.index, ending),
        )
        peers: Kind | None = {"worker": "front_end", "front_end": "worker"}.get(child.seat.kind)  # type: ignore[assignment]
        if peers is not None and child.is_ready:
            for peer in self.of_kind(peers):
                peer.post(LinkDown(seat=child.seat.index, epoch=child.epoch))
        feed = self.feeds[child.seat.site]
        if feed is not None:
            feed.forget(id(child))
        if child.seat.kind == "mover":
            self._lose_arena(child, now_ns)
        self._on_gone(child)

    def kill_overdue(self, now_ns: int) -> None:
        """Kill what does not get ready, and workers that are stuck; warn of long batches."""
        for child in list(self.children.values()):
            if child.seat.start_overdue(now_ns):
                self.kill(child, "did not get ready in time", now_ns)
            elif child.seat.state is SeatState.LIVE:
                self._look_after(child, now_ns)

    def _look_after(self, child: Child, now_ns: int) -> None:
        if (vigil := child.vigil) is None or child.status is None:
            return
        heartbeat_ns, started_ns, _, slot, _ = child.status.read()
        finding = vigil.look(heartbeat_ns, started_ns, now_ns, slot)
        if finding is Finding.MOVES:
            return
        if finding is Finding.GOES_ON:
            log.warning("%r moves again", child.seat)
            return
        text = f"has not moved for {vigil.still_ns // 1_000_000_000} s"
        if started_ns:
            text = f"{text}: it is at work for {self._title_of(slot)}"
        if finding is Finding.STUCK:
            self.kill(child, text, now_ns)
        else:
            log.warning("%r %s; after %g s it is killed", child.seat, text, BATCH_TIMEOUT_S)

    def stop(self) -> None:
        """Ask all but front ends, which drain, to leave; wait a little, and kill who stays."""
        self.is_closing = True
        children = [child for child in self.children.values() if child.seat.kind != "front_end"]
        for child in children:
            child.post(Stop())
        deadline_ns = time.monotonic_ns() + int(STOP_TIMEOUT_S * 1e9)
        with selectors.DefaultSelector() as dying:
            for child in children:
                if child.process.pidfd is not None:
                    dying.register(child.process.pidfd, selectors.EVENT_READ, child)
            while dying.get_map() and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
                for key, _ in dying.select(left_ns / 1e9):
                    dying.unregister(key.fileobj)
            for key in list(dying.get_map().values()):
                self.kill(key.data, f"did not stop in {STOP_TIMEOUT_S:g} s", time.monotonic_ns())

    def close(self) -> None:
        """Kill and reap whatever is left; nothing survives this."""
        self.is_closing = True
        server = self.fork_server
        processes = [child.process for child in self.children.values()]
        for process in processes:
            process.kill()
        if server is not None:
            server.process.kill()
            server.process.close()
            self.fork_server = None
        for child in list(self.children.values()):
            self.reap(child, time.monotonic_ns())
        self.close_listeners()
        os.close(self.bell)
        self.mover_bells.close()

    def close_listeners(self) -> None:
        """Take no new connections."""
        for fds in self.listen_fds.values():
            for fd in fds:
                os.close(fd)
        self.listen_fds.clear()

    def describe(self) -> list[dict[str, object]]:
        """Return one row a seat, for status and tests."""
        pids = {key: child.process.pid for key, child in self.children.items()}
        return [{**seat.describe(), "pid": pids.get(id(seat))} for seat in self.seats]
