"""Back-pressure towards a worker that takes nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest

import zoo
from modelcache import MemoryStore, PredictTimeoutError

if TYPE_CHECKING:
    from conftest import MakeRegistry


async def test_a_congested_lane_keeps_to_the_deadline(make_registry: MakeRegistry) -> None:
    """P3: a call that cannot even be sent, since the worker takes nothing, ends at its deadline."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    rows = np.zeros((5_000, zoo.N), np.float32)
    await registry.predict("m", rows)  # from here on it is known that these rows need not travel in slices
    worker = registry._pool.workers[0]
    os.kill(worker.pid, signal.SIGSTOP)
    filling = [asyncio.create_task(registry.predict("m", rows, timeout=30)) for _ in range(60)]
    for _ in range(1000):
        await asyncio.sleep(0)
    assert worker.requests.congested
    with pytest.raises(PredictTimeoutError, match="did not answer within the timeout"):
        await registry.predict("m", zoo.rows(1), timeout=0.05)
    os.kill(worker.pid, signal.SIGCONT)
    assert all(len(answer) == len(rows) for answer in await asyncio.gather(*filling))
