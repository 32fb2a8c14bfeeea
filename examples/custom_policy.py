"""An eviction policy of your own: models of tenants who pay stay longer than those of tenants who do not."""

import asyncio

import numpy as np
import xgboost as xgb

from modelcache import Evictable, MemoryStore, ModelRegistry
from modelcache.testing import check_policy


class FreeTierFirst:
    """Evicts models under ``free/`` before all others; of the same tier, the least recently used."""

    def __init__(self) -> None:
        self._oldest_first: dict[object, Evictable] = {}

    def insert(self, entry: Evictable) -> None:
        self._oldest_first.pop(entry.key, None)
        self._oldest_first[entry.key] = entry

    def hit(self, entry: Evictable) -> None:
        if self._oldest_first.get(entry.key) is entry:
            self.insert(entry)

    def remove(self, entry: Evictable) -> None:
        if self._oldest_first.get(entry.key) is entry:  # and not a newer version under the same key
            del self._oldest_first[entry.key]

    def evict(self) -> Evictable | None:
        candidates = [entry for entry in self._oldest_first.values() if not entry.pins]
        victim = min(candidates, key=lambda entry: not str(entry.key).startswith("free/"), default=None)
        if victim is not None:
            self.remove(victim)
        return victim


check_policy(FreeTierFirst)
print("FreeTierFirst keeps the contract of a policy")


def train() -> bytes:
    rows = np.random.default_rng(0).normal(size=(200, 3))
    booster = xgb.train({"max_depth": 3, "nthread": 1}, xgb.DMatrix(rows, rows.sum(axis=1)), num_boost_round=20)
    return bytes(booster.save_raw("ubj"))


async def serve() -> None:
    model = train()
    store = MemoryStore({f"{tier}/m{number}.ubj": model for tier in ("paid", "free") for number in range(4)})
    async with ModelRegistry(store, policy=FreeTierFirst, workers=1) as registry:
        await registry.preload([name async for name in registry.names("paid/")])
        await registry.preload([name async for name in registry.names("free/")])
        registry.resize(registry.stats().bytes_resident * 3 // 5)
        print("stay:", ", ".join(sorted(model.name for model in registry.loaded())))


asyncio.run(serve())
