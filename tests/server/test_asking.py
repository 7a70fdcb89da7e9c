"""Asking a model from inside a front end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from front_end_rig import ROUTE, Peer, Rig

from overcommit.runtime import _shm
from overcommit.runtime.errors import BadRequest, Overloaded
from overcommit.server.asking import Tensor, ask


def run(test: Callable[[Rig, Peer], Awaitable[None]]) -> None:
    async def main() -> None:
        rig = Rig()
        await test(rig, Peer(rig, 0, 1))
        assert rig.is_empty()

    asyncio.run(main())


def start(rig: Any, *values: float, **more: Any) -> asyncio.Task[list[Tensor]]:
    data = np.array([values], np.float32)
    tensors = [Tensor("x", "FP32", data.shape, data.tobytes())]
    return asyncio.ensure_future(ask(rig, rig.plans.of(ROUTE), tensors, **more))


def test_answers_go_to_who_asked_and_outlive_their_blocks() -> None:
    async def test(rig: Rig, peer: Peer) -> None:
        tasks = [start(rig, float(number), 1.0) for number in range(5)]
        await asyncio.sleep(0)
        assert peer.answer_all() == 5
        later = start(rig, 9.0)
        await asyncio.sleep(0)
        peer.answer_all()
        await later
        for number, task in enumerate(tasks):
            (tensor,) = await task
            assert (tensor.name, tensor.datatype, tensor.shape) == ("y", "FP32", (1, 2))
            assert np.frombuffer(tensor.data, np.float32).tolist() == [2.0 * number, 2.0]

    run(test)


def test_what_does_not_fit_is_said_at_once_and_what_fails_later() -> None:
    async def test(rig: Rig, peer: Peer) -> None:
        with pytest.raises(BadRequest, match=r"model .m.: .*unknown output"):
            await start(rig, 1.0, outputs=["nope"])
        task = start(rig, 1.0)
        await asyncio.sleep(0)
        (submission,) = peer.take()
        peer.answer(submission, _shm.OVERLOADED, length=0)
        rig.dispatch.drain()
        with pytest.raises(Overloaded):
            await task

    run(test)


def test_who_is_cancelled_gives_the_request_up() -> None:
    async def test(rig: Rig, peer: Peer) -> None:
        task = start(rig, 1.0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert rig.dispatch.pending  # until the worker is done with its blocks
        kinds = [submission[7] for submission in peer.submissions.pop(8)]
        assert kinds == [_shm.SUBMIT, _shm.CANCEL]
        (pending,) = rig.dispatch.pending.values()
        peer.completions.push(pending.request_id, 1, 2, 3, 0, _shm.CANCELLED, 1, 0)
        rig.dispatch.drain()

    run(test)


def test_an_answer_that_crosses_a_cancel_harms_nobody() -> None:
    async def test(rig: Rig, peer: Peer) -> None:
        first = start(rig, 1.0)
        await asyncio.sleep(0)
        peer.answer_all()  # the task has not run since
        second = start(rig, 2.0)
        first.cancel()
        await asyncio.sleep(0)
        peer.answer_all()
        (tensor,) = await second
        assert np.frombuffer(tensor.data, np.float32).tolist() == [4.0]

    run(test)
