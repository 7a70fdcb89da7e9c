"""A server short of memory in a simulation: who is refused and comes back when told is served in time.

Residency is the real one.  Clients ask for models by Zipf's law, most larger than fits together, with
deadlines; a disk reads for its loads in turn, now slower, now faster; a door refuses as a worker's does.
Everything is drawn from a seed, and time is a number.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
from residency_world import MS, SECOND, FakePort

from overcommit.runtime._shm import RESIDENT
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import MIB
from overcommit.runtime.policy import make_policy
from overcommit.runtime.residency import Residency
from overcommit.runtime.residents import Action, Publish, Refuse, StartLoad, Terms, Withdraw

MODELS = 100
CLIENTS = 24
THINK_NS = 20 * MS
DEADLINES_NS = (10 * MS, 30 * MS, 60 * MS, 300 * MS)
SIZE_MIN, SIZE_MAX = 4096, 24 * MIB
DEVICE_BYTES = 64 * MIB
BYTES_PER_NS = 1.5
LOAD_NS = 600_000  # of any load
SECONDS = 8
SEEDS = (1, 2, 3, 4)


@dataclass(slots=True, eq=False)
class Request:
    slot: int
    limit_ns: int
    sent_ns: int
    is_back: bool = False


class Server:
    """Clients, a door, a disk and the real residency."""

    def __init__(self, seed: int, in_seconds: bool) -> None:
        self.random = random.Random(seed)
        self.in_seconds = in_seconds
        self.port = FakePort()
        device = ChunkAllocator(DEVICE_BYTES)
        self.residency = Residency(device, None, lambda: make_policy("cost_aware"), self.port)
        self.now_ns = SECOND
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.lanes: defaultdict[int, list[Request]] = defaultdict(list)
        self.told: dict[int, int] = {}
        self.expected: dict[int, tuple[int, int]] = {}
        self.left: dict[int, float] = {}  # job -> what it needs of the disk, in ns
        self.epoch = 0
        self.advanced_ns = self.now_ns
        self.speed = 1.0
        self.served_back = self.came_back = self.refused = 0
        spread = math.log(SIZE_MAX / SIZE_MIN)
        sizes = [int(SIZE_MIN * math.exp(spread * self.random.random())) for _ in range(MODELS)]
        for slot, size in enumerate(sizes):
            self.residency.add(slot, f"m{slot}", size, self.now_ns, Terms())
        self.weights = list(itertools.accumulate((rank + 1) ** -0.9 for rank in range(MODELS)))

    def run(self) -> None:
        """Let all of them go on for SECONDS."""
        for _ in range(CLIENTS):
            self.at(self.random.random() * THINK_NS, self.ask)
        self.at(0, self.change_speed)
        self.at(MS, self.tick)
        end_ns = self.now_ns + SECONDS * SECOND
        while self.now_ns < end_ns:
            at_ns, _, event = heapq.heappop(self.events)
            self.now_ns = max(self.now_ns + 1, at_ns)
            event()

    def at(self, in_ns: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now_ns + int(in_ns), next(self.numbers), event))

    # --- clients --------------------------------------------------------------------------------
    def ask(self) -> None:
        (slot,) = self.random.choices(range(MODELS), cum_weights=self.weights)
        self.send(Request(slot, self.random.choice(DEADLINES_NS), self.now_ns))

    def send(self, request: Request) -> None:
        request.sent_ns = self.now_ns
        self.came_back += request.is_back
        slot, deadline_ns = request.slot, self.now_ns + request.limit_ns
        if self.port.words.get(slot, (0, 0))[0] == RESIDENT:
            self.serve(request)
        elif self.expected.get(slot, (0, 0))[0] > max(self.now_ns, deadline_ns):
            self.refuse(request)
        else:
            self.lanes[slot].append(request)
            self.port.waiting[slot] += 1
            self.at(request.limit_ns, lambda: self.expire(request))
            self.want(slot, deadline_ns)

    def think(self) -> None:
        self.at(self.random.expovariate(1 / THINK_NS), self.ask)

    def expire(self, request: Request) -> None:
        if request in self.lanes[request.slot]:
            self.take_out(request)
            self.think()

    def take_out(self, request: Request) -> None:
        self.lanes[request.slot].remove(request)
        self.port.waiting[request.slot] -= 1

    def serve(self, request: Request) -> None:
        self.port.uses[request.slot] += 1
        self.port.last_used_ns[request.slot] = self.now_ns
        self.served_back += request.is_back
        self.at(MS, self.think)

    def refuse(self, request: Request) -> None:
        self.refused += 1
        wait_ms = max(1, math.ceil((self.expected[request.slot][1] - self.now_ns) / MS))
        wait_ns = -(-wait_ms // 1000) * SECOND if self.in_seconds else wait_ms * MS
        request.is_back = True
        self.at(wait_ns + self.random.random() * MS, lambda: self.send(request))

    # --- the door -------------------------------------------------------------------------------
    def want(self, slot: int, deadline_ns: int) -> None:
        told_ns = self.told.get(slot)
        if told_ns is not None and (deadline_ns >= told_ns or slot in self.expected):
            return
        deadlines = [request.sent_ns + request.limit_ns for request in self.lanes[slot]]
        self.told[slot] = min(deadlines)
        self.take(self.residency.want(slot, 0, self.now_ns, max(deadlines)))
        expected = self.residency.expect(slot, min(deadlines), self.now_ns)
        if slot in self.told and expected is not None:
            self.expected[slot] = expected
            for request in list(self.lanes[slot]):
                if request.sent_ns + request.limit_ns < expected[0]:
                    self.take_out(request)
                    self.refuse(request)

    def tick(self) -> None:
        due_ns = self.residency.next_tick_ns()
        if due_ns is not None and due_ns <= self.now_ns:
            self.take(self.residency.tick(self.now_ns))
        self.at(MS, self.tick)

    def take(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, StartLoad):
                self.advance()
                # The same bytes take now longer, now shorter.
                need_ns = LOAD_NS + action.nbytes / BYTES_PER_NS
                self.left[action.job] = need_ns * self.random.lognormvariate(0, 0.25)
                self.schedule()
            elif isinstance(action, Publish | Withdraw | Refuse):
                self.told.pop(action.slot, None)
                self.expected.pop(action.slot, None)
                waiting = list(self.lanes[action.slot])
                if isinstance(action, Withdraw) and waiting:
                    self.want(action.slot, min(r.sent_ns + r.limit_ns for r in waiting))
                    continue
                for request in waiting:
                    self.take_out(request)
                    self.serve(request) if isinstance(action, Publish) else self.think()

    # --- the disk -------------------------------------------------------------------------------
    def change_speed(self) -> None:
        self.advance()
        self.speed = self.random.uniform(0.6, 1.3)
        self.schedule()
        self.at(500 * MS, self.change_speed)

    def advance(self) -> None:
        """What passed went to all loads alike."""
        for job in self.left:
            self.left[job] -= (self.now_ns - self.advanced_ns) * self.speed / len(self.left)
        self.advanced_ns = self.now_ns

    def schedule(self) -> None:
        self.epoch += 1
        if self.left:
            epoch, job = self.epoch, min(self.left, key=self.left.__getitem__)
            self.at(self.left[job] * len(self.left) / self.speed, lambda: self.end(epoch, job))

    def end(self, epoch: int, job: int) -> None:
        if epoch == self.epoch:
            self.advance()
            del self.left[job]
            self.schedule()
            self.take(self.residency.on_load_done(job, True, "", self.now_ns, LOAD_NS))


@pytest.mark.parametrize("in_seconds", [False, True], ids=["milliseconds", "seconds"])
def test_who_comes_back_when_told_is_served_in_time(in_seconds: bool) -> None:
    servers = [Server(seed, in_seconds) for seed in SEEDS]
    for server in servers:
        server.run()
        assert server.refused > 100, "it must be short of memory"
    share = sum(s.served_back for s in servers) / sum(s.came_back for s in servers)
    assert share >= (0.7 if in_seconds else 0.8), f"{share:.1%}"
