"""Rules L1 to L8 as users meet them: what stays, what is evicted, what is refused, and what it all takes for real."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import oracle
import zoo
from conftest import settle
from halting import go_on, halt
from modelcache import (
    BudgetTimeoutError,
    LRUPolicy,
    MemoryStore,
    ModelEvicted,
    ModelLoaded,
    ModelTooLargeError,
    RegistryClosedError,
)
from modelcache.attempt import Attempt
from modelcache.cache.sizes import Bounds
from modelcache.pool.pool import Worker

if TYPE_CHECKING:
    from conftest import MakeRegistry
    from modelcache import Event, ModelRegistry
    from modelcache.pool.lost import Epitaph

ROWS = zoo.rows(2)
FLEET = {f"m{index}": zoo.model(seed=index, trees=20) for index in range(8)}


def fleet_store() -> MemoryStore:
    return MemoryStore({f"{name}.ubj": model.ubj for name, model in FLEET.items()})


async def shrink_to(registry: ModelRegistry, *names: str) -> None:
    """Learn what all models take, and leave a budget that ``names`` fit into together, and no further model."""
    sizes = [(await registry.load(name)).size_bytes for name in FLEET]
    for name in FLEET:
        await registry.unload(name)
    registry.resize(sum(sizes[list(FLEET).index(name)] for name in names) + min(sizes) // 2)


def resident(registry: ModelRegistry) -> list[str]:
    return [info.name for info in registry.loaded()]


async def assert_answers(registry: ModelRegistry, name: str) -> None:
    assert np.array_equal(await registry.predict(name, ROWS), FLEET[name].expected(ROWS))


# Eviction


async def test_the_least_recently_used_makes_room(make_registry: MakeRegistry) -> None:
    """L1, L7: a model that does not fit evicts what the policy ranks last, and comes back when it is asked for."""
    registry = await make_registry(fleet_store(), policy="lru")
    await shrink_to(registry, "m0", "m1", "m2")
    for name in ("m0", "m1", "m2", "m0", "m3"):
        await assert_answers(registry, name)
    assert resident(registry) == ["m2", "m0", "m3"]
    text = registry.explain("m1")
    assert re.match(r"m1 is cold: it was evicted \d+\.\d s ago because m3 needed its bytes\.", text)
    await assert_answers(registry, "m1")
    assert resident(registry) == ["m0", "m3", "m1"]
    stats = registry.stats()
    assert stats.bytes_resident <= stats.budget
    assert stats.evictions == {"unload": 8, "budget": 2}
    assert stats.age_at_eviction.count == 2


async def test_each_eviction_is_told_with_its_cause(make_registry: MakeRegistry) -> None:
    """L7: subscribers hear who left, why, and how many bytes that freed, before who came in its place."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0")
    events: list[Event] = []
    registry.subscribe(events.append)
    await registry.load("m0")
    size = registry.stats().bytes_resident
    await registry.load("m1")
    first, evicted, second = events
    assert isinstance(first, ModelLoaded)
    assert isinstance(second, ModelLoaded)
    assert isinstance(evicted, ModelEvicted)
    assert (evicted.name, evicted.cause, evicted.size_bytes) == ("m0", "budget", size)
    assert evicted.version == first.model.version


async def test_an_eviction_is_counted_once_though_its_worker_ends(make_registry: MakeRegistry) -> None:
    """L5: bytes that a dead worker can no longer acknowledge are free, and the model has left once, not twice."""
    registry = await make_registry(fleet_store())
    await registry.load("m0")
    events: list[Event] = []
    registry.subscribe(events.append)
    worker = psutil.Process(registry._pool.workers[0].pid)
    halt(worker.pid)
    unloading = asyncio.create_task(registry.unload("m0"))
    await settle()
    assert registry.stats().bytes_unloading > 0
    worker.kill()
    assert await unloading
    assert [type(event).__name__ for event in events] == ["ModelEvicted", "WorkerDied"]
    assert registry.stats().evictions == {"unload": 1}
    assert registry.stats().bytes_unloading == 0


async def test_bytes_are_free_only_when_the_worker_says_so(make_registry: MakeRegistry) -> None:
    """L5: what was evicted is charged until its worker has freed it, and nothing is granted on it before."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0")
    await registry.load("m0")
    size = registry.stats().bytes_resident
    worker = psutil.Process(registry._pool.workers[0].pid)
    halt(worker.pid)
    call = asyncio.create_task(registry.predict("m1", ROWS))
    while not registry.stats().bytes_unloading:
        await asyncio.sleep(0)
    await settle()
    stats = registry.stats()
    assert (stats.bytes_resident, stats.bytes_reserved, stats.bytes_unloading) == (0, 0, size)
    go_on(worker.pid)
    assert np.array_equal(await call, FLEET["m1"].expected(ROWS))


async def test_a_policy_that_fails_is_replaced(make_registry: MakeRegistry, caplog: pytest.LogCaptureFixture) -> None:
    """L7: a policy that raises costs a warning and its say, never a call: least-recently-used order takes over."""

    class Broken(LRUPolicy):
        def evict(self) -> None:
            raise RuntimeError("out of ideas")

    registry = await make_registry(fleet_store(), policy=Broken())
    await shrink_to(registry, "m0", "m1")
    for name in ("m0", "m1", "m0", "m2"):
        await assert_answers(registry, name)
    assert resident(registry) == ["m0", "m2"]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert ["least-recently-used order replaces it" in record.getMessage() for record in warnings] == [True]


# Leases and pins


async def test_neither_a_pinned_nor_a_leased_model_is_evicted(make_registry: MakeRegistry) -> None:
    """L4: with one model pinned and one leased, all others share what is left; released, they can go too."""
    registry = await make_registry(fleet_store(), policy="lru")
    await shrink_to(registry, "m0", "m1", "m2")
    await registry.pin("m0")
    async with registry.acquire("m1") as lease:
        for name in ("m2", "m3", "m4", "m2"):
            await assert_answers(registry, name)
            assert {"m0", "m1"} < set(resident(registry))
        assert np.array_equal(await lease.predict(ROWS), FLEET["m1"].expected(ROWS))
    registry.unpin("m0")
    for name in ("m5", "m6", "m7"):
        await registry.load(name)
    assert resident(registry) == ["m5", "m6", "m7"]


async def test_nothing_is_evicted_in_vain(make_registry: MakeRegistry) -> None:
    """L3: while leases leave too little to evict for a load, what is idle stays; the load begins when one ends."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0", "m1", "m2")
    big = zoo.model(trees=50)
    store = registry._store
    assert isinstance(store, MemoryStore)
    store.put("big.ubj", big.ubj)
    await registry.load("m2")
    async with registry.acquire("m0"), registry.acquire("m1"):
        call = asyncio.create_task(registry.predict("big", ROWS))
        while not registry._state.ledger.queue:
            await asyncio.sleep(0)
        await settle()
        assert "m2" in resident(registry), "evicting it would not make room enough"
        await assert_answers(registry, "m2")
    assert np.array_equal(await call, big.expected(ROWS))


async def test_a_name_that_is_not_in_the_store_evicts_nothing(make_registry: MakeRegistry) -> None:
    """L3: bytes are claimed once the store has the artifact, so that a misspelt name costs nobody anything."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0")
    await registry.load("m0")
    report = await registry.preload([f"absent{index}" for index in range(50)])
    assert len(report.failed) == 50
    assert resident(registry) == ["m0"]


async def test_a_model_that_cannot_fit_is_refused(make_registry: MakeRegistry) -> None:
    """L3: a model beyond the whole budget is refused with both figures, and nothing is evicted for it."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0", "m1")
    await registry.load("m0")
    await registry.load("m1")
    store = registry._store
    assert isinstance(store, MemoryStore)
    big = zoo.model(trees=100)
    for file, data in {"raw.ubj": big.ubj, "packed.tar.gz": big.targz, "text.json": big.json}.items():
        store.put(file, data)
        name = file.partition(".")[0]
        with pytest.raises(ModelTooLargeError, match=r"raise memory_budget\. Nothing was evicted for it") as caught:
            await registry.predict(name, ROWS)
        assert caught.value.model == name
        assert caught.value.budget == registry.stats().budget < caught.value.needed
    assert resident(registry) == ["m0", "m1"]
    assert registry.stats().bytes_reserved == 0
    registry.resize("64 MiB")
    assert np.array_equal(await registry.predict("raw", ROWS), big.expected(ROWS))


async def test_a_load_that_waits_in_vain_names_the_holders(make_registry: MakeRegistry) -> None:
    """L4: when leases and pins hold the bytes for longer than load_timeout, the error says whose they are."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0", "m1")
    await registry.pin("m0")
    async with registry.acquire("m1"):
        registry._loader.timeout = 0.05
        with pytest.raises(
            BudgetTimeoutError, match=r"held by leases and pins of m0, m1\. Release or unpin one"
        ) as error:
            await registry.predict("m2", ROWS)
    assert (error.value.model, error.value.holders) == ("m2", ("m0", "m1"))
    assert error.value.needed > 0
    registry._loader.timeout = 60
    await assert_answers(registry, "m2")


async def test_a_caller_whose_time_runs_out_for_want_of_bytes_hears_whose_they_are(make_registry: MakeRegistry) -> None:
    """L4: the caller's own timeout names the holders just as load_timeout does, and leaves the queue as it found it."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0", "m1")
    await registry.pin("m0")
    async with registry.acquire("m1"):
        patient = asyncio.create_task(registry.predict("m2", ROWS))
        while not registry._state.ledger.queue:
            await asyncio.sleep(0)
        with pytest.raises(
            BudgetTimeoutError, match=r"within the timeout: .* held by leases and pins of m0, m1"
        ) as error:
            await registry.predict("m2", ROWS, timeout=0.01)
        assert (error.value.model, error.value.holders) == ("m2", ("m0", "m1"))
    assert np.array_equal(await patient, FLEET["m2"].expected(ROWS))


async def test_a_load_that_pins_leave_no_room_for_disturbs_nobody(make_registry: MakeRegistry) -> None:
    """L2, L3: it waits with neither a slot nor a place in the queue; others come and go; unpin lets it load."""
    registry = await make_registry(fleet_store(), load_concurrency=1)
    await shrink_to(registry, "m0", "m1")
    store = registry._store
    assert isinstance(store, MemoryStore)
    big = zoo.model(trees=35)
    store.put("big.ubj", big.ubj)
    await registry.load("big")  # from now on its size is known
    await registry.pin("m0")
    await registry.load("m1")
    call = asyncio.create_task(registry.predict("big", ROWS))
    while not registry._state.ledger.parked:
        await asyncio.sleep(0)
    assert "m1" in resident(registry), "evicting it would not make room enough"
    assert "big is cold and waiting for bytes now" in registry.explain("big")
    for name in list(FLEET)[1:] * 3:
        await assert_answers(registry, name)
    assert not call.done()
    registry.unpin("m0")
    assert np.array_equal(await call, big.expected(ROWS))


async def test_a_load_that_parks_is_dropped_with_its_last_caller(make_registry: MakeRegistry) -> None:
    """F9, L4: nobody waits any more, by cancellation or by timeout, and nothing is left of it; load_timeout ends it."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0")
    await registry.pin("m0")
    call = asyncio.create_task(registry.predict("m1", ROWS))
    while not registry._state.ledger.parked:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await settle()
    assert not registry._state.ledger.parked
    assert not registry._state.flights.airborne
    registry._loader.timeout = 0.05
    with pytest.raises(BudgetTimeoutError, match=r"within 0.05 s \(load_timeout\): .* held by leases and pins of m0"):
        await registry.predict("m1", ROWS)
    assert not registry._state.ledger.parked


async def test_a_smaller_budget_refuses_a_load_that_parks(make_registry: MakeRegistry) -> None:
    """L3: what waits for an unpin could not load after it."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0")
    await registry.pin("m0")
    call = asyncio.create_task(registry.predict("m1", ROWS))
    while not registry._state.ledger.parked:
        await asyncio.sleep(0)
    registry.resize(100)
    with pytest.raises(ModelTooLargeError):
        await call
    registry.unpin("m0")
    while registry.stats().bytes_unloading:
        await asyncio.sleep(0)


# The budget changes


async def test_resize_works_while_the_registry_does(make_registry: MakeRegistry) -> None:
    """L1: a smaller budget evicts at once what is idle, and what is leased when its lease ends; a larger one grants."""
    registry = await make_registry(fleet_store(), policy="lru")
    sizes = {name: (await registry.load(name)).size_bytes for name in FLEET}
    async with registry.acquire("m0"), registry.acquire("m1"):
        registry.resize(sizes["m1"] + sizes["m0"] // 2)
        assert resident(registry) == ["m0", "m1"]
        oracle.check(registry, shrunk=True)
    while registry.stats().bytes_unloading:
        await asyncio.sleep(0)
    assert resident(registry) == ["m0"]
    assert "because the budget was made smaller" in registry.explain("m1")
    async with registry.acquire("m0"):
        call = asyncio.create_task(registry.predict("m2", ROWS))
        while not registry._state.ledger.queue:
            await asyncio.sleep(0)
        registry.resize("64 MiB")
        assert np.array_equal(await call, FLEET["m2"].expected(ROWS))
    for nonsense in (0, -1, "much", True):
        with pytest.raises(ValueError, match="is no size"):
            registry.resize(nonsense)


async def test_resize_below_what_a_load_waits_for_refuses_it(make_registry: MakeRegistry) -> None:
    """L3: a load that queues for bytes when the budget becomes too small for it is refused, and blocks nobody."""
    registry = await make_registry(fleet_store())
    await shrink_to(registry, "m0", "m1")
    store = registry._store
    assert isinstance(store, MemoryStore)
    store.put("big.ubj", zoo.model(trees=45).ubj)
    async with registry.acquire("m0"):
        call = asyncio.create_task(registry.predict("big", ROWS))
        while not registry._state.ledger.queue:
            await asyncio.sleep(0)
        await shrink_below(registry)
        with pytest.raises(ModelTooLargeError):
            await call


async def shrink_below(registry: ModelRegistry) -> None:
    registry.resize(registry.stats().bytes_resident + 1)


class Outgrowing:
    """A load whose claim has to grow, and waits for the bytes of a model that its stopped worker does not free."""

    def __init__(self, registry: ModelRegistry, name: str, call: asyncio.Task[Any], stopped: int) -> None:
        self.registry = registry
        self.name = name
        self.call = call
        self.stopped = psutil.Process(stopped)
        (self.worker,) = (worker for worker in registry._pool.workers if worker.pid != stopped)

    @classmethod
    async def start(cls, registry: ModelRegistry) -> Outgrowing:
        small, late, *_ = FLEET
        assert isinstance(registry._store, MemoryStore)
        registry._store.put("large.ubj", zoo.model(trees=40).ubj)
        sizes = [(await registry.load(name)).size_bytes for name in ("large", small)]
        await registry.unload("large")
        await registry.unload(small)
        registry.resize(sum(sizes) + sizes[1] // 2)
        # The large one is the first to be evicted, and its worker has more bytes than the one the next load goes to.
        (its_worker,) = (await registry.load("large")).workers
        (other_worker,) = (await registry.load(small)).workers
        assert its_worker != other_worker
        registry._state.history._past.clear()
        registry._state.sizes.bounds = lambda unpacked, suffix: Bounds(0, unpacked // 2)  # type: ignore[method-assign]
        halt(its_worker)
        call = asyncio.create_task(registry.predict(late, ROWS))
        while not registry.stats().bytes_unloading:  # it has loaded, and takes more than was reserved
            await asyncio.sleep(0)
        return cls(registry, late, call, its_worker)


async def test_nothing_lands_in_a_worker_that_has_ended(make_registry: MakeRegistry) -> None:
    """L6, P1: a model whose worker dies while its claim still has to grow is loaded anew, not given out dead."""
    registry = await make_registry(fleet_store(), workers=2, policy="lru")
    load = await Outgrowing.start(registry)
    psutil.Process(load.worker.pid).kill()
    while not registry.stats().worker_restarts:
        await asyncio.sleep(0)
    go_on(load.stopped.pid)
    async with asyncio.timeout(20):
        assert np.array_equal(await load.call, FLEET[load.name].expected(ROWS))


async def test_a_claim_that_grows_as_its_load_is_cancelled_is_given_back_whole(make_registry: MakeRegistry) -> None:
    """L5, L8: between the grant and the cancellation in the same tick, the load has not heard of the grant."""
    registry = await make_registry(fleet_store(), workers=2, policy="lru")
    load = await Outgrowing.start(registry)
    (flight,) = registry._state.flights.airborne
    reserved = registry.stats().bytes_reserved
    registry.resize("64 MiB")
    assert registry.stats().bytes_reserved > reserved, "the growth has been granted"
    flight.task.cancel()
    with pytest.raises(RegistryClosedError):
        await load.call
    go_on(load.stopped.pid)
    for name in FLEET:
        await registry.unload(name)
    while registry.stats().bytes_unloading:
        await asyncio.sleep(0)
    assert [worker.charged for worker in registry._pool.workers] == [0, 0]
    assert registry._state.ledger.charged == 0


async def test_bytes_in_a_dying_worker_are_charged_until_it_has_ended(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L5: a load notices that the lanes are closed before the process has been seen to end."""
    registry = await make_registry(fleet_store(), workers=2)
    buried = asyncio.Event()
    bury = Worker.bury

    async def bury_late(worker: Worker, *, patient: bool = False) -> Epitaph:
        await buried.wait()
        return await bury(worker, patient=patient)

    monkeypatch.setattr(Worker, "bury", bury_late)
    land = Attempt._grow

    async def die_and_grow(attempt: Attempt, bounds: Bounds) -> None:
        if attempt._loading is not None and attempt._loading.result is not None and not died:
            assert attempt._worker is not None
            died.append(attempt._worker)
            attempt._worker.process.kill()
            await attempt._worker.ended
        await land(attempt, bounds)

    died: list[Worker] = []
    monkeypatch.setattr(Attempt, "_grow", die_and_grow)
    assert np.array_equal(await registry.predict("m0", ROWS), FLEET["m0"].expected(ROWS))
    assert registry.stats().bytes_unloading > 0
    buried.set()
    while registry.stats().bytes_unloading:
        await asyncio.sleep(0)


# For real


async def test_three_hundred_models_cycle_through_a_budget_for_thirty(make_registry: MakeRegistry) -> None:
    """L1: after each call, what the ledger counts is within the budget, to the byte, and is the models' sizes' sum.

    After every ten, when nothing is loading, the workers' heap, without the arenas of their main threads, has grown by
    0.9 to 1.05 of what the ledger counts, and their resident set by 1.25 of the budget and what two parsers take, at
    most; that of the parsers is given back when there is nothing more to load. When all models have been unloaded, a
    quarter of the budget at most is left.
    """
    kinds = [zoo.model(trees=1000, seed=seed) for seed in range(3)]
    models = {f"m{index:03}": kinds[index % len(kinds)] for index in range(300)}
    store = MemoryStore({f"{name}.ubj": model.ubj for name, model in models.items()})
    registry = await make_registry(store, workers=2, memory_budget="512 MiB")
    largest = max([(await registry.load(f"m{index:03}")).size_bytes for index in range(len(kinds))])
    for index in range(len(kinds)):
        await registry.unload(f"m{index:03}")
    assert largest > 300_000
    budget = 30 * largest
    registry.resize(budget)
    heap, rss = await measured(registry), resident_set(registry)
    expected = {id(model): model.expected(ROWS) for model in kinds}
    highest = 0
    for start in range(0, len(models), 10):
        names = list(models)[start : start + 10]
        for name, answer in zip(names, await asyncio.gather(*(registry.predict(n, ROWS) for n in names)), strict=True):
            assert np.array_equal(answer, expected[id(models[name])])
            stats = registry.stats()
            assert stats.bytes_resident + stats.bytes_reserved + stats.bytes_unloading <= budget
            assert stats.bytes_resident == sum(info.size_bytes for info in registry.loaded())
        taken = (await measured(registry) - heap) / registry.stats().bytes_resident
        assert 0.9 <= taken <= 1.05, "the ledger counts what the heap has"
        highest = max(highest, resident_set(registry) - rss)
    assert len(registry.loaded()) >= 28
    assert highest <= 1.25 * budget + 2 * 4 * len(kinds[0].ubj)
    while resident_set(registry) - rss > 1.25 * budget:
        await asyncio.sleep(0)
    assert registry.stats().evictions["budget"] == len(models) - len(registry.loaded())
    registry.resize(1)
    while registry.stats().bytes_unloading:
        await asyncio.sleep(0)
    while resident_set(registry) - rss > 0.25 * budget:  # what is freed goes back to the system
        await asyncio.sleep(0)


async def measured(registry: ModelRegistry) -> int:
    return sum([await worker.measure() for worker in registry._pool.workers])


def resident_set(registry: ModelRegistry) -> int:
    return sum(psutil.Process(worker.pid).memory_info().rss for worker in registry._pool.workers)
