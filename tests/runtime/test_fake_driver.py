"""The fake driver keeps the driver's rules; without that its tests would prove nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from cuda_rig import started
from fake_driver import GRANULARITY, Died, FakeDriver, FakeGpu

from overcommit.runtime import _shm
from overcommit.runtime.driver import Context, DriverError, MemoryHandle, Result

Break = Callable[[FakeDriver], object]


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    made = started(FakeGpu())
    yield made
    if not made.is_dead:
        made.die()


def mapped(driver: FakeDriver, count: int = 1, *, writable: bool = True) -> int:
    """So many objects of one granule, mapped side by side with access."""
    address = driver.address_reserve(count * GRANULARITY, GRANULARITY)
    for number in range(count):
        handle = driver.mem_create(GRANULARITY, 0)
        driver.mem_map(address + number * GRANULARITY, GRANULARITY, handle)
        driver.mem_release(handle)
    driver.mem_set_access(address, count * GRANULARITY, 0, writable)
    return address


def _map_twice(driver: FakeDriver) -> None:
    driver.mem_map(mapped(driver), GRANULARITY, driver.mem_create(GRANULARITY, 0))


def _map_a_part(driver: FakeDriver) -> None:
    address = driver.address_reserve(2 * GRANULARITY, GRANULARITY)
    driver.mem_map(address, GRANULARITY, driver.mem_create(2 * GRANULARITY, 0))


def _map_nowhere(driver: FakeDriver) -> None:
    address = driver.address_reserve(GRANULARITY, GRANULARITY)
    driver.mem_map(address + GRANULARITY, GRANULARITY, driver.mem_create(GRANULARITY, 0))


def _unmap_a_part(driver: FakeDriver) -> None:
    address = driver.address_reserve(2 * GRANULARITY, GRANULARITY)
    driver.mem_map(address, 2 * GRANULARITY, driver.mem_create(2 * GRANULARITY, 0))
    driver.mem_unmap(address, GRANULARITY)


def _use_released(driver: FakeDriver) -> None:
    handle = driver.mem_create(GRANULARITY, 0)
    driver.mem_release(handle)
    driver.mem_export(handle)


@pytest.mark.parametrize(
    "do",
    [
        lambda driver: driver.mem_create(GRANULARITY + 4096, 0),
        lambda driver: driver.mem_create(0, 0),
        lambda driver: driver.address_reserve(4096, GRANULARITY),
        lambda driver: driver.address_free(mapped(driver), GRANULARITY),
        lambda driver: driver.address_free(0x1000, GRANULARITY),
        lambda driver: driver.mem_unmap(driver.address_reserve(GRANULARITY, 0), GRANULARITY),
        lambda driver: driver.mem_set_access(mapped(driver), 2 * GRANULARITY, 0, True),
        lambda driver: driver.mem_release(MemoryHandle(5)),
        _map_twice,
        _map_a_part,
        _map_nowhere,
        _unmap_a_part,
        _use_released,
    ],
)
def test_a_broken_rule_is_an_invalid_value(driver: FakeDriver, do: Break) -> None:
    with pytest.raises(DriverError) as raised:
        do(driver)
    assert raised.value.result is Result.INVALID_VALUE


def test_nothing_works_before_init_and_copies_need_a_context() -> None:
    driver = FakeDriver(FakeGpu())
    with pytest.raises(DriverError) as raised:
        driver.mem_create(GRANULARITY, 0)
    assert raised.value.result is Result.NOT_INITIALIZED
    driver.init()
    driver.mem_release(driver.mem_create(GRANULARITY, 0))
    for do in (driver.event_create, driver.mem_get_info, lambda: driver.host_register(0, 4096)):
        with pytest.raises(DriverError) as raised:
            do()
        assert raised.value.result is Result.INVALID_CONTEXT
    with pytest.raises(DriverError, match="INVALID_CONTEXT"):
        driver.context_set_current(Context(1))
    driver.die()


def test_memory_lives_as_long_as_a_handle_a_mapping_or_a_descriptor(driver: FakeDriver) -> None:
    gpu = driver.gpu
    handle = driver.mem_create(GRANULARITY, 0)
    address = driver.address_reserve(GRANULARITY, GRANULARITY)
    driver.mem_map(address, GRANULARITY, handle)
    fd = driver.mem_export(handle)
    driver.mem_release(handle)
    assert gpu.used_bytes() == GRANULARITY
    driver.mem_unmap(address, GRANULARITY)
    assert gpu.used_bytes() == GRANULARITY
    again = driver.mem_import(fd)
    os.close(fd)
    assert gpu.used_bytes() == GRANULARITY
    driver.mem_release(again)
    assert gpu.used_bytes() == 0


def test_a_dead_process_takes_its_own_along_and_nothing_else(driver: FakeDriver) -> None:
    gpu = driver.gpu
    kept, lost = driver.mem_create(GRANULARITY, 0), driver.mem_create(GRANULARITY, 0)
    ours = os.dup(driver.mem_export(kept))  # passed on
    driver.mem_export(lost)  # never
    driver.die()
    assert gpu.used_bytes() == GRANULARITY
    with pytest.raises(Died):
        driver.mem_release(lost)
    os.close(ours)
    assert gpu.used_bytes() == 0


def test_a_copy_is_done_when_somebody_waits_for_it(driver: FakeDriver) -> None:
    target = mapped(driver)
    host = _shm.reserve(GRANULARITY)
    fd = os.memfd_create("host")
    os.ftruncate(fd, GRANULARITY)
    _shm.map_fixed(host, fd, 0, GRANULARITY, True, False)
    os.close(fd)
    _shm.view(host, 1, True)[0] = 7
    driver.host_register(host, GRANULARITY)
    stream, event = driver.stream_create(is_urgent=True), driver.event_create()
    driver.memcpy_htod_async(target, host, GRANULARITY, stream)
    driver.memcpy_htod_async(target, host, 1, stream)
    driver.event_record(event, stream)
    assert _shm.view(target, 1, False)[0] == 0
    assert not driver.event_query(event)
    assert _shm.view(target, 1, False)[0] == 7
    assert driver.event_query(event)
    with pytest.raises(DriverError) as raised:
        driver.memcpy_htod_async(target, host - 4096, 8192, stream)
    assert raised.value.result is Result.INVALID_VALUE, "half of it is registered"
    driver.memcpy_htod_async(target, host, 1, stream)
    driver.mem_unmap(target, GRANULARITY)
    with pytest.raises(DriverError) as raised:
        driver.stream_synchronize(stream)
    assert raised.value.result is Result.ILLEGAL_ADDRESS
    with pytest.raises(DriverError, match="ILLEGAL_ADDRESS"):
        driver.mem_get_info()  # it sticks
    _shm.release(host, GRANULARITY)


def test_the_device_writes_only_where_it_may(driver: FakeDriver) -> None:
    stream = driver.stream_create(is_urgent=False)
    readable = mapped(driver, writable=False)
    with pytest.raises(DriverError, match="may not touch"):
        driver.memcpy_htod_async(readable, 0, 1, stream)
    unset = driver.address_reserve(GRANULARITY, 0)
    driver.mem_map(unset, GRANULARITY, driver.mem_create(GRANULARITY, 0))
    with pytest.raises(DriverError, match="may not touch"):
        driver.memcpy_dtoh_async(0, unset, 1, stream)


def test_failure_and_death_come_at_the_call_they_are_asked_for(driver: FakeDriver) -> None:
    driver.fail_at(2)
    driver.mem_create(GRANULARITY, 0)
    with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
        driver.mem_create(GRANULARITY, 0)
    driver.die_at(2)
    driver.mem_create(GRANULARITY, 0)
    with pytest.raises(Died):
        driver.mem_create(GRANULARITY, 0)
    assert driver.gpu.used_bytes() == 0
