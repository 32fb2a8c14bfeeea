"""Rules F1 to F12: one load per name, however many callers ask, and whatever becomes of them."""

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
from modelcache import (
    Artifact,
    BudgetTimeoutError,
    CorruptArtifactError,
    LoadFailed,
    LoadTimeoutError,
    MemoryStore,
    ModelCacheError,
    ModelInfo,
    ModelLoaded,
    ModelNotFoundError,
    ModelRegistry,
    ModelTooLargeError,
    NotModified,
    RegistryClosedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.testing import FakeClock, GatedStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from conftest import MakeRegistry
    from modelcache import Event, Lease

ROWS = zoo.rows(2)
MODEL = zoo.model()
OTHER = zoo.model(seed=1)


class HeldStore(MemoryStore):
    """Answers each fetch at once, and delivers its bytes when the test sets its gate; ``leaving`` holds up aclose."""

    def __init__(self, artifacts: dict[str, bytes]) -> None:
        super().__init__(artifacts)
        self.gates: list[asyncio.Event] = []
        self.leaving = asyncio.Event()
        self.leaving.set()

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        found = await super().fetch(name, if_version=if_version)
        assert isinstance(found, Artifact)
        self.gates.append(asyncio.Event())
        chunks = HeldChunks(found.chunks, self.gates[-1], self.leaving)
        return Artifact(version=found.version, size=found.size, suffix=found.suffix, chunks=chunks)

    async def fetched(self, count: int) -> None:
        while len(self.gates) < count:
            await asyncio.sleep(0)


class HeldChunks:
    def __init__(self, chunks: AsyncIterator[bytes], gate: asyncio.Event, leaving: asyncio.Event) -> None:
        self.chunks, self.gate, self.leaving = chunks, gate, leaving

    def __aiter__(self) -> HeldChunks:
        return self

    async def __anext__(self) -> bytes:
        await self.gate.wait()
        return await anext(self.chunks)

    async def aclose(self) -> None:
        await self.leaving.wait()


class RaisingStore(MemoryStore):
    """Raises ``error`` instead of delivering."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.fetches = 0

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        self.fetches += 1
        raise self.error


def gated(**artifacts: bytes) -> GatedStore:
    return GatedStore({f"{name}.ubj": data for name, data in artifacts.items()})


async def is_cancelled(task: asyncio.Task[Any]) -> bool:
    task.cancel()
    await asyncio.wait((task,))
    return task.cancelled()


async def until_airborne(registry: ModelRegistry, count: int) -> None:
    while len(registry._state.flights.airborne) != count:
        await asyncio.sleep(0)


def airborne(registry: ModelRegistry) -> int:
    return len(registry._state.flights.airborne)


async def load_one_that_fills_the_budget(registry: ModelRegistry) -> ModelInfo:
    """Load "m" and make the budget so small that no other model fits beside it."""
    info = await registry.load("m")
    registry.resize(info.size_bytes + info.size_bytes // 2)
    return info


# F1 and F2: one load for each name, and many names at once


async def test_a_thousand_first_calls_are_one_load(make_registry: MakeRegistry) -> None:
    """F1: however many callers find a name cold, it is fetched and loaded once, and each gets its own answer."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    rows = zoo.rows(1000)
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(registry.predict("m", row)) for row in rows]
        await settle()
        store.open("m")
    stats = registry.stats()
    assert store.fetches == ["m"]
    assert (stats.loads, stats.joins, stats.hits, stats.requests) == (1, 999, 0, 1000)
    assert np.array_equal(np.concatenate([call.result() for call in calls]), MODEL.expected(rows))


@pytest.mark.parametrize("slots", [32, 50])
async def test_loads_of_different_names_overlap(make_registry: MakeRegistry, slots: int) -> None:
    """F2: fifty cold names are fetched together, as many at once as load_concurrency says."""
    fleet = zoo.fleet(50)
    names = [file.removesuffix(".ubj") for file in fleet]
    store = GatedStore(fleet)
    registry = await make_registry(store, load_concurrency=slots)
    loads = [asyncio.create_task(registry.load(name)) for name in names]
    await settle()
    assert store.fetches == names[:slots], "these are under way at once, and no gate is open"
    store.open(*names)
    assert [info.name for info in await asyncio.gather(*loads)] == names
    assert registry.stats().loads == 50


async def test_close_waits_for_what_its_loads_still_have_to_let_go_of(make_registry: MakeRegistry) -> None:
    """F2, F11: a load is held on to until its task has ended, even when its callers were answered before."""
    store = HeldStore({"m.ubj": MODEL.ubj})
    store.leaving.clear()
    registry = await make_registry(store)
    load = asyncio.create_task(registry.load("m"))
    await store.fetched(1)
    store.gates[0].set()
    await load
    async with registry.acquire("m"):
        closing = asyncio.create_task(registry.close())
        await settle()
        assert registry._leasing._quiet is None, "close waits for leases after it has waited for loads"
        store.leaving.set()
        while registry._leasing._quiet is None:
            await asyncio.sleep(0)
    await closing
    oracle.check_no_tasks_left()


# F3 to F5: callers that leave


async def test_the_first_caller_may_be_cancelled(make_registry: MakeRegistry) -> None:
    """F3: cancelling the caller that started a load disturbs neither the load nor those who joined it."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    first, second = (asyncio.create_task(registry.predict("m", ROWS)) for _ in range(2))
    await store.fetched(1)
    assert await is_cancelled(first)
    store.open("m")
    assert np.array_equal(await second, MODEL.expected(ROWS))
    assert store.fetches == ["m"]


async def test_a_waiter_may_run_out_of_time(make_registry: MakeRegistry) -> None:
    """F3: a timeout is that caller's own; it names the model and what the load is doing, and the others wait on."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    patient = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(1)
    with pytest.raises(LoadTimeoutError, match="m is still loading; the load goes on, and") as caught:
        await registry.predict("m", ROWS, timeout=0.001)
    assert caught.value.model == "m"
    store.open("m")
    assert np.array_equal(await patient, MODEL.expected(ROWS))
    assert store.fetches == ["m"]


async def test_landing_is_one_step(make_registry: MakeRegistry) -> None:
    """F4: whoever is told of a landing finds the bytes settled, and a lease for each caller who still waits."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    seen = []

    def look(event: Event) -> None:
        assert isinstance(event, ModelLoaded)
        oracle.check(registry)
        ledger = registry._state.ledger
        seen.append((ledger.table["m"].leases, ledger.reserved, event.model.size_bytes == ledger.resident))

    registry.subscribe(look)
    calls = [asyncio.create_task(registry.predict("m", ROWS)) for _ in range(3)]
    await store.fetched(1)
    assert await is_cancelled(calls[1])
    store.open("m")
    await asyncio.gather(calls[0], calls[2])
    assert seen == [(2, 0, True)]


async def test_a_caller_cancelled_as_its_model_lands_releases_it(make_registry: MakeRegistry) -> None:
    """F5: a caller that is cancelled in the very step that handed it a lease gives it back; the others are served."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    doomed, other = (asyncio.create_task(registry.predict("m", ROWS)) for _ in range(2))
    registry.subscribe(lambda event: isinstance(event, ModelLoaded) and doomed.cancel())  # type: ignore[arg-type]
    await store.fetched(1)
    store.open("m")
    assert np.array_equal(await other, MODEL.expected(ROWS))
    await asyncio.wait((doomed,))
    assert doomed.cancelled()
    assert registry._state.ledger.leases == 0
    assert await registry.unload("m")


# F6 to F8: failures


async def test_each_waiter_gets_an_exception_of_its_own(make_registry: MakeRegistry) -> None:
    """F6: one failed attempt fails all who wait for it, each with a fresh exception that the original has caused."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    calls = [asyncio.create_task(registry.predict("m", ROWS)) for _ in range(20)]
    await store.fetched(1)
    original = StoreUnavailableError("the store is down")
    store.fail("m", original)
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(type(error) is StoreUnavailableError and str(error) == "the store is down" for error in errors)
    assert len(set(map(id, errors)) - {id(original)}) == 20
    assert all(isinstance(error, ModelCacheError) and error.__cause__ is original for error in errors)
    assert all(isinstance(error, ModelCacheError) and error.model == "m" for error in errors)
    assert store.fetches == ["m"]
    assert (registry.stats().load_failures, registry.stats().bytes_reserved) == (1, 0)


@pytest.mark.parametrize("error", [OSError("broken pipe"), TimeoutError("no answer"), asyncio.CancelledError()])
async def test_whatever_a_store_raises_is_a_store_error(make_registry: MakeRegistry, error: BaseException) -> None:
    """F6: a foreign exception of a store comes as StoreError, whatever it would mean if it were ours."""
    registry = await make_registry(RaisingStore(error))
    with pytest.raises(StoreError, match=f"The store failed: {type(error).__name__}") as caught:
        await registry.predict("m", ROWS)
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__cause__ is error


async def test_nobody_joins_a_flight_that_has_failed(make_registry: MakeRegistry) -> None:
    """F7: a call made in the step that fails a load makes an attempt of its own."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store, failure_ttl=0)
    later: list[asyncio.Task[Any]] = []

    def call_again(event: Event) -> None:
        if isinstance(event, LoadFailed):
            store.open("m")
            later.append(asyncio.create_task(registry.predict("m", ROWS)))

    registry.subscribe(call_again)
    first = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(1)
    store.fail("m", StoreUnavailableError("the store is down"))
    with pytest.raises(StoreUnavailableError):
        await first
    assert np.array_equal(await later[0], MODEL.expected(ROWS))
    assert store.fetches == ["m", "m"]


async def test_nobody_joins_a_flight_that_was_deserted(make_registry: MakeRegistry) -> None:
    """F7, F9: a load that gives up because nobody waits any more cannot be joined while it cleans up."""
    store = HeldStore({"m.ubj": MODEL.ubj, "late.tar.gz": OTHER.targz})
    registry = await make_registry(store)
    loading = asyncio.create_task(load_one_that_fills_the_budget(registry))
    await store.fetched(1)
    store.gates[0].set()
    await loading
    async with registry.acquire("m"):
        with pytest.raises(LoadTimeoutError):
            await registry.predict("late", ROWS, timeout=0.001)
        store.leaving.clear()
        store.gates[1].set()  # it finds no bytes free, and nobody who waits
        await until_airborne(registry, 0)
        again = asyncio.create_task(registry.predict("late", ROWS))
        await settle()
        store.leaving.set()
        await store.fetched(3)
        store.gates[2].set()
    assert np.array_equal(await again, OTHER.expected(ROWS))


async def test_a_failure_is_remembered_for_a_while(make_registry: MakeRegistry) -> None:
    """F8: a name whose load has failed is refused without asking the store, twice as long each time, up to 30 s."""
    clock, store = FakeClock(), RaisingStore(StoreUnavailableError("the store is down"))
    registry = await make_registry(store, clock=clock)
    longest = 1.0
    for attempt in range(1, 9):
        with pytest.raises(StoreUnavailableError):
            await registry.predict("m", ROWS)
        assert store.fetches == attempt
        clock.advance(longest * 0.74)
        with pytest.raises(StoreUnavailableError) as refused:
            await registry.predict("m", ROWS)
        assert store.fetches == attempt, "refused from memory"
        assert refused.value.retry_after is not None
        assert 0 < refused.value.retry_after <= longest * 0.26 + 1e-6
        failure = registry.failure("m")
        assert (type(failure), str(failure)) == (refused.type, str(refused.value))
        clock.advance(longest * 0.27)
        assert registry.failure("m") is None, "it would be tried again"
        longest = min(longest * 2, 30.0)


async def test_a_success_ends_the_memory_of_failures(make_registry: MakeRegistry) -> None:
    """F8: after a load that succeeds the next failure is the first again."""
    clock, store = FakeClock(), gated(m=MODEL.ubj)
    registry = await make_registry(store, clock=clock)

    async def fail() -> float:
        call = asyncio.create_task(registry.predict("m", ROWS))
        await store.fetched(len(store.fetches) + 1)
        store.fail("m", StoreUnavailableError("the store is down"))
        await asyncio.wait((call,))
        with pytest.raises(StoreUnavailableError) as refused:
            await registry.predict("m", ROWS)
        assert refused.value.retry_after is not None
        return refused.value.retry_after

    assert 0.75 <= await fail() <= 1
    clock.advance(1)
    assert 1.5 <= await fail() <= 2
    clock.advance(2)
    store.open("m")
    await registry.load("m")
    store.shut("m")
    await registry.unload("m")
    assert 0.75 <= await fail() <= 1


async def test_a_name_that_is_not_there_is_looked_for_again_soon(make_registry: MakeRegistry) -> None:
    """F8: an artifact may be about to be copied in, so the memory of its absence does not double."""
    clock, store = FakeClock(), MemoryStore()
    registry = await make_registry(store, clock=clock)
    for _ in range(5):
        with pytest.raises(ModelNotFoundError):
            await registry.predict("m", ROWS)
        clock.advance(1)
    store.put("m.ubj", MODEL.ubj)
    assert np.array_equal(await registry.predict("m", ROWS), MODEL.expected(ROWS))


async def test_no_failure_is_remembered_with_a_ttl_of_0(make_registry: MakeRegistry) -> None:
    """F8: failure_ttl=0 asks the store each time."""
    store = RaisingStore(StoreUnavailableError("the store is down"))
    registry = await make_registry(store, failure_ttl=0)
    for attempt in (1, 2, 3):
        with pytest.raises(StoreUnavailableError):
            await registry.predict("m", ROWS)
        assert store.fetches == attempt


async def test_what_says_nothing_of_the_model_is_not_remembered(make_registry: MakeRegistry) -> None:
    """F8: neither a cancelled call nor a budget without room keeps the next call from trying."""
    store = gated(m=MODEL.ubj, big=zoo.model(trees=100).ubj)
    store.open("big")
    registry = await make_registry(store, failure_ttl=30)
    call = asyncio.create_task(registry.predict("m", ROWS))
    await settle()
    assert await is_cancelled(call)
    store.open("m")
    info = await load_one_that_fills_the_budget(registry)
    with pytest.raises(ModelTooLargeError):
        await registry.predict("big", ROWS)
    store.put("n.ubj", OTHER.ubj)
    store.open("n")
    async with registry.acquire("m"):
        registry._loader.timeout = 0.05
        with pytest.raises(BudgetTimeoutError):
            await registry.predict("n", ROWS)
    registry._loader.timeout = 60
    assert registry._state.failures.recall("big") is None
    assert np.array_equal(await registry.predict("n", ROWS), OTHER.expected(ROWS))
    assert info.name == "m"


# F9: nobody waits any more


async def test_impatient_callers_cost_one_load_and_the_last_is_served(make_registry: MakeRegistry) -> None:
    """F9: callers whose timeout is shorter than the load start it once, and those who come later profit."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    loaded = asyncio.Event()
    registry.subscribe(lambda event: loaded.set() if isinstance(event, ModelLoaded) else None)
    for _ in range(5):
        with pytest.raises(LoadTimeoutError):
            await registry.predict("m", ROWS, timeout=0.001)
    store.open("m")
    await loaded.wait()
    assert np.array_equal(await registry.predict("m", ROWS, timeout=5), MODEL.expected(ROWS))
    assert (store.fetches, registry.stats().loads) == (["m"], 1)


async def test_a_load_that_waits_for_a_slot_is_dropped_with_its_last_caller(make_registry: MakeRegistry) -> None:
    """F9: what nobody waits for any more and has not begun never begins."""
    store = gated(m=MODEL.ubj, n=OTHER.ubj)
    registry = await make_registry(store, load_concurrency=1)
    first, *others = (asyncio.create_task(registry.predict(name, ROWS)) for name in ("m", "n", "n"))
    await store.fetched(1)
    for call in others:
        assert airborne(registry) == 2
        assert await is_cancelled(call)
    assert airborne(registry) == 1
    store.open("m", "n")
    await first
    await settle()
    assert store.fetches == ["m"]


async def test_a_load_that_waits_for_bytes_is_dropped_with_its_last_caller(make_registry: MakeRegistry) -> None:
    """F9: a claim whose callers have all gone leaves the queue, and evicts nothing when bytes become free."""
    store = gated(m=MODEL.ubj, n=OTHER.ubj)
    store.open("m", "n")
    registry = await make_registry(store)
    await load_one_that_fills_the_budget(registry)
    async with registry.acquire("m"):
        call = asyncio.create_task(registry.predict("n", ROWS))
        while not registry._state.ledger.queue:
            await asyncio.sleep(0)
        assert "waiting for bytes" in registry.explain("n")
        assert await is_cancelled(call)
        await settle()
        assert not registry._state.ledger.queue
    assert [info.name for info in registry.loaded()] == ["m"]
    assert airborne(registry) == 0


# F10: unloaded while it loads


async def test_unload_during_a_load_serves_those_who_wait(make_registry: MakeRegistry) -> None:
    """F10: callers of a load that is unloaded get their answer, and nothing stays; unload returns after that."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    call = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(1)
    unloading = asyncio.create_task(registry.unload("m"))
    await settle()
    store.open("m")
    assert await unloading
    assert np.array_equal(await call, MODEL.expected(ROWS))
    assert registry.loaded() == []
    assert registry.stats().bytes_resident == registry.stats().bytes_unloading == 0


async def test_an_unloaded_load_never_replaces_a_newer_one(make_registry: MakeRegistry) -> None:
    """F10: a caller after the unload starts anew, and the old load, landing last, does not displace what it got."""
    store = HeldStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    old = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(1)
    unloading = asyncio.create_task(registry.unload("m"))
    await settle()
    store.put("m.ubj", OTHER.ubj)
    new = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(2)
    store.gates[1].set()
    assert np.array_equal(await new, OTHER.expected(ROWS))
    store.gates[0].set()
    assert np.array_equal(await old, MODEL.expected(ROWS))
    assert await unloading
    assert np.array_equal(await registry.predict("m", ROWS), OTHER.expected(ROWS))
    assert len(store.gates) == 2


async def test_an_old_flight_that_ends_leaves_the_new_one_listed(make_registry: MakeRegistry) -> None:
    """F7: a flight takes only itself out of the map: who comes after it joins the newer one."""
    store = HeldStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    old = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(1)
    unloading = asyncio.create_task(registry.unload("m"))
    await settle()
    new = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(2)
    store.gates[0].set()
    await old
    assert await unloading
    joined = asyncio.create_task(registry.predict("m", ROWS))
    await settle()
    store.gates[1].set()
    for call in (new, joined):
        assert np.array_equal(await call, MODEL.expected(ROWS))
    assert len(store.gates) == 2


async def test_unload_wins_over_a_pin_that_is_still_loading(make_registry: MakeRegistry) -> None:
    """F10: a pin whose load was unloaded meanwhile holds nothing: what it pinned would be lost to the ledger."""
    store = gated(m=MODEL.ubj)
    registry = await make_registry(store)
    pinning = asyncio.create_task(registry.pin("m"))
    await store.fetched(1)
    unloading = asyncio.create_task(registry.unload("m"))
    await settle()
    store.open("m")
    await pinning
    assert await asyncio.wait_for(unloading, 5)
    assert registry.loaded() == []
    assert not (await registry.load("m")).pinned


# F11: closing


async def test_close_during_a_load_tells_the_callers_so(make_registry: MakeRegistry) -> None:
    """F11: callers of a load that close cuts off get RegistryClosedError, never a bare CancelledError."""
    store = gated(m=MODEL.ubj, n=OTHER.ubj)
    registry = await make_registry(store, load_concurrency=1)
    calls = [asyncio.create_task(registry.predict(name, ROWS)) for name in ("m", "m", "n")]
    await store.fetched(1)
    await registry.close()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [RegistryClosedError] * 3
    assert store.closed
    assert registry.explain("m").startswith("m is cold")
    oracle.check_gone(registry)
    oracle.check_no_tasks_left()


async def test_close_lets_the_calls_in_flight_finish(make_registry: MakeRegistry) -> None:
    """F11: what is being predicted when close is called is answered; new calls are refused at once."""
    registry = await make_registry(gated_open())
    await registry.load("m")
    calls = [asyncio.create_task(registry.predict("m", ROWS)) for _ in range(50)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(registry.close())
    await asyncio.sleep(0)
    with pytest.raises(RegistryClosedError, match="is closed: make a new one"):
        await registry.predict("m", ROWS)
    for answer in await asyncio.gather(*calls):
        assert np.array_equal(answer, MODEL.expected(ROWS))
    await closing
    oracle.check_gone(registry)
    oracle.check_no_tasks_left()


async def test_close_does_not_wait_for_ever(make_registry: MakeRegistry) -> None:
    """F11: calls that do not finish within the drain time get RegistryClosedError, and so do leases from then on."""
    registry = await make_registry(gated_open())
    await registry.load("m")
    worker = psutil.Process(registry._pool.workers[0].pid)
    async with registry.acquire("m") as lease:
        halt(worker.pid)
        calls = [asyncio.create_task(registry.predict("m", ROWS)), asyncio.create_task(lease.predict(ROWS))]
        await asyncio.sleep(0)
        closing = asyncio.create_task(registry.close(drain=0))
        await registry._pool._closing.wait()
        go_on(worker.pid)
        await closing
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in errors] == [RegistryClosedError] * 2
        with pytest.raises(RegistryClosedError):
            await lease.predict(ROWS)
    oracle.check_gone(registry)
    oracle.check_no_tasks_left()


async def test_close_waits_for_leases(make_registry: MakeRegistry) -> None:
    """F11: whoever holds a lease may finish; the last one to end lets close go on."""
    registry = await make_registry(gated_open())
    async with registry.acquire("m"):
        closing = asyncio.create_task(registry.close(drain=60))
        await settle()
        assert not closing.done()
        assert [info.name for info in registry.loaded()] == ["m"]
    await closing
    oracle.check_gone(registry)


async def test_each_resident_model_is_unloaded_once(make_registry: MakeRegistry) -> None:
    """F11: closing twice, at once and again, unloads every model once and closes the store."""
    registry = await make_registry(gated_open("m", "n"))
    unloaded: list[tuple[str, str]] = []
    await registry.load("m")
    await registry.load("n")
    registry.subscribe(lambda event: unloaded.append((event.name, event.cause)))  # type: ignore[union-attr]
    await asyncio.gather(registry.close(), registry.close())
    await registry.close()
    assert sorted(unloaded) == [("m", "close"), ("n", "close")]


def gated_open(*names: str) -> GatedStore:
    store = gated(m=MODEL.ubj, n=OTHER.ubj)
    store.open(*(names or ("m",)))
    return store


# F12: hits


async def test_a_hit_has_sent_its_rows_before_it_first_waits(make_registry: MakeRegistry) -> None:
    """F12: a warm call makes no task and waits for nothing until its frame is written."""
    registry = await make_registry(gated_open())
    await registry.load("m")
    tasks, requests = asyncio.all_tasks(), registry._pool.workers[0].requests
    call = registry.predict("m", ROWS)
    answer = call.send(None)
    assert len(requests.pending) == 1
    assert asyncio.all_tasks() == tasks
    assert np.array_equal(await finished(call, answer), MODEL.expected(ROWS))


async def finished(call: Coroutine[Any, Any, Any], future: Any) -> Any:
    """Go on by hand with a call that waits for ``future``, as its task would."""
    future._asyncio_future_blocking = False
    await asyncio.wait((future,))
    with pytest.raises(StopIteration) as ended:
        call.send(None)
    return ended.value.value


async def test_hits_never_wait_behind_loads(make_registry: MakeRegistry) -> None:
    """F12: with all load slots taken by loads that do not move, warm calls are answered."""
    store = gated_open()
    registry = await make_registry(store, load_concurrency=1)
    await registry.load("m")
    loads = [asyncio.create_task(registry.load(name)) for name in ("n", "absent")]
    await store.fetched(2)
    assert np.array_equal(await registry.predict("m", ROWS, timeout=5), MODEL.expected(ROWS))
    assert not any(load.done() for load in loads)
    for load in loads:
        await is_cancelled(load)
    store.open("n")


# Leases


async def test_a_lease_is_renewed_once_when_its_worker_ends(make_registry: MakeRegistry) -> None:
    """F4: two calls through one lease that find its worker gone end with one lease on the model loaded again."""
    registry = await make_registry(gated_open())
    async with registry.acquire("m") as lease:
        worker = registry._pool.workers[0]
        psutil.Process(worker.pid).kill()
        while lease.model.state != "gone":
            await asyncio.sleep(0)
        answers = await asyncio.gather(lease.predict(ROWS), lease.predict(ROWS))
        assert all(np.array_equal(answer, MODEL.expected(ROWS)) for answer in answers)
        assert registry._state.ledger.leases == 1
    assert registry._state.ledger.leases == 0


async def test_a_lease_that_has_ended_says_so(make_registry: MakeRegistry) -> None:
    """F4: a lease predicts inside its block and not after it, whether or not the model is resident still."""
    registry = await make_registry(gated_open())
    leases: list[Lease] = []
    async with registry.acquire("m") as lease:
        leases.append(lease)
    with pytest.raises(ModelCacheError, match="lease on m has ended"):
        await leases[0].predict(ROWS)


async def test_bytes_that_are_no_model_fail_the_load_alone(make_registry: MakeRegistry) -> None:
    """F6: a failed load leaves nothing reserved, and other names load on."""
    registry = await make_registry(MemoryStore({"bad.ubj": b"{no model}", "m.ubj": MODEL.ubj}))
    bad, good = await asyncio.gather(registry.predict("bad", ROWS), registry.predict("m", ROWS), return_exceptions=True)
    assert isinstance(bad, CorruptArtifactError)
    assert isinstance(good, np.ndarray) and np.array_equal(good, MODEL.expected(ROWS))
    assert registry.stats().bytes_reserved == 0
