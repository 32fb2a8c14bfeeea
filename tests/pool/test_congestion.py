"""Back-pressure towards a worker that takes nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest

import zoo
from conftest import settle
from modelcache import MemoryStore, OverloadedError, PredictTimeoutError

if TYPE_CHECKING:
    from conftest import MakeRegistry

LARGE = np.zeros((5_000, zoo.N), np.float32)
"""Some of these fill the socket and the buffer before it."""


async def test_a_congested_lane_keeps_to_the_deadline(make_registry: MakeRegistry) -> None:
    """P3: a call that cannot even be sent, since the worker takes nothing, ends at its deadline."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    await registry.predict("m", LARGE)  # from here on it is known that these rows need not travel in slices
    worker = registry._pool.workers[0]
    os.kill(worker.pid, signal.SIGSTOP)
    filling = [asyncio.create_task(registry.predict("m", LARGE, timeout=30)) for _ in range(60)]
    for _ in range(1000):
        await asyncio.sleep(0)
    assert worker.requests.congested
    with pytest.raises(PredictTimeoutError, match="did not answer within the timeout"):
        await registry.predict("m", zoo.rows(1), timeout=0.05)
    os.kill(worker.pid, signal.SIGCONT)
    assert all(len(answer) == len(LARGE) for answer in await asyncio.gather(*filling))


async def test_calls_that_cannot_be_sent_count_towards_the_limit(make_registry: MakeRegistry) -> None:
    """P6: the queue is full when as many calls wait as it takes, whether the worker has taken their rows or not."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}), queue_limit=40)
    await registry.predict("m", LARGE)
    worker = registry._pool.workers[0]
    os.kill(worker.pid, signal.SIGSTOP)
    calls = [asyncio.create_task(registry.predict("m", LARGE)) for _ in range(30)]
    while not worker.requests.congested:
        await asyncio.sleep(0)
    calls += [asyncio.create_task(registry.predict("m", LARGE)) for _ in range(10)]
    await settle()
    assert (len(worker.requests.pending), worker.requests.held_up) == (30, 10)
    assert registry.stats().workers[0].queue_depth == 40
    for rows in (zoo.rows(1), LARGE):
        refused = registry.predict("m", rows)
        with pytest.raises(OverloadedError, match="40 calls wait"), pytest.raises(StopIteration):
            refused.send(None)
    calls.pop().cancel()
    await settle()
    replacement = asyncio.create_task(registry.predict("m", LARGE))
    await settle()
    assert (len(worker.requests.pending), worker.requests.held_up) == (30, 10)
    os.kill(worker.pid, signal.SIGCONT)
    assert all(len(answer) == len(LARGE) for answer in await asyncio.gather(*calls, replacement))
    assert worker.requests.waiting == 0
