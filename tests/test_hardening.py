"""Users, stores, predictors and signals that do what one would not expect."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

import plugin
import zoo
from modelcache import (
    Artifact,
    CorruptArtifactError,
    InvalidModelNameError,
    MemoryStore,
    ModelCacheError,
    ModelRegistry,
    ModelTooLargeError,
    StoreUnavailableError,
)
from modelcache.testing import GatedStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeRegistry
    from modelcache import NotModified


async def test_a_signal_without_a_name_ends_a_worker_like_any_other(make_registry: MakeRegistry) -> None:
    """P1: a real-time signal has only a number; the call is answered by the next worker."""
    model = zoo.model()
    registry = await make_registry(MemoryStore({"m.ubj": model.ubj}))
    await registry.load("m")
    os.kill(registry._pool.workers[0].pid, 40)
    rows = zoo.rows(2)
    assert np.array_equal(await registry.predict("m", rows), model.expected(rows))


async def test_a_predictor_of_another_library_is_charged_what_it_takes(make_registry: MakeRegistry) -> None:
    """L1: the measured bytes count, however small the artifact is beside them."""
    store = MemoryStore({"m.ubj": plugin.artifact()})
    registry = await make_registry(store, predictor="plugin:Heavy", memory_budget="64 MiB")
    assert (await registry.load("m")).size_bytes > plugin.HEAVY_BYTES
    small = await make_registry(store, predictor="plugin:Heavy", memory_budget="1 MiB")
    with pytest.raises(ModelTooLargeError):
        await small.load("m")


async def test_unload_lets_a_repaired_model_in_at_once(make_registry: MakeRegistry) -> None:
    """F8: who unloads a model that failed has reason to believe that it has changed."""
    store = MemoryStore({"m.ubj": b"{broken"})
    registry = await make_registry(store, failure_ttl=30)
    with pytest.raises(CorruptArtifactError):
        await registry.load("m")
    store.put("m.ubj", zoo.model().ubj)
    assert not await registry.unload("m")
    assert (await registry.load("m")).n_features == zoo.N


async def test_a_suffix_within_a_name_is_part_of_it(make_registry: MakeRegistry) -> None:
    """A file whose name ends in two suffixes is another model than the one that its stem names, resident or not."""
    plain, doubled, rows = zoo.model(seed=1), zoo.model(seed=2), zoo.rows(2)
    registry = await make_registry(MemoryStore({"a.ubj": plain.ubj, "a.ubj.ubj": doubled.ubj}))
    for _ in range(2):
        for name, model in {"a.ubj": plain, "a.ubj.ubj": doubled, "a": plain}.items():
            assert np.array_equal(await registry.predict(name, rows), model.expected(rows))
    assert await registry.unload("a.ubj.ubj")
    assert "a.ubj" in [info.name for info in registry.loaded()]


async def test_unload_takes_both_spellings(make_registry: MakeRegistry) -> None:
    """A model that was asked for with and without its suffix is gone under both names."""
    store = GatedStore({"m.tar.gz": zoo.model(seed=1).targz})
    registry = await make_registry(store)
    rows = zoo.rows(1)
    calls = [asyncio.create_task(registry.predict(name, rows)) for name in ("m", "m.tar.gz")]
    await store.fetched(2)
    store.open("m", "m.tar.gz")
    await asyncio.gather(*calls)
    assert await registry.unload("m")
    store.put("m.tar.gz", zoo.model(seed=2).targz)
    for name in ("m", "m.tar.gz"):
        assert np.array_equal(await registry.predict(name, rows), zoo.model(seed=2).expected(rows))


async def test_a_cancelled_start_leaves_no_workers(no_processes_left: None) -> None:
    """F11: `async with` that is cancelled while it starts has nobody else to close it."""
    for ticks in (1, 5, 50):
        task = asyncio.create_task(ModelRegistry(MemoryStore(), workers=1).__aenter__())
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_bad_name_starts_nothing() -> None:
    """A name is refused before any process is started."""
    registry = ModelRegistry(MemoryStore())
    before = len(psutil.Process().children())
    with pytest.raises(InvalidModelNameError):
        await registry.predict("../x", zoo.rows(1))
    assert len(psutil.Process().children()) == before


async def test_an_ended_lease_loads_nothing(make_registry: MakeRegistry) -> None:
    """A lease is refused after its block before it is looked whether its model is still there."""
    store = GatedStore({"m.ubj": zoo.model().ubj})
    store.open("m")
    registry = await make_registry(store)
    async with registry.acquire("m") as lease:
        pass
    await registry.unload("m")
    with pytest.raises(ModelCacheError, match="has ended"):
        await lease.predict(zoo.rows(1))
    assert store.fetches == ["m"]


class Endless(MemoryStore):
    """Announces ten bytes and delivers without end."""

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return it."""
        return Artifact(version="1", size=10, suffix=".tar.gz", chunks=self._chunks())

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            yield b"{" * 8


async def test_more_bytes_than_announced_fail_the_load(make_registry: MakeRegistry) -> None:
    """A4: a delivery of another size than announced is none, and its end is not waited for."""
    registry = await make_registry(Endless())
    with pytest.raises(StoreUnavailableError, match="more than the 10 bytes"):
        await registry.load("m")


async def test_a_subscriber_cannot_break_a_load(make_registry: MakeRegistry) -> None:
    """What a subscriber raises, a cancellation too, is logged and harms nobody."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))

    def cancelled(_event: object) -> None:
        raise asyncio.CancelledError

    registry.subscribe(cancelled)
    for _ in range(2):
        assert len(await registry.predict("m", zoo.rows(3))) == 3


WRONG: list[dict[str, object]] = [
    {"workers": 1.5},
    {"workers": True},
    {"workers": "2"},
    {"queue_limit": 0},
    {"load_timeout": float("nan")},
]


@pytest.mark.parametrize("options", WRONG)
def test_options_of_the_wrong_kind_are_refused(options: dict[str, object]) -> None:
    """An option that cannot work is refused when it is given, with its name."""
    with pytest.raises(ValueError, match=next(iter(options))):
        ModelRegistry(MemoryStore(), **options)  # type: ignore[arg-type]


async def test_a_preload_needs_a_positive_concurrency(make_registry: MakeRegistry) -> None:
    """Nothing is not done and reported as done."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    with pytest.raises(ValueError, match="concurrency"):
        await registry.preload(["m"], concurrency=0)


async def test_a_resident_group_does_not_wait_behind_one_that_loads(make_registry: MakeRegistry) -> None:
    """F12: hits never wait behind loads, those of a group neither."""
    store = GatedStore({f"{name}.ubj": zoo.model().ubj for name in ("here", "there")})
    store.open("here")
    registry = await make_registry(store)
    await registry.load("here")
    loading = registry.acquire_many(["here", "there"])
    entering = asyncio.create_task(loading.__aenter__())
    await store.fetched(2)
    async with registry.acquire_many(["here"]) as leases:
        assert [lease.name for lease in leases] == ["here"]
    store.open("there")
    await entering
    await loading.__aexit__(None, None, None)
