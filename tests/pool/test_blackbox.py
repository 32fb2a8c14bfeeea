"""The black box: what the worker stores is seen by the parent, and is still there when the worker is not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

import zoo
from modelcache import MemoryStore
from modelcache.pool.blackbox import BlackBox
from modelcache.pool.shared import map_memory, shared_memory
from modelcache.testing import FakeClock

if TYPE_CHECKING:
    from conftest import MakeRegistry


@pytest.fixture(params=["memfd", "temporary file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the memory is: some builds of Python have no memfd_create, and macOS has none."""
    if request.param == "temporary file":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this Python has no os.memfd_create")
    return str(request.param)


@pytest.mark.usefixtures("kind")
def test_both_ends_have_the_same_number() -> None:
    """The parent's end tells it also when both are closed."""
    memory = shared_memory()
    parent, worker = BlackBox(map_memory(memory)), BlackBox(map_memory(memory))
    os.close(memory)
    assert parent.parsing == 0
    worker.parsing = 7
    worker.close()
    assert parent.parsing == 7
    parent.close()
    parent.close()
    assert parent.parsing == 7


def test_the_parent_sees_how_long_its_worker_had_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it has nothing to do, and has not had for as long as it is there."""
    clock = FakeClock(100.0)
    monkeypatch.setattr("modelcache.pool.blackbox.monotonic", clock)
    memory = shared_memory()
    parent, worker = BlackBox(map_memory(memory)), BlackBox(map_memory(memory))
    os.close(memory)
    assert parent.rested(100.0) == 0
    worker.rest()
    assert parent.rested(103.0) == 3
    clock.advance(5)
    worker.wake()
    assert parent.rested(200.0) == 5
    clock.advance(1)
    worker.rest()
    clock.advance(2)
    worker.wake()
    assert parent.rested(200.0) == 7


@pytest.mark.usefixtures("kind")
async def test_workers_start_wherever_the_memory_is(make_registry: MakeRegistry) -> None:
    """A registry serves with either."""
    model, rows = zoo.model(), zoo.rows(2)
    registry = await make_registry(MemoryStore({"m.ubj": model.ubj}), workers=1)
    assert np.array_equal(await registry.predict("m", rows), model.expected(rows))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only memory of this kind can be sealed")
def test_a_worker_cannot_make_it_smaller() -> None:
    """Its parent would be ended by SIGBUS."""
    memory = shared_memory()
    with pytest.raises(PermissionError):
        os.ftruncate(memory, 0)
    os.close(memory)
