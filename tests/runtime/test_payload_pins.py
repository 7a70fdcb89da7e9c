"""Payload memory that is registered with CUDA, on the fake driver."""

from __future__ import annotations

import mmap

import pytest
from cuda_rig import started
from fake_driver import FakeDriver, FakeGpu

from overcommit.runtime import payload_pins
from overcommit.runtime.config import MIB
from overcommit.runtime.driver import Attribute, Result
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.payload_pins import LinkPin, PayloadPins

NBYTES = 5 * MIB // 2


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_pins, "PAYLOAD_PIN_BYTES", MIB)


def link_memory(protection: int) -> tuple[memoryview, memoryview]:
    """A worker's mappings of one front end's ingress and egress memory."""
    ingress, egress = create_memfd("in", NBYTES), create_memfd("out", NBYTES)
    return (
        memoryview(mmap.mmap(ingress, NBYTES, prot=protection)),
        memoryview(mmap.mmap(egress, NBYTES)),
    )


def pinned(driver: FakeDriver) -> LinkPin:
    pins = PayloadPins(driver, 0)
    pin = pins.pin(*link_memory(pins.protection))
    assert pin is not None
    pin.wait()
    return pin


def test_all_of_a_link_is_registered_in_pieces_and_let_go_of() -> None:
    driver = started(FakeGpu())
    pin = pinned(driver)
    assert pin.is_pinned
    assert sorted(driver.mapped_host.values()) == [MIB // 2, MIB // 2, MIB, MIB, MIB, MIB]
    assert driver.reaches(pin.ingress_at, NBYTES)
    assert driver.reaches(pin.egress_at, NBYTES)
    pin.close()
    assert not pin.is_pinned
    assert driver.registered == {}


@pytest.mark.parametrize("can", [0, 1])
def test_ingress_memory_is_writable_only_where_the_device_needs_it_so(can: int) -> None:
    gpu = FakeGpu()
    gpu.attributes[Attribute.READ_ONLY_HOST_REGISTER_SUPPORTED] = can
    driver = started(gpu)
    assert bool(PayloadPins(driver, 0).protection & mmap.PROT_WRITE) != bool(can)
    assert pinned(driver).is_pinned


def test_a_device_that_cannot_use_our_addresses_registers_nothing() -> None:
    gpu = FakeGpu()
    gpu.attributes[Attribute.CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM] = 0
    driver = started(gpu)
    pins = PayloadPins(driver, 0)
    assert pins.protection == mmap.PROT_READ
    assert pins.pin(*link_memory(pins.protection)) is None
    assert driver.registered == {}


def test_what_is_refused_leaves_the_link_plain_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = started(FakeGpu())
    pins = PayloadPins(driver, 0)
    memory = link_memory(pins.protection)
    driver.fail_at(5, Result.OUT_OF_MEMORY)  # two for the context, then the third piece
    pin = pins.pin(*memory)
    assert pin is not None
    pin.wait()
    assert not pin.is_pinned
    assert len(driver.registered) == 2
    assert "ulimit -l" in caplog.text
    pin.close()
    assert driver.registered == {}


def test_a_link_that_goes_while_it_is_registered_leaves_nothing() -> None:
    driver = started(FakeGpu())
    pin = LinkPin(driver, 0, *link_memory(mmap.PROT_READ))
    pin.close()
    pin.begin()
    pin.wait()
    assert (driver.registered, pin.is_pinned) == ({}, False)
