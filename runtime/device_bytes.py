"""A version's weights where the CPU cannot touch them: an address, a length, and what keeps it.

Invariants
 1. Whatever is made over it holds it, and it holds the address range: the range is given back after
    the last tensor.
 2. It is read-only by how it is mapped, not by what is said here: torch takes no array interface that
    says so.

Made by `CudaMapping.view`; engines make tensors over it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True, eq=False)
class DeviceBytes:
    """`nbytes` at `address` of the device that torch calls `place`."""

    address: int
    nbytes: int
    place: str
    keeper: object

    def __len__(self) -> int:
        return self.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Version 3 of the interface, as bytes: it knows no bfloat16."""
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


Memory = memoryview | DeviceBytes  # what a program is bound to
