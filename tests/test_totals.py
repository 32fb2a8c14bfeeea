"""What is counted over the lives of models and workers, for those who watch a registry from outside."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import zoo
from conftest import settle
from modelcache import CorruptArtifactError, MemoryStore

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
