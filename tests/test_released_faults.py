"""Faults that released caches and model servers have in our territory: each is a test that we pass.

Where the package is at hand, and shows its fault without waiting for time to pass, it does so here beside us.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import aiocache
import anyio.functools
import async_lru
import cachebox
import numpy as np
import psutil
import pytest

import zoo
from conftest import settle
from halting import go_on, halt
from modelcache import CorruptArtifactError, MemoryStore, ModelNotFoundError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from conftest import MakeRegistry
    from modelcache import Artifact, NotModified

ROWS = zoo.rows(2)
MODEL = zoo.model()
OTHER = zoo.model(seed=1)


def seen_in(package: str, release: str) -> pytest.MarkDecorator:
    """Run the test with the release that was seen to have the fault: another may have mended it."""
    return pytest.mark.skipif(not version(package).startswith(release), reason=f"seen in {package} {release}")


class PacedStore(MemoryStore):
    """Each fetch, in order, goes on when the test resolves its future in ``steps``."""

    def __init__(self, artifacts: dict[str, bytes]) -> None:
        super().__init__(artifacts)
        self.steps: list[asyncio.Future[None]] = []

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        self.steps.append(asyncio.get_running_loop().create_future())
        await self.steps[-1]
        return await super().fetch(name, if_version=if_version)

    async def fetched(self, count: int) -> None:
        while len(self.steps) < count:
            await asyncio.sleep(0)


class PacedLoad:
    """What the released caches wrap: each call, in order, goes on when the test resolves its future in ``steps``."""

    def __init__(self) -> None:
        self.steps: list[asyncio.Future[str]] = []

    async def __call__(self, name: str) -> str:
        self.steps.append(asyncio.get_running_loop().create_future())
        return await self.steps[-1]

    def function(self) -> Callable[[str], Awaitable[str]]:
        async def load(name: str) -> str:
            return await self(name)

        return load


async def outcomes(tasks: Iterable[asyncio.Task[Any]]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


# anyio: an entry that is still loading is evicted


@seen_in("anyio", "4.16.")
async def test_anyio_evicts_what_is_loading() -> None:
    """anyio 4: with room for one, a second name evicts the first while it loads; who waits for it gets KeyError."""
    paced = PacedLoad()
    load: Any = anyio.functools.lru_cache(maxsize=1)(paced.function())
    first, second = (asyncio.create_task(load("a")) for _ in range(2))
    await settle()
    other = asyncio.create_task(load("b"))
    await settle()
    await cancel(first)
    paced.steps[1].set_result("b")
    assert await other == "b"
    with pytest.raises(KeyError):
        await second


async def test_what_is_loading_cannot_be_evicted(make_registry: MakeRegistry) -> None:
    """F4, L4: with room for one, a second name waits for the first to land, and all who wait for that are served."""
    store = PacedStore({"a.ubj": MODEL.ubj, "b.ubj": OTHER.ubj})
    registry = await make_registry(store)
    measuring = asyncio.create_task(registry.load("a"))
    await store.fetched(1)
    store.steps[0].set_result(None)
    size = (await measuring).size_bytes
    await registry.unload("a")
    registry.resize(size + size // 2)
    first, second = (asyncio.create_task(registry.predict("a", ROWS)) for _ in range(2))
    await store.fetched(2)
    other = asyncio.create_task(registry.predict("b", ROWS))
    await store.fetched(3)
    await cancel(first)
    store.steps[2].set_result(None)
    store.steps[1].set_result(None)
    assert np.array_equal(await second, MODEL.expected(ROWS))
    assert np.array_equal(await other, OTHER.expected(ROWS))


# async-lru: a stale failure drops the newer value; impatient callers start load after load


@seen_in("async-lru", "2.4.")
async def test_async_lru_drops_the_newer_value() -> None:
    """async-lru 2.4: a load that fails after it was invalidated takes the good value loaded meanwhile with it."""
    paced = PacedLoad()
    load = async_lru.alru_cache(paced.function())  # type: ignore[arg-type,var-annotated]
    old = asyncio.create_task(load("m"))
    await settle()
    load.cache_invalidate("m")
    new = asyncio.create_task(load("m"))
    await settle()
    paced.steps[1].set_result("good")
    assert await new == "good"
    assert load.cache_contains("m")
    paced.steps[0].set_exception(OSError())
    await outcomes([old])
    assert not load.cache_contains("m")


async def test_a_stale_failure_leaves_the_newer_model_alone(make_registry: MakeRegistry) -> None:
    """F7, F8: a load that fails after its model was unloaded neither drops nor refuses the one loaded since."""
    store = PacedStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    old = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(1)
    unloading = asyncio.create_task(registry.unload("m"))
    await settle()
    new = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(2)
    store.steps[1].set_result(None)
    assert np.array_equal(await new, MODEL.expected(ROWS))
    store.steps[0].set_exception(StoreUnavailableError("too late"))
    assert [type(error) for error in await outcomes([old])] == [StoreUnavailableError]
    await unloading
    assert np.array_equal(await registry.predict("m", ROWS), MODEL.expected(ROWS))
    assert len(store.steps) == 2
    await registry.unload("m")
    again = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(3)
    store.steps[2].set_result(None)
    assert np.array_equal(await again, MODEL.expected(ROWS))


@seen_in("async-lru", "2.4.")
@seen_in("aiocache", "0.12.")
@pytest.mark.parametrize("wrap", [async_lru.alru_cache, aiocache.cached_stampede(lease=60)])
async def test_impatient_callers_of_async_lru_and_aiocache_start_over(wrap: Any) -> None:
    """async-lru 2.4, aiocache 0.12: six callers, one after another too impatient, start six loads and finish none."""
    paced = PacedLoad()
    load = wrap(paced.function())
    for _ in range(6):
        call = asyncio.create_task(load("impatient"))
        await settle()
        await cancel(call)
    assert len(paced.steps) == 6
    assert all(step.cancelled() for step in paced.steps)


async def test_impatient_callers_share_one_load(make_registry: MakeRegistry) -> None:
    """F9: six callers, one after another too impatient, start one load; it lands, and the seventh profits."""
    store = PacedStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    for _ in range(6):
        call = asyncio.create_task(registry.predict("m", ROWS))
        await store.fetched(1)
        await cancel(call)
    store.steps[0].set_result(None)
    assert np.array_equal(await registry.predict("m", ROWS), MODEL.expected(ROWS))
    assert len(store.steps) == 1


# aiocache, Ray Serve: every caller of a failing name makes an attempt of its own


@seen_in("aiocache", "0.12.")
async def test_aiocache_tries_again_for_each_caller() -> None:
    """aiocache 0.12: when a load fails, each of the callers who waited for it makes another attempt."""
    paced = PacedLoad()
    load: Any = aiocache.cached_stampede(lease=60)(paced.function())
    calls = [asyncio.create_task(load("failing")) for _ in range(20)]
    await settle()
    failed = 0
    while failed < len(paced.steps):
        paced.steps[failed].set_exception(OSError())
        failed += 1
        await settle()
    assert [type(error) for error in await outcomes(calls)] == [OSError] * 20
    assert failed == 20


async def test_twenty_callers_of_a_failing_name_make_one_attempt(make_registry: MakeRegistry) -> None:
    """F6, F8: twenty callers of a name that fails share one attempt, and twenty more are refused from memory."""
    store = PacedStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    calls = [asyncio.create_task(registry.predict("m", ROWS)) for _ in range(20)]
    await store.fetched(1)
    store.steps[0].set_exception(StoreUnavailableError("the store is down"))
    calls += [asyncio.create_task(registry.predict("m", ROWS)) for _ in range(20)]
    assert [type(error) for error in await outcomes(calls)] == [StoreUnavailableError] * 40
    assert len(store.steps) == 1


# cachebox, theine: cancelling the first caller cancels everyone


@seen_in("cachebox", "6.2.")
async def test_cachebox_cancels_everyone() -> None:
    """cachebox 6.2: cancelling the first caller raises its CancelledError in all who wait for the same load."""
    paced = PacedLoad()
    load: Any = cachebox.cached(cachebox.LRUCache(8))(paced.function())
    first, *others = (asyncio.create_task(load("m")) for _ in range(5))
    await settle()
    await cancel(first)
    assert [type(error) for error in await outcomes(others)] == [asyncio.CancelledError] * 4


async def test_cancelling_the_first_caller_cancels_nobody_else(make_registry: MakeRegistry) -> None:
    """F3: the first caller may go; those who wait with it, and the next one, are served from the same load."""
    store = PacedStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    first, *others = (asyncio.create_task(registry.predict("m", ROWS)) for _ in range(5))
    await store.fetched(1)
    await cancel(first)
    others.append(asyncio.create_task(registry.predict("m", ROWS)))
    store.steps[0].set_result(None)
    for answer in await asyncio.gather(*others):
        assert np.array_equal(answer, MODEL.expected(ROWS))
    assert len(store.steps) == 1


# Ray Serve 2.60 (multiplexing)


async def test_loads_do_not_queue_behind_each_other(make_registry: MakeRegistry) -> None:
    """F2: Ray Serve loads under one lock; here five cold names are all on their way before the first has arrived."""
    store = PacedStore(zoo.fleet(5))
    registry = await make_registry(store)
    loads = [asyncio.create_task(registry.load(f"m00{index}")) for index in range(5)]
    await store.fetched(5)
    for step in reversed(store.steps):
        step.set_result(None)
    assert [info.name for info in await asyncio.gather(*loads)] == [f"m00{index}" for index in range(5)]


async def test_a_bad_name_closes_no_model_in_use(make_registry: MakeRegistry) -> None:
    """L3: Ray Serve makes room before it looks; here a name that the store has not costs the resident model nothing."""
    registry = await make_registry(MemoryStore({"m.ubj": MODEL.ubj}))
    size = (await registry.load("m")).size_bytes
    registry.resize(size)
    worker = psutil.Process(registry._pool.workers[0].pid)
    halt(worker.pid)
    call = asyncio.create_task(registry.predict("m", ROWS))
    await asyncio.sleep(0)
    with pytest.raises(ModelNotFoundError):
        await registry.predict("misspelt", ROWS)
    assert [info.name for info in registry.loaded()] == ["m"]
    go_on(worker.pid)
    assert np.array_equal(await call, MODEL.expected(ROWS))
    assert registry.stats().evictions == {}


# MLServer 1.7 (adaptive batching)


async def test_a_cancelled_member_of_a_batch_hangs_nobody(make_registry: MakeRegistry) -> None:
    """P3: MLServer leaves a batch hanging when one member is cancelled; here the others are answered."""
    registry = await make_registry(MemoryStore({"m.ubj": MODEL.ubj}))
    await registry.load("m")
    worker = psutil.Process(registry._pool.workers[0].pid)
    halt(worker.pid)
    rows = zoo.rows(16)
    calls = [asyncio.create_task(registry.predict("m", row)) for row in rows]
    await settle()
    for member in (0, 7, 15):
        await cancel(calls[member])
    go_on(worker.pid)
    answer = MODEL.expected(rows)
    for member in set(range(16)) - {0, 7, 15}:
        assert np.array_equal(await calls[member], answer[member : member + 1])


# Multi Model Server


async def test_unload_loses_no_call_in_flight(make_registry: MakeRegistry) -> None:
    """F10: Multi Model Server drops the requests in flight on unload; here unload waits for their answers."""
    registry = await make_registry(MemoryStore({"m.ubj": MODEL.ubj}))
    await registry.load("m")
    worker = psutil.Process(registry._pool.workers[0].pid)
    halt(worker.pid)
    calls = [asyncio.create_task(registry.predict("m", ROWS)) for _ in range(20)]
    await asyncio.sleep(0)
    unloading = asyncio.create_task(registry.unload("m"))
    await settle()
    assert not unloading.done()
    go_on(worker.pid)
    for answer in await asyncio.gather(*calls):
        assert np.array_equal(answer, MODEL.expected(ROWS))
    assert await unloading
    assert registry.stats().loads == 1


async def test_a_corrupt_model_does_not_load(make_registry: MakeRegistry) -> None:
    """A2: Multi Model Server answers the load of a corrupt model with 200; here load() raises, and says why."""
    registry = await make_registry(MemoryStore({"m.tar.gz": MODEL.targz[:-20]}))
    with pytest.raises(CorruptArtifactError, match="cut short"):
        await registry.load("m")
    assert registry.loaded() == []
