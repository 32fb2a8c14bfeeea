"""``timeout`` runs through every stage of a call (P3): what ends it where, and that what comes after is served.

The other stages: a download (test_flights.py), bytes that are held (test_budget.py), a lane that takes nothing
(pool/test_congestion.py), a worker that is busy with others or stopped (pool/test_faults.py).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import odd
import zoo
from conftest import settle
from modelcache import LoadTimeoutError, MemoryStore, ModelRegistry, PredictTimeoutError
from modelcache.testing import GatedStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakeRegistry

MODEL = zoo.model()
ROWS = zoo.rows(2)
SHORT, SOON = 0.001, 0.2


@pytest.fixture
def gate(tmp_path: Path) -> odd.Gate:
    return odd.Gate(tmp_path / "gate")


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def test_the_time_may_be_over_before_the_workers_are_up(no_processes_left: None) -> None:
    """P3: the first call starts them, and a later one finds them started or starts them again."""
    registry = ModelRegistry(MemoryStore({"m.ubj": MODEL.ubj}), workers=1, memory_budget="64 MiB")
    try:
        with pytest.raises(LoadTimeoutError, match="while the workers were starting"):
            await registry.predict("m", ROWS, timeout=SHORT)
        assert np.array_equal(await registry.predict("m", ROWS), MODEL.expected(ROWS))
    finally:
        await registry.close()


async def test_the_time_may_be_over_while_other_loads_have_the_slots(make_registry: MakeRegistry) -> None:
    """P3, F9: the load has not begun, and never does."""
    store = GatedStore({"m.ubj": MODEL.ubj, "n.ubj": MODEL.ubj})
    registry = await make_registry(store, load_concurrency=1)
    first = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(1)
    with pytest.raises(LoadTimeoutError, match=r"n is still .*; the load is given up"):
        await registry.predict("n", ROWS, timeout=SHORT)
    store.open("m")
    await first
    await settle()
    assert store.fetches == ["m"]


async def test_the_time_may_be_over_while_the_worker_parses(make_registry: MakeRegistry, gate: odd.Gate) -> None:
    """P3, F9: the load goes on, and the next caller profits."""
    store = MemoryStore({"slow.json": odd.artifact(on_load="wait", gate=gate.path)})
    registry = await make_registry(store, predictor=odd.ODD)
    call = asyncio.create_task(registry.predict("slow", [0, 21], timeout=SOON))
    await until(gate.reached)
    with pytest.raises(LoadTimeoutError, match="slow is still loading; the load goes on"):
        await call
    gate.open()
    assert (await registry.predict("slow", [0, 21])).tolist() == [42]
    assert registry.stats().loads == 1


async def test_the_time_may_be_over_while_the_rows_are_predicted(make_registry: MakeRegistry, gate: odd.Gate) -> None:
    """P3: the caller hears when to try again, no sooner than he has waited; the late answer is nobody's."""
    registry = await make_registry(MemoryStore({"odd.json": odd.artifact(gate=gate.path)}), predictor=odd.ODD)
    await registry.load("odd")
    call = asyncio.create_task(registry.predict("odd", [odd.WAIT, 1], timeout=SOON))
    await until(gate.reached)
    with pytest.raises(PredictTimeoutError, match="0 more calls wait") as late:
        await call
    assert late.value.retry_after is not None
    assert late.value.retry_after >= 0.9 * SOON
    gate.open()
    assert (await registry.predict("odd", [0, 21])).tolist() == [42]
    assert registry.stats().worker_restarts == 0
