"""A real worker process with the real engine, from a packed image to an answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front_rig import WATCHDOG_S
from worker_rig import Rig

from overcommit.runtime import _shm
from overcommit.runtime.config import PAGE_BYTES, ModelConfig
from overcommit.runtime.image import read_payload
from overcommit.runtime.messages import Stop
from overcommit.runtime.packer import pack
from overcommit.runtime.packer_messages import Pack
from overcommit.runtime.worker_messages import Activate, Placed, VersionInfo

COMMAND = [sys.executable, "-P", "-m", "overcommit.runtime.child", "worker"]


def put_in_arena(rig: Rig, image_path: str, first_page: int) -> tuple[tuple[int, int], ...]:
    """Copy an image's payload into the arena, in two pieces that are not adjacent nor in order."""
    header, data = read_payload(image_path)
    half = header.nbytes // PAGE_BYTES // 2 * PAGE_BYTES
    high, low = (first_page + 200) * PAGE_BYTES, first_page * PAGE_BYTES
    rig.device[high : high + half] = data[:half]
    rig.device[low : low + len(data) - half] = data[half:]
    return ((high, half), (low, len(data) - half))


@pytest.mark.slow
def test_a_packed_model_answers_as_transformers_does_before_and_after_eviction(
    tmp_path: Path,
    make_bert: Callable[[Path, int], None],
    bert_reference: Callable[[Path, list[list[int]]], Any],
) -> None:
    folder = tmp_path / "bert"
    make_bert(folder, 1)
    done = pack(
        Pack(
            job=1,
            name="bert",
            version="1",
            folder=str(folder),
            config=ModelConfig(),
            cache_dir=str(tmp_path / "cache"),
            allow_code=False,
        ),
        lambda done, total: None,
    )
    assert done.ok, done.message

    rig = Rig(command=COMMAND)
    try:
        front = rig.link()
        names = [spec.name for spec in done.config.inputs]
        ids = [[5, 17, 3, 99], [7, 8, 9, 10]]
        tensors = {"input_ids": np.array(ids), "attention_mask": np.ones((2, 4), np.int64)}
        inputs = [tensors.get(name, np.zeros((2, 4), np.int64)) for name in names]
        request = front.submit(3, inputs, datatype="INT64")
        assert rig.receive() == Activate(slot=3)
        rig.control.send(
            VersionInfo(
                slot=3,
                name="bert",
                version="1",
                image_path=done.image_path,
                nbytes=done.nbytes,
                config=done.config,
            )
        )
        expected = bert_reference(folder, ids)
        for generation, page in ((1, 0), (2, 500)):
            extents = put_in_arena(rig, done.image_path, page)
            rig.table.set(3, _shm.RESIDENT, generation)
            rig.control.send(Placed(slot=3, generation=generation, extents=extents))
            front.wait(request)
            output = dict(
                zip([s.name for s in done.config.outputs], front.outputs(request), strict=True)
            )
            np.testing.assert_allclose(output["last_hidden_state"], expected, atol=1e-5)
            # Evict it, and leave nothing of it where it was.
            assert _shm.try_evict(rig.table, [rig.leases], 3, generation)
            for offset, length in extents:
                rig.device[offset : offset + length] = b"\xff" * length
            request = front.submit(3, inputs, datatype="INT64")
            assert rig.receive() == Activate(slot=3)
        rig.control.send(Stop())
        assert rig.process is not None
        assert rig.process.wait(WATCHDOG_S) == 0
    finally:
        rig.close()
