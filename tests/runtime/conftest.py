"""A worker's loop in this process, with a fake engine, for the tests of its parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from front_rig import Front
from worker_rig import Programs, Rig


@pytest.fixture
def programs() -> Programs:
    return Programs()


@pytest.fixture
def rig(programs: Programs) -> Iterator[Rig]:
    rig = Rig(programs)
    yield rig
    programs.gate.set()
    rig.close()


@pytest.fixture
def front(rig: Rig) -> Front:
    return rig.link()
