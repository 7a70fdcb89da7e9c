"""Front ends that lie, and front ends that leave."""

from __future__ import annotations

import mmap

import pytest
from front_rig import CAPACITY, PAYLOAD_BYTES, Front
from worker_rig import Rig, X, ready

from overcommit.runtime import _shm

# --- peers that lie or leave --------------------------------------------------------------------
LIES = {
    "id": "is not its own",
    "kind": "is of kind 77",
    "ingress": "outside its memory",
    "egress": "outside its memory",
    "twice": "submitted twice",
    "header": "claims -1 tensors",
}


def tell(front: Front, other: Front, lie: str, waiting: int) -> None:
    """Submit a request that is in order but for one thing."""
    length = front.write(0, [X])
    end = PAYLOAD_BYTES - length
    front.write(end, [X])
    own = front.next_id()
    if lie == "id":
        front.push(other.next_id() + 7, 3, 0, length)
    elif lie == "kind":
        front.push(own, 3, 0, length, kind=77)
    elif lie == "ingress":
        front.push(own, 3, end, length + 1, out=0)
    elif lie == "egress":
        front.push(own, 3, 0, length, out=PAYLOAD_BYTES - CAPACITY + 1)
    elif lie == "twice":
        front.push(waiting, 5, 0, length)
    elif lie == "header":
        front.submit(3, b"\xff" * 64)
    else:
        front.push(own, 3, end, length, out=PAYLOAD_BYTES - CAPACITY)


@pytest.mark.parametrize("lie", LIES)
def test_a_front_end_that_lies_is_dropped_and_others_go_on(
    rig: Rig, front: Front, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = rig.link(seat=1)
    ready(rig, front)
    waits = front.submit(5, [X])
    rig.settle()
    tell(front, other, lie, waits)
    rig.settle()
    assert len(rig.worker.links) == 1
    assert LIES[lie] in caplog.text
    assert rig.leases.read(5)[1] == 0
    request = other.submit(3, [X])
    rig.answered(other, request)
    assert waits not in front.collect()


def test_blocks_may_reach_to_the_very_end_of_their_memory(rig: Rig, front: Front) -> None:
    ready(rig, front)
    tell(front, front, "nothing", 0)
    rig.until(lambda: len(front.collect()) == 2)
    assert [completion[5] for completion in front.answers.values()] == [_shm.OK, _shm.OK]


def test_a_corrupt_ring_is_dropped(rig: Rig, front: Front) -> None:
    rig.settle()
    link = mmap.mmap(front.fds["link"], 2 * front.half)
    link[_shm.LINE : _shm.LINE + 8] = (1 << 40).to_bytes(8, "little")  # the tail
    rig.settle()
    assert len(rig.worker.links) == 0


def test_a_front_end_that_collects_nothing_and_asks_for_more_is_dropped(rig: Rig) -> None:
    front = rig.link(slots=4)
    rig.serve(3)
    for _ in range(2):
        for _ in range(4):
            front.submit(3, [X])
        rig.until(lambda: front.submissions.depth() == 0 and not len(rig.worker.batcher))
        rig.settle()
    assert len(rig.worker.links) == 0


def test_the_jobs_of_a_front_end_that_died_are_dropped(rig: Rig, front: Front) -> None:
    front.submit(5, [X])
    rig.settle()
    assert rig.leases.read(5)[1] == 1
    rig.unlink(front)
    rig.until(lambda: len(rig.worker.links) == 0)
    assert rig.leases.read(5)[1] == 0
    successor = rig.link(epoch=2)
    ready(rig, successor)


def test_a_link_of_another_incarnation_is_not_used(rig: Rig) -> None:
    rig.epoch += 1
    rig.link()
    rig.settle()
    assert len(rig.worker.links) == 0
