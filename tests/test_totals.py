"""What is counted over the lives of models and workers, for those who watch a registry from outside."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import psutil
import pytest

import zoo
from conftest import settle
from modelcache import CorruptArtifactError, MemoryStore, ModelNotFoundError, UnsupportedArtifactError
from modelcache.pool.lost import Epitaph

if TYPE_CHECKING:
    from conftest import MakeRegistry
    from modelcache import ModelRegistry

ROW = zoo.rows(1)
OLD, NEW = zoo.model(seed=0), zoo.model(seed=1)


async def call(registry: ModelRegistry, name: str, times: int) -> None:
    for _ in range(times):
        await registry.predict(name, ROW)


def hits(registry: ModelRegistry, name: str) -> tuple[int, int]:
    [model] = [model for model in registry.loaded() if model.name == name]
    return model.hits, model.total_hits


async def test_total_hits_never_fall(make_registry: MakeRegistry) -> None:
    """A model that was evicted and comes back, or is replaced, goes on from the hits its name has had."""
    store = MemoryStore({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await call(registry, "m", 3)
    assert hits(registry, "m") == (2, 2)
    await registry.unload("m")
    await call(registry, "m", 2)
    assert hits(registry, "m") == (1, 3)
    async with registry.acquire("m"):  # a hit, that holds the old version
        store.put("m.ubj", NEW.ubj)
        await registry.refresh("m")
        assert hits(registry, "m") == (0, 4)
        unloading = asyncio.create_task(registry.unload("m"))  # which waits for the lease on the old one
        await settle()
        await call(registry, "m", 3)
        assert hits(registry, "m") == (2, 6)
    await unloading
    await registry.unload("m")
    assert (await registry.load("m")).total_hits == 6


async def test_a_failed_load_forgets_no_hits(make_registry: MakeRegistry) -> None:
    """Nor does one that finds nothing."""
    store = MemoryStore({"m.ubj": OLD.ubj})
    registry = await make_registry(store, failure_ttl=0)
    await call(registry, "m", 3)
    await registry.unload("m")
    store.put("m.ubj", b"{broken")
    with pytest.raises(CorruptArtifactError):
        await registry.load("m")
    store.put("m.ubj", NEW.ubj)
    assert (await registry.load("m")).total_hits == 2


async def test_the_most_used_come_first(make_registry: MakeRegistry) -> None:
    """Those of the most hits, earlier stays included, and no more than asked for."""
    registry = await make_registry(MemoryStore(zoo.fleet(4)))
    for name, times in [("m000", 2), ("m001", 5), ("m002", 1), ("m003", 4)]:
        await call(registry, name, times)
    await registry.unload("m001")
    await registry.load("m001")
    found = {count: [model.name for model in registry.most_used(count)] for count in (0, 1, 3, 9)}
    assert found == {0: [], 1: ["m001"], 3: ["m001", "m003", "m000"], 9: ["m001", "m003", "m000", "m002"]}


async def test_failures_are_counted_by_error_and_deaths_by_their_cause(make_registry: MakeRegistry) -> None:
    """What an alert has to tell apart; together they are all failures, and all deaths."""
    registry = await make_registry(MemoryStore({"zip.tar.gz": b"PK\3\4" + bytes(64)}), failure_ttl=0)
    for _ in range(2):
        with pytest.raises(ModelNotFoundError):
            await registry.load("absent")
    with pytest.raises(UnsupportedArtifactError):
        await registry.load("zip")
    psutil.Process(registry.stats().workers[0].pid).kill()
    while not registry.stats().worker_restarts:
        await asyncio.sleep(0)
    stats = registry.stats()
    assert stats.load_failures_by_error == {"ModelNotFoundError": 2, "UnsupportedArtifactError": 1}
    assert stats.load_failures == 3
    assert stats.worker_deaths == {"SIGKILL": 1}
    assert [worker.index for worker in stats.workers] == [0]


@pytest.mark.parametrize(
    ("exit_code", "how"),
    [(-11, "SIGSEGV"), (-40, "signal 40"), (3, "exit code 3"), (0, "exit code 0"), (None, "unknown")],
)
def test_what_ended_a_worker_has_a_short_name(exit_code: int | None, how: str) -> None:
    """Few values, so that they can be labels."""
    assert Epitaph(1, exit_code, "").how == how


async def test_the_registry_says_how_many_models_there_are_and_load(make_registry: MakeRegistry) -> None:
    """Without a look at each of them."""
    registry = await make_registry(MemoryStore(zoo.fleet(3)))
    await registry.preload(["m000", "m001"])
    load = asyncio.create_task(registry.load("m002"))
    await asyncio.sleep(0)
    assert (registry.stats().models, registry.stats().loading) == (2, 1)
    await load
    assert (registry.stats().models, registry.stats().loading) == (3, 0)
