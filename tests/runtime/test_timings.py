"""Records of activations: what the parts of a load did together, and what is no activation."""

from __future__ import annotations

from msgspec.structs import replace

from overcommit.runtime.config import EXTENTS_SHOWN_MAX, PAGE_BYTES
from overcommit.runtime.messages import Extents
from overcommit.runtime.mover_messages import Load, LoadDone
from overcommit.runtime.timings import Timings

HERE: Extents = ((0, PAGE_BYTES),)


def a_load(job: int, device: Extents | None = HERE, host: Extents | None = HERE) -> Load:
    return Load(
        job=job, slot=1, source="disk", path="/x", nbytes=PAGE_BYTES, host=host, device=device
    )


def done(job: int, began_ns: int, ended_ns: int) -> LoadDone:
    return LoadDone(
        job=job,
        ok=True,
        read_bytes=PAGE_BYTES,
        received_ns=began_ns - 1,
        began_ns=began_ns,
        ended_ns=ended_ns,
    )


def test_the_loads_of_one_activation_make_one_record() -> None:
    timings = Timings()
    for job in (1, 2):
        timings.on_start(a_load(job), 100 + job)
    timings.on_load(a_load(2), done(2, 120, 150))
    timings.on_load(a_load(1), done(1, 110, 140))
    timings.on_publish(1, 7, 160)
    (record,) = timings.activations
    assert (record.generation, record.nbytes, record.total_ns) == (7, 2 * PAGE_BYTES, 59)
    assert (record.decided_ns, record.began_ns, record.ended_ns) == (101, 110, 150)
    assert record.device == HERE + HERE
    assert timings.bytes_read == timings.bytes_copied == 2 * PAGE_BYTES
    timings.on_publish(1, 8, 999)
    assert len(timings.activations) == 1, "another worker's attach is no load"


def test_a_load_that_fills_host_alone_is_counted_but_no_activation() -> None:
    timings = Timings()
    load = a_load(1, device=None)
    timings.on_start(load, 100)
    timings.on_load(load, done(1, 110, 140))
    timings.on_publish(1, 1, 200)
    assert not timings.activations
    assert (timings.bytes_read, timings.bytes_copied) == (PAGE_BYTES, 0)


def test_a_copy_from_device_to_host_is_no_activation_and_spoils_none() -> None:
    timings = Timings()
    back = replace(a_load(1), source="device")
    timings.on_start(back, 100)
    timings.on_load(back, done(1, 110, 120))
    timings.on_start(a_load(2), 500)
    timings.on_load(a_load(2), done(2, 510, 520))
    timings.on_publish(1, 7, 530)
    (record,) = timings.activations
    assert (record.source, record.total_ns, record.nbytes) == ("disk", 30, PAGE_BYTES)


def test_a_refused_activation_leaves_nothing_for_the_next_one() -> None:
    timings = Timings()
    timings.on_start(a_load(1), 100)
    timings.forget(1)
    timings.on_start(a_load(2), 5000)
    timings.on_publish(1, 1, 5100)
    assert timings.activations[0].total_ns == 100


def test_a_record_does_not_grow_with_the_pieces_of_a_model() -> None:
    timings = Timings()
    many = tuple((2 * n * PAGE_BYTES, PAGE_BYTES) for n in range(EXTENTS_SHOWN_MAX + 1))
    load = a_load(1, device=many)
    timings.on_start(load, 100)
    timings.on_load(load, done(1, 110, 140))
    timings.on_publish(1, 1, 200)
    assert timings.activations[0].device == ()
    assert timings.activations[0].host == HERE
