"""Blocks of a batch as a device sees them, made of arrays; addresses are those of real memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from kernel_rig import aligned

from overcommit.runtime import payload
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.launch import Blocks
from overcommit.runtime.signature import signature_of

Array = np.ndarray[Any, np.dtype[Any]]
EGRESS_BYTES = 1 << 20


def texts_joined(array: Array) -> bytes:
    return b"".join(len(each).to_bytes(4, "little") + each for each in array.reshape(-1))


def ingress_of(config: ModelConfig, inputs: Mapping[str, Array], shift: int) -> memoryview:
    """A request's block, `shift` bytes from an aligned address."""
    tensors = []
    for index, spec in enumerate(config.inputs):
        if spec.name in inputs:
            array = inputs[spec.name]
            raw = texts_joined(array) if spec.datatype == "BYTES" else array.tobytes()
            tensors.append((index, spec.datatype, raw, array.shape))
    places, total = payload.plan([(i, kind, len(raw), shape) for i, kind, raw, shape in tensors])
    memory = aligned(total + shift)[shift:]
    block = memory.data
    header = bytearray(total)
    payload.encode(memoryview(header), places)
    block[:] = header
    for place, (_, _, raw, _) in zip(places, tensors, strict=True):
        block[place.offset : place.offset + place.nbytes] = raw
    return block


def blocks_of(
    config: ModelConfig,
    requests: Sequence[Mapping[str, Array]],
    *,
    shift: int = 0,
    capacities: Sequence[int] = (),
    is_pinned: bool = True,
) -> Blocks:
    """A batch; egress blocks are filled with 0xAA."""
    signature = signature_of(config)
    ingress = [ingress_of(config, each, shift) for each in requests]
    egress = []
    for number in range(len(requests)):
        nbytes = capacities[number] if capacities else EGRESS_BYTES
        memory = aligned(nbytes + shift)[shift:]
        memory[:] = 0xAA
        egress.append(memory.data)
    forms = [signature.read(block) for block in ingress]
    if not is_pinned:
        return Blocks(signature, forms, ingress, egress)
    return Blocks(signature, forms, ingress, egress, _at(ingress), _at(egress))


def _at(blocks: Sequence[memoryview]) -> list[int]:
    return [np.frombuffer(block, np.uint8).ctypes.data for block in blocks]
