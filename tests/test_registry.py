"""The registry as its users call it, with real workers, on every kind of event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import oracle
import zoo
from conftest import settle
from halting import go_on, halt
from loops import LOOPS
from modelcache import (
    FeatureMismatchError,
    LoadFailed,
    MemoryStore,
    ModelCacheError,
    ModelEvicted,
    ModelLoaded,
    ModelNotFoundError,
    ModelRegistry,
    OverloadedError,
    PredictTimeoutError,
    PreloadProgress,
    RegistryClosedError,
    StoreError,
    WorkerDied,
)
from modelcache.testing import FakeClock, GatedStore

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeRegistry
    from modelcache import Event

ROWS = zoo.rows(3)
MODEL = zoo.model()
OTHER = zoo.model(seed=1)


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return "asyncio", LOOPS[request.param]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({"Chicago_IL.tar.gz": MODEL.targz, "tenant_a/Houston_TX.ubj": OTHER.ubj})


# Predictions


async def test_a_first_call_loads_and_answers(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """A cold model is loaded by its first call, and the answer is XGBoost's own; so is that of the next call."""
    registry = await make_registry(store)
    for _ in range(2):
        assert np.array_equal(await registry.predict("Chicago_IL", ROWS), MODEL.expected(ROWS))
    assert [info.name for info in registry.loaded()] == ["Chicago_IL"]
    assert registry.stats().loads == 1


async def test_the_readme_snippet(tmp_path: Path) -> None:
    """A path, `async with`, a name, a list of lists: that is all it takes."""
    (tmp_path / "Chicago_IL.tar.gz").write_bytes(MODEL.targz)
    async with ModelRegistry(tmp_path, memory_budget="64 MiB", workers=1) as registry:
        prices = await registry.predict("Chicago_IL", [[1990, 3047, 5, 1.0, 1.11, 2]])
    assert np.array_equal(prices, MODEL.expected([[1990, 3047, 5, 1.0, 1.11, 2]]))


async def test_the_first_calls_start_the_registry_once(store: MemoryStore, no_processes_left: None) -> None:
    """A registry that was not started is started by its first calls, however many there are at once."""
    registry = ModelRegistry(store, memory_budget="64 MiB", workers=1)
    try:
        answers = await asyncio.gather(*(registry.predict("Chicago_IL", ROWS) for _ in range(10)))
        assert all(np.array_equal(answer, MODEL.expected(ROWS)) for answer in answers)
        assert len(registry._pool.workers) == 1
    finally:
        await registry.close()
    oracle.check_gone(registry)


async def test_many_callers_of_many_models(make_registry: MakeRegistry) -> None:
    """Models never mix: of 400 calls at once to ten models in two workers each gets its own rows' predictions."""
    models = {f"m{index}": zoo.model(seed=index) for index in range(10)}
    registry = await make_registry(MemoryStore({f"{name}.ubj": m.ubj for name, m in models.items()}), workers=2)
    calls = [(name, zoo.rows(1 + index % 3, seed=index)) for index in range(40) for name in models]
    answers = await asyncio.gather(*(registry.predict(name, rows) for name, rows in calls))
    for (name, rows), answer in zip(calls, answers, strict=True):
        assert np.array_equal(answer, models[name].expected(rows))
    assert {info.workers for info in registry.loaded()} == {(w.pid,) for w in registry._pool.workers}


async def test_a_worker_that_dies_is_replaced_and_the_call_tried_again(
    make_registry: MakeRegistry, store: MemoryStore
) -> None:
    """P1: calls that a dying worker takes with it are answered all the same; its models come back when asked for."""
    registry = await make_registry(store)
    await registry.load("Chicago_IL")
    events: list[Event] = []
    registry.subscribe(events.append)
    worker = psutil.Process(registry._pool.workers[0].pid)
    halt(worker.pid)
    calls = [asyncio.create_task(registry.predict("Chicago_IL", ROWS)) for _ in range(20)]
    await asyncio.sleep(0)
    worker.kill()
    for answer in await asyncio.gather(*calls):
        assert np.array_equal(answer, MODEL.expected(ROWS))
    assert [type(event) for event in events] == [ModelEvicted, WorkerDied, ModelLoaded]
    died = next(event for event in events if isinstance(event, WorkerDied))
    assert (died.pid, died.signal, died.models) == (worker.pid, 9, ("Chicago_IL",))
    assert registry.stats().worker_restarts == 1


async def test_a_call_between_a_worker_s_end_and_its_burial(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """P1: a warm call to a worker whose lanes have just closed is tried again like one that was under way."""
    registry = await make_registry(store)
    await registry.load("Chicago_IL")
    worker = registry._pool.workers[0]
    psutil.Process(worker.pid).kill()
    while worker.alive:
        await asyncio.sleep(0)
    assert np.array_equal(await registry.predict("Chicago_IL", ROWS), MODEL.expected(ROWS))


async def test_a_cancelled_call_disturbs_no_other(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """P3: of a hundred calls that wait together every second is cancelled; the others get their answers."""
    registry = await make_registry(store)
    await registry.load("Chicago_IL")
    rows = zoo.rows(100)
    calls = [asyncio.create_task(registry.predict("Chicago_IL", row)) for row in rows]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    assert np.array_equal(np.concatenate(answers[1::2]), MODEL.expected(rows[1::2]))  # type: ignore[arg-type]
    assert registry._pool.workers[0].requests.pending == {}


async def test_timeouts_and_a_full_queue(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """P3, P6: a call whose worker does not answer times out alone; one that finds queue_limit waiting is refused."""
    registry = await make_registry(store, queue_limit=2)
    await registry.load("Chicago_IL")
    worker = psutil.Process(registry._pool.workers[0].pid)
    halt(worker.pid)
    waiting = [asyncio.create_task(registry.predict("Chicago_IL", ROWS)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="queue_limit") as refused:
        await registry.predict("Chicago_IL", ROWS)
    assert refused.value.retry_after is not None
    waiting.pop().cancel()
    await settle()
    with pytest.raises(PredictTimeoutError, match="Chicago_IL did not answer within the timeout") as late:
        await registry.predict("Chicago_IL", ROWS, timeout=0.001)
    assert late.value.model == "Chicago_IL"
    go_on(worker.pid)
    assert np.array_equal(await waiting[0], MODEL.expected(ROWS))


async def test_close_leaves_nothing(store: MemoryStore, no_processes_left: None) -> None:
    """F11: after close no task, process or descriptor is left, whatever was going on; and it stays closed."""
    descriptors = oracle.open_descriptors()
    gated = GatedStore({"slow.ubj": MODEL.ubj, "m.ubj": MODEL.ubj})
    gated.open("m")
    registry = ModelRegistry(gated, memory_budget="64 MiB", workers=2)
    await registry.predict("m", ROWS)
    calls = [asyncio.create_task(registry.predict(name, ROWS)) for name in ("m", "slow")]
    await gated.fetched(2)
    await registry.close()
    warm, cold = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(warm, np.ndarray)
    assert isinstance(cold, RegistryClosedError)
    oracle.check_gone(registry)
    oracle.check_no_tasks_left()
    assert oracle.open_descriptors() <= descriptors
    uses = (
        registry.start, registry.__aenter__, registry.names().__anext__, registry.acquire("m").__aenter__,
        registry.acquire_many(["m"]).__aenter__, lambda: registry.load("m"), lambda: registry.unload("m"),
        lambda: registry.preload(["m"]), lambda: registry.pin("m"), lambda: registry.invoke("m", ROWS),
    )  # fmt: skip
    for use in uses:
        with pytest.raises(RegistryClosedError, match="make a new one"):
            await use()
    registry.unpin("m")  # as a cleanup would: harmless
    assert registry.loaded() == []
    assert registry.stats().loads == 1
    assert "the registry was closed" in registry.explain("m")


# Models: load, preload, pin, unload, names


async def test_loading_and_unloading(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """load makes a model resident and describes it; unload frees it, and says whether there was anything to free."""
    registry = await make_registry(store)
    info = await registry.load("Chicago_IL")
    assert (info.name, info.state, info.n_features, info.n_outputs, info.n_trees) == ("Chicago_IL", "ready", 6, 1, 5)
    assert (info.format, info.container, info.booster) == ("ubj", "tar.gz", "gbtree")
    assert info.artifact_bytes == len(MODEL.targz)
    assert info.workers == (registry._pool.workers[0].pid,)
    assert (info.hits, info.pinned) == (0, False)
    assert 0 < info.size_bytes == registry.stats().bytes_resident
    assert (await registry.load("Chicago_IL")).hits == 1
    assert await registry.unload("Chicago_IL")
    assert registry.stats().bytes_resident == registry.stats().bytes_unloading == 0
    assert not await registry.unload("Chicago_IL")
    assert np.array_equal(await registry.predict("Chicago_IL", ROWS), MODEL.expected(ROWS))


async def test_a_name_with_its_suffix_is_the_same_model(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """A model that is resident is found with and without the suffix of its artifact, and loaded once."""
    registry = await make_registry(store)
    for name in ("Chicago_IL", "Chicago_IL.tar.gz", "tenant_a/Houston_TX.ubj", "tenant_a/Houston_TX.ubj"):
        await registry.predict(name, ROWS)
    assert registry.stats().loads == 2
    assert "is resident" in registry.explain("Chicago_IL.tar.gz")
    assert await registry.unload("Chicago_IL.tar.gz")
    assert [info.name for info in registry.loaded()] == ["tenant_a/Houston_TX.ubj"]


async def test_a_look_at_a_model_is_no_use_of_it(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """peek describes what is resident, by any of its names; it loads nothing and counts no hit."""
    registry = await make_registry(store)
    assert registry.peek("Chicago_IL") is None
    assert registry.stats().loads == 0
    await registry.load("Chicago_IL.tar.gz")
    for name in ("Chicago_IL", "Chicago_IL.tar.gz"):
        info = registry.peek(name)
        assert info is not None and info.name == "Chicago_IL.tar.gz"
    assert registry.peek("../etc/passwd") is None
    assert registry.stats().hits == 0


async def test_names_are_those_of_the_store(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """names() yields each model once as predict takes it; a store that cannot list says so."""
    registry = await make_registry(store)
    assert [name async for name in registry.names()] == ["Chicago_IL", "tenant_a/Houston_TX"]
    assert [name async for name in registry.names("tenant_a/")] == ["tenant_a/Houston_TX"]

    class Unlisted(MemoryStore):
        names = None  # type: ignore[assignment]

    with pytest.raises(StoreError, match="cannot list its models"):
        await anext(aiter((await make_registry(Unlisted())).names()))


async def test_preload_collects_failures(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """preload takes a list or names(), tells how far it is, and fails for no single model."""
    store.put("broken.ubj", b"nothing that could be a model")
    registry = await make_registry(store)
    progress: list[PreloadProgress] = []
    report = await registry.preload(registry.names(), concurrency=2, on_progress=progress.append)
    assert sorted(info.name for info in report.loaded) == ["Chicago_IL", "tenant_a/Houston_TX"]
    assert list(report.failed) == ["broken"]
    assert report.seconds > 0
    assert [(step.done, step.total) for step in progress] == [(1, 3), (2, 3), (3, 3)]
    assert {step.name: step.error for step in progress if step.error} == report.failed
    again = await registry.preload(["Chicago_IL", "Chicago_IL", "absent", "../up"])
    assert [info.name for info in again.loaded] == ["Chicago_IL"]
    assert set(again.failed) == {"absent", "../up"}
    with pytest.raises(TypeError, match=r"write preload\(\['Chicago_IL'\]\)"):
        await registry.preload("Chicago_IL")


async def test_preload_ends_with_the_registry(make_registry: MakeRegistry) -> None:
    """A registry that is closed during a preload ends it with the plain error, not with a group of errors."""
    gated = GatedStore(zoo.fleet(3))
    registry = await make_registry(gated)
    preloading = asyncio.create_task(registry.preload(["m000", "m001", "m002"]))
    await gated.fetched(3)
    await registry.close()
    with pytest.raises(RegistryClosedError):
        await preloading


async def test_a_pinned_model_comes_back_by_itself(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """A pin outlives the worker that held the model, and ends with unpin or unload."""
    registry = await make_registry(store)
    assert (await registry.pin("Chicago_IL")).pinned
    again = asyncio.Event()
    registry.subscribe(lambda event: again.set() if isinstance(event, ModelLoaded) else None)
    psutil.Process(registry._pool.workers[0].pid).kill()
    await again.wait()
    assert [info.pinned for info in registry.loaded()] == [True]
    registry.unpin("Chicago_IL")
    registry.unpin("Chicago_IL")
    registry.unpin("never loaded")
    assert [info.pinned for info in registry.loaded()] == [False]
    await registry.pin("Chicago_IL")
    assert await registry.unload("Chicago_IL")
    assert not (await registry.load("Chicago_IL")).pinned


async def test_without_retain_a_model_leaves_with_its_last_call(
    make_registry: MakeRegistry, store: MemoryStore
) -> None:
    """retain=False unloads each model after the calls that share it, unless it is pinned or leased."""
    registry = await make_registry(store, retain=False)
    answers = await asyncio.gather(*(registry.predict("Chicago_IL", ROWS) for _ in range(5)))
    assert all(np.array_equal(answer, MODEL.expected(ROWS)) for answer in answers)
    assert registry.loaded() == []
    assert (registry.stats().loads, registry.stats().evictions) == (1, {"retain": 1})
    async with registry.acquire("Chicago_IL") as lease:
        await lease.predict(ROWS)
        await registry.predict("Chicago_IL", ROWS)
        assert [info.name for info in registry.loaded()] == ["Chicago_IL"]
    assert registry.loaded() == []
    await registry.pin("Chicago_IL")
    await registry.predict("Chicago_IL", ROWS)
    assert [info.name for info in registry.loaded()] == ["Chicago_IL"]


async def test_a_lease_keeps_its_version(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """A lease goes on with the model it has, although that was unloaded and another took its name."""
    registry = await make_registry(store)
    async with registry.acquire("Chicago_IL") as lease:
        assert lease.name == "Chicago_IL"
        unloading = asyncio.create_task(registry.unload("Chicago_IL"))
        await settle()
        store.put("Chicago_IL.tar.gz", OTHER.targz)
        assert np.array_equal(await registry.predict("Chicago_IL", ROWS), OTHER.expected(ROWS))
        assert np.array_equal(await lease.predict(ROWS), MODEL.expected(ROWS))
        assert lease.model.state == "detached"
        assert not unloading.done()
    assert await unloading
    assert [info.name for info in registry.loaded()] == ["Chicago_IL"]


# What is known


async def test_invoke_tells_where_the_time_went(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """invoke gives predict's answer, the model, the tier it was in, and timings that add up."""
    registry = await make_registry(store)
    cold = await registry.invoke("Chicago_IL", ROWS)
    warm = await registry.invoke("Chicago_IL", ROWS)
    assert np.array_equal(cold.predictions, MODEL.expected(ROWS))
    assert np.array_equal(warm.predictions, MODEL.expected(ROWS))
    assert (cold.tier, warm.tier) == ("store", "memory")
    assert (cold.model.name, warm.model.hits) == ("Chicago_IL", 1)
    for timings in (cold.timings, warm.timings):
        parts = timings.waiting + timings.downloading + timings.loading + timings.predicting
        assert 0 < timings.predicting <= parts <= timings.total * (1 + 1e-9)
    assert cold.timings.downloading > 0 and cold.timings.loading > 0
    assert warm.timings.waiting == warm.timings.downloading == warm.timings.loading == 0


async def test_events_come_as_things_happen(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """Subscribers hear of loads, failures and evictions in order; one that raises harms nobody; one can leave."""
    registry = await make_registry(store)
    events: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("a subscriber's own fault")

    registry.subscribe(broken)
    leave = registry.subscribe(events.append)
    info = await registry.load("Chicago_IL")
    with pytest.raises(ModelNotFoundError):
        await registry.load("absent")
    await registry.unload("Chicago_IL")
    leave()
    leave()
    await registry.load("Chicago_IL")
    loaded, failed, evicted = events
    assert isinstance(loaded, ModelLoaded) and loaded.model.size_bytes == info.size_bytes
    assert isinstance(failed, LoadFailed) and isinstance(failed.error, ModelNotFoundError) and failed.name == "absent"
    assert evicted == ModelEvicted("Chicago_IL", info.version, "unload", info.size_bytes)


async def test_explain_in_every_state(make_registry: MakeRegistry) -> None:
    """explain says of a name why it is cold, loading, resident, refused or gone, with the figures."""
    clock, gated = FakeClock(), GatedStore({"m.ubj": MODEL.ubj})
    gated.open("absent")
    registry = await make_registry(gated, clock=clock)
    assert registry.explain("m").startswith("m is cold: it has never been asked for. Budget: 64.0 MiB")
    call = asyncio.create_task(registry.predict("m", ROWS))
    await gated.fetched(1)
    assert registry.explain("m").startswith("m is cold and loading now; callers waiting for it: 1.")
    gated.open("m")
    await call
    clock.advance(7)
    assert "m is resident: version " in registry.explain("m")
    assert "evictable" in registry.explain("m") and "last used 7.0 s ago" in registry.explain("m")
    async with registry.acquire("m"):
        assert "1 leases" in registry.explain("m")
    await registry.pin("m")
    assert "pinned" in registry.explain("m")
    await registry.unload("m")
    clock.advance(5)
    assert "was evicted 5.0 s ago because it was unloaded by a call of unload()" in registry.explain("m")
    with pytest.raises(ModelNotFoundError):
        await registry.predict("absent", ROWS)
    assert "absent is refused for another" in registry.explain("absent")
    clock.advance(2)
    assert "absent is cold: its last load failed 2.0 s ago with ModelNotFoundError" in registry.explain("absent")
    with pytest.raises(ModelCacheError):
        registry.explain("../up")


async def test_stats_are_those_of_sagemaker_and_more(make_registry: MakeRegistry, store: MemoryStore) -> None:
    """The six figures of SageMaker multi-model endpoints, and what the registry knows beyond them."""
    registry = await make_registry(store)
    zero = registry.stats()
    assert (zero.requests, zero.model_cache_hit.count, zero.loaded_model_count.count) == (0, 0, 0)
    info = await registry.load("Chicago_IL")
    for _ in range(3):
        await registry.predict("Chicago_IL", ROWS)
    with pytest.raises(ModelNotFoundError):
        await registry.predict("absent", ROWS)
    with pytest.raises(FeatureMismatchError):
        await registry.predict("Chicago_IL", [[1.0, 2.0]])
    loaded = registry.stats()
    await registry.unload("Chicago_IL")
    stats = registry.stats()
    assert (stats.requests, stats.hits, stats.loads, stats.load_failures, stats.joins) == (6, 4, 1, 1, 0)
    hit = stats.model_cache_hit
    assert (hit.count, hit.sum, hit.min, hit.max, hit.p50, hit.mean) == (6, 4.0, 0.0, 1.0, 1.0, 4 / 6)
    for summary in (stats.model_loading_wait_time, stats.model_downloading_time, stats.model_loading_time):
        assert summary.count == 1
        assert 0 < summary.min <= summary.p50 <= summary.p90 <= summary.p99 <= summary.max <= summary.sum
    assert stats.model_unloading_time.count == 1
    assert stats.loaded_model_count.count == 2
    assert (stats.loaded_model_count.min, stats.loaded_model_count.max) == (0, 1)
    assert (loaded.bytes_resident, stats.bytes_resident, stats.budget) == (info.size_bytes, 0, 64 << 20)
    assert loaded.workers[0].models == 1 and loaded.workers[0].charged_bytes == info.size_bytes
    assert stats.workers[0].predict_latency.count == 3
    assert stats.workers[0].queue_depth == stats.workers[0].charged_bytes == 0
    assert stats.evictions == {"unload": 1}


async def test_repr_is_a_status_line(make_registry: MakeRegistry) -> None:
    """The repr shows the store, the models, the bytes and the workers."""
    gated = GatedStore({"m.ubj": MODEL.ubj, "n.ubj": OTHER.ubj})
    gated.open("m")
    registry = await make_registry(gated)
    await registry.load("m")
    load = asyncio.create_task(registry.load("n"))
    await gated.fetched(2)
    assert repr(registry) == "<ModelRegistry memory (2 artifacts) 1 ready, 1 loading, 0.0/64.0 MiB, 1 workers>"
    gated.open("n")
    await load
