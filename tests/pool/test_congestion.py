"""Back-pressure towards a worker that takes nothing."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import odd
import zoo
from conftest import settle
from halting import go_on, halt
from modelcache import Artifact, MemoryStore, NotModified, OverloadedError, PredictTimeoutError
from modelcache.pacing import Pace
from modelcache.resident import Rare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeRegistry
    from modelcache import ModelRegistry

LARGE = np.zeros((5_000, zoo.N), np.float32)
"""Some of these fill the socket and the buffer before it."""


async def send_whole(registry: ModelRegistry, name: str) -> None:
    """Let all rows for ``name`` travel in one piece, however slow this machine was when they were timed."""
    async with registry.acquire(name) as lease:
        pace = Pace()
        pace.note(1_000_000, 1e-3)
        lease.entry.value.rare = Rare(paces={0: pace})


async def test_a_congested_lane_keeps_to_the_deadline(make_registry: MakeRegistry) -> None:
    """P3: a call that cannot even be sent, since the worker takes nothing, ends at its deadline."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    await send_whole(registry, "m")
    worker = registry._pool.workers[0]
    halt(worker.pid)
    filling = [asyncio.create_task(registry.predict("m", LARGE, timeout=30)) for _ in range(60)]
    for _ in range(1000):
        await asyncio.sleep(0)
    assert worker.requests.congested
    with pytest.raises(PredictTimeoutError, match="did not answer within the timeout"):
        await registry.predict("m", zoo.rows(1), timeout=0.05)
    go_on(worker.pid)
    assert all(len(answer) == len(LARGE) for answer in await asyncio.gather(*filling))


async def test_a_worker_that_takes_nothing_is_asked_for_a_sign_of_life(make_registry: MakeRegistry) -> None:
    """P2: those who wait for it have perhaps sent nothing yet that it could be late with."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    await registry.load("m")
    worker = registry._pool.workers[0]
    assert registry._pool._checking is not None
    registry._pool._checking.cancel()  # who looks is the test
    halt(worker.pid)
    worker.requests.pause_writing()
    call = asyncio.create_task(registry.predict("m", zoo.rows(1)))
    await settle()
    assert not worker.requests.pending
    now = time.monotonic()
    worker.check(now, patience=1000.0)
    assert worker.suspected
    worker.check(now + 20_000.0, patience=1000.0)
    assert len(await call) == 1
    assert registry._pool.restarts == 1


async def test_calls_that_cannot_be_sent_count_towards_the_limit(make_registry: MakeRegistry) -> None:
    """P6: the queue is full when as many calls wait as it takes, whether the worker has taken their rows or not."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}), queue_limit=40)
    await send_whole(registry, "m")
    worker = registry._pool.workers[0]
    halt(worker.pid)
    calls = [asyncio.create_task(registry.predict("m", LARGE)) for _ in range(30)]
    while not worker.requests.congested:
        await asyncio.sleep(0)
    calls += [asyncio.create_task(registry.predict("m", LARGE)) for _ in range(10)]
    await settle()
    sent = len(worker.requests.pending)
    assert 0 < sent < 30, "the lane is full before the tick is over"
    assert worker.requests.held_up == 40 - sent
    assert registry.stats().workers[0].queue_depth == 40
    for rows in (zoo.rows(1), LARGE):
        refused = registry.predict("m", rows)
        with pytest.raises(OverloadedError, match="40 calls wait"), pytest.raises(StopIteration):
            refused.send(None)
    calls.pop().cancel()
    await settle()
    replacement = asyncio.create_task(registry.predict("m", LARGE))
    await settle()
    assert (len(worker.requests.pending), worker.requests.held_up) == (sent, 40 - sent)
    go_on(worker.pid)
    assert all(len(answer) == len(LARGE) for answer in await asyncio.gather(*calls, replacement))
    assert worker.requests.waiting == 0


class Turns:
    """Counts the loop's turns."""

    def __init__(self) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.call_soon(self._take)

    def _take(self) -> None:
        self.count += 1
        self._next = self._loop.call_soon(self._take)

    def stop(self) -> None:
        self._next.cancel()


class EagerStore(MemoryStore):
    """Has all chunks at hand, and notes in which turn of the loop each is taken."""

    def __init__(self, turns: Turns, *chunks: bytes) -> None:
        super().__init__()
        self.taken: list[int] = []
        self._turns = turns
        self._chunks = chunks

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        del name, if_version
        return Artifact(version="1", size=sum(map(len, self._chunks)), suffix=".json", chunks=self._deliver())

    async def _deliver(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            self.taken.append(self._turns.count)
            yield chunk


@pytest.mark.parametrize(("number", "size"), [(80, 256 << 10), (2000, 1000)])
async def test_a_store_that_never_waits_lets_others_have_their_turn(
    make_registry: MakeRegistry, number: int, size: int
) -> None:
    """Between two chunks the loop does what else there is to do, whether the worker keeps up or not."""
    turns = Turns()
    store = EagerStore(turns, odd.artifact(), *[b" " * size] * number)
    registry = await make_registry(store, predictor=odd.ODD, memory_budget="1 GiB")
    assert (await registry.predict("m", [odd.PREDICT, 21.0])).tolist() == [42]
    turns.stop()
    assert len(set(store.taken)) == len(store.taken) == number + 1
