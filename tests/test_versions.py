"""Rules S3, F8, F10 and A4 of versions: a changed artifact takes the place of the resident one, and nobody waits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import oracle
import zoo
from conftest import settle
from loops import LOOPS
from modelcache import (
    Artifact,
    CorruptArtifactError,
    LoadFailed,
    MemoryStore,
    ModelCacheError,
    ModelEvicted,
    ModelLoaded,
    ModelNotFoundError,
    ModelRefreshed,
    ModelRegistry,
    NotModified,
    RegistryClosedError,
    StoreUnavailableError,
)
from modelcache.testing import FakeClock, GatedStore
from upright import Upright

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import MakeRegistry
    from modelcache import Event
    from zoo import Model

ROWS = zoo.rows(2)
VERSIONS = [zoo.model(seed=seed) for seed in range(4)]
OLD, NEW, NEWER, NEWEST = VERSIONS


@pytest.fixture(params=["asyncio", "eager"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Loads that begin in the very step that asks for them have to know by then what they are for."""
    return "asyncio", LOOPS[request.param]


class Forgetful(Upright):
    """A store that delivers again what was asked about."""

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        return await super().fetch(name)


async def answers(registry: ModelRegistry, model: Model, name: str = "m") -> bool:
    return np.array_equal(await registry.predict(name, ROWS), model.expected(ROWS))


def told(registry: ModelRegistry) -> list[Event]:
    events: list[Event] = []
    registry.subscribe(events.append)
    return events


async def freed(registry: ModelRegistry) -> None:
    while registry.stats().bytes_unloading:
        await asyncio.sleep(0)


async def kept(registry: ModelRegistry) -> None:
    """Wait until all loads have ended, those included that nobody waits for any more."""
    while registry._loader.tasks:
        await asyncio.sleep(0)


async def revalidated(registry: ModelRegistry) -> None:
    while registry._state.flights.airborne:
        await asyncio.sleep(0)


# The swap


async def test_a_new_version_takes_the_place_of_the_old_one(make_registry: MakeRegistry) -> None:
    """S3: refresh loads what the store has now, swaps it in, and frees what was there."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    first = await registry.load("m")
    events = told(registry)
    store.put("m.ubj", NEW.ubj)
    assert await answers(registry, OLD)
    second = await registry.refresh("m")
    assert await answers(registry, NEW)
    assert second.version != first.version
    assert registry.loaded()[0].version == second.version
    await freed(registry)
    assert registry.stats().bytes_resident == second.size_bytes
    assert registry.stats().refreshes == 1
    refreshed, evicted = events
    assert isinstance(refreshed, ModelRefreshed)
    assert (refreshed.model.version, refreshed.replaced) == (second.version, first.version)
    assert isinstance(evicted, ModelEvicted)
    assert (evicted.version, evicted.cause) == (first.version, "replaced")
    assert f"in the place of {first.version}" in registry.explain("m")


@pytest.mark.parametrize("kind", [Upright, Forgetful])
async def test_the_same_version_stays(make_registry: MakeRegistry, kind: type[Upright]) -> None:
    """Revalidation of what has not changed loads nothing, whether the store says so or delivers it again."""
    store, clock = kind({"m.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, clock=clock)
    first = await registry.load("m")
    clock.advance(7)
    assert "the store last had it 7.0 s ago, and is not asked again before refresh()" in registry.explain("m")
    assert (await registry.refresh("m")).loaded_at == first.loaded_at
    assert registry.stats().loads == 1
    assert registry.stats().refreshes == 0
    assert "the store last had it 0.0 s ago" in registry.explain("m")
    assert store.delivered == (1 if kind is Upright else 2)


async def test_calls_go_on_with_the_old_version_until_the_swap(make_registry: MakeRegistry) -> None:
    """S3: neither asking the store nor loading the new version holds up a call."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.load("m")
    store.shut("m")
    store.put("m.ubj", NEW.ubj)
    refreshing = asyncio.create_task(registry.refresh("m"))
    await store.fetched(2)
    misses = registry.stats().requests - registry.stats().hits
    for _ in range(20):
        assert await answers(registry, OLD)
    assert "is being asked again now" in registry.explain("m")
    assert registry.stats().requests - registry.stats().hits == misses
    store.open("m")
    await refreshing
    assert await answers(registry, NEW)


async def test_a_lease_keeps_the_version_it_has(make_registry: MakeRegistry) -> None:
    """L4: the old version answers those who hold it, and stays charged until the last of them lets go."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    async with registry.acquire("m") as lease:
        store.put("m.ubj", NEW.ubj)
        new = await registry.refresh("m")
        assert np.array_equal(await lease.predict(ROWS), OLD.expected(ROWS))
        assert await answers(registry, NEW)
        assert registry.stats().bytes_resident == lease.model.size_bytes + new.size_bytes
        assert lease.model.state == "detached"
    await freed(registry)
    assert registry.stats().bytes_resident == new.size_bytes


async def test_a_pinned_model_stays_pinned(make_registry: MakeRegistry) -> None:
    """The pin is on the name: the new version has it, and unpin ends it."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.pin("m")
    store.put("m.ubj", NEW.ubj)
    assert (await registry.refresh("m")).pinned
    registry.unpin("m")
    assert not registry.loaded()[0].pinned
    oracle.check(registry)


@pytest.mark.parametrize("name", ["m", "m.ubj"])
async def test_a_model_is_refreshed_by_either_spelling(make_registry: MakeRegistry, name: str) -> None:
    """The name with its suffix means the model that is resident without it."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.load("m")
    store.put("m.ubj", NEW.ubj)
    assert (await registry.refresh(name)).name == "m"
    assert await answers(registry, NEW)
    assert len(registry.loaded()) == 1


async def test_a_model_that_is_not_resident_is_loaded(make_registry: MakeRegistry) -> None:
    """refresh of a cold name loads it; it is no request, and so neither a hit nor a miss."""
    registry = await make_registry(Upright({"m.ubj": OLD.ubj}))
    assert (await registry.refresh("m")).state == "ready"
    assert registry.stats().requests == 0
    assert await answers(registry, OLD)


async def test_without_retain_nothing_stays(make_registry: MakeRegistry) -> None:
    """retain=False holds for refreshed models as for all others."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, retain=False)
    async with registry.acquire("m"):
        store.put("m.ubj", NEW.ubj)
        await registry.refresh("m")
    assert registry.loaded() == []
    await registry.refresh("m")
    assert registry.loaded() == []


async def test_a_store_that_is_asked_about_no_version_may_not_say_that_it_is_the_same(
    make_registry: MakeRegistry,
) -> None:
    """An answer that makes no sense is the store's error."""

    class Odd(MemoryStore):
        async def fetch(self, name: str, *, if_version: str | None = None) -> Any:
            return NotModified("1") if if_version is None else None

    registry = await make_registry(Odd({"m.ubj": OLD.ubj}))
    with pytest.raises(ModelCacheError, match="without if_version"):
        await registry.refresh("m")


# Without retain: what is refreshed leaves with its last call, at any moment
#
# 1. It leaves while the store is being asked. The answer is about nothing that is there, and must not be taken for a
#    lease on what is being unloaded: it is loaded again, for the caller of refresh.
# 2. It leaves in the step in which the answer comes, before that is looked at.
# 3. A call comes after it has left, and joins the flight.
# 4. The caller of refresh and a call hold it together, and let go of it in either order.
# 5. The caller of refresh is gone by then, too.


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("kind", [Upright, Forgetful])
async def test_without_retain_a_model_may_leave_while_it_is_refreshed(
    make_registry: MakeRegistry, kind: type[Upright], answered: bool, changed: bool
) -> None:
    """Interleavings 1 and 2: refresh tells what the store has, from a load of its own, and nothing stays."""
    store = kind({"m.ubj": OLD.ubj})
    registry = await make_registry(store, retain=False)
    async with registry.acquire("m"):
        store.shut("m")
        refreshing = asyncio.create_task(registry.refresh("m"))
        await store.fetched(2)
        if changed:
            store.put("m.ubj", NEW.ubj)
        if answered:
            store.open("m")
    assert registry.loaded() == []
    store.open("m")
    info = await refreshing
    assert info.state == "ready"
    assert info.artifact_bytes == len((NEW if changed else OLD).ubj)
    assert registry.loaded() == []
    assert registry.stats().loads == 2
    await freed(registry)
    assert registry.stats().bytes_resident == 0


@pytest.mark.parametrize("changed", [False, True])
async def test_without_retain_a_call_joins_a_refresh_whose_model_has_left(
    make_registry: MakeRegistry, changed: bool
) -> None:
    """Interleaving 3, F1: one load serves both, and the model leaves with the later of them."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, retain=False)
    async with registry.acquire("m"):
        store.shut("m")
        refreshing = asyncio.create_task(registry.refresh("m"))
        await store.fetched(2)
    call = asyncio.create_task(registry.predict("m", ROWS))
    await settle()
    assert registry.stats().joins == 1
    if changed:
        store.put("m.ubj", NEW.ubj)
    store.open("m")
    assert np.array_equal(await call, (NEW if changed else OLD).expected(ROWS))
    await refreshing
    assert registry.stats().loads == 2
    assert registry.loaded() == []


@pytest.mark.parametrize("call_ends_first", [False, True])
@pytest.mark.parametrize("changed", [False, True])
async def test_without_retain_a_model_leaves_with_the_last_of_call_and_refresh(
    make_registry: MakeRegistry, changed: bool, call_ends_first: bool
) -> None:
    """Interleaving 4, L4: neither takes from the other what it holds, whether or not there is a new version."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, retain=False)
    async with registry.acquire("m") as lease:
        store.shut("m")
        refreshing = registry._leasing.refresh("m")  # gives the lease that the public method holds for a moment
        asking = asyncio.create_task(refreshing)
        await store.fetched(2)
        if changed:
            store.put("m.ubj", NEW.ubj)
        store.open("m")
        held = await asking
        assert (held is lease.entry) is not changed
        if not call_ends_first:
            registry._leasing.release(held)
        assert np.array_equal(await lease.predict(ROWS), OLD.expected(ROWS))
        assert len(registry.loaded()) == (0 if changed and not call_ends_first else 1)
    if call_ends_first:
        assert [model.version for model in registry.loaded()] == [held.value.version]
        registry._leasing.release(held)
    assert registry.loaded() == []
    await freed(registry)
    assert registry.stats().bytes_resident == 0
    assert registry.stats().loads == (2 if changed else 1)


@pytest.mark.parametrize("changed", [False, True])
async def test_without_retain_a_refresh_that_nobody_waits_for_leaves_its_model_to_the_next_call(
    make_registry: MakeRegistry, changed: bool
) -> None:
    """Interleaving 5, F9: the load that has begun completes; the model stays for one call and leaves with that."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, retain=False)
    async with registry.acquire("m"):
        store.shut("m")
        refreshing = asyncio.create_task(registry.refresh("m"))
        await store.fetched(2)
        refreshing.cancel()
        await asyncio.wait((refreshing,))
    if changed:
        store.put("m.ubj", NEW.ubj)
    store.open("m")
    await kept(registry)
    assert len(registry.loaded()) == 1
    assert await answers(registry, NEW if changed else OLD)
    assert registry.loaded() == []
    assert registry.stats().loads == 2


# What cannot be renewed


async def test_a_broken_new_version_leaves_the_old_one(make_registry: MakeRegistry) -> None:
    """S2, S3: the error says what is wrong, the old version serves on, and explain() tells why it does."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    first = await registry.load("m")
    events = told(registry)
    store.put("m.ubj", OLD.ubj[:500])
    with pytest.raises(CorruptArtifactError):
        await registry.refresh("m")
    assert await answers(registry, OLD)
    assert registry.loaded()[0].version == first.version
    assert "it serves on since it could not be renewed: CorruptArtifactError" in registry.explain("m")
    (failed,) = events
    assert isinstance(failed, LoadFailed)
    await registry.unload("m")
    store.put("m.ubj", NEW.ubj)
    assert await answers(registry, NEW), "a failure to renew is no failure of later loads"


async def test_a_store_that_is_down_leaves_the_old_version(make_registry: MakeRegistry) -> None:
    """S2: revalidation that fails changes nothing, and the next one may succeed."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.load("m")
    store.error = StoreUnavailableError("The store is down.")
    with pytest.raises(StoreUnavailableError):
        await registry.refresh("m")
    assert await answers(registry, OLD)
    store.error = None
    store.put("m.ubj", NEW.ubj)
    await registry.refresh("m")
    assert await answers(registry, NEW)
    assert "could not be renewed" not in registry.explain("m")


async def test_a_deleted_artifact_serves_until_refresh_says_that_it_is_gone(make_registry: MakeRegistry) -> None:
    """A resident copy serves on; refresh unloads it and raises ModelNotFoundError, as do the calls after it."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.load("m")
    events = told(registry)
    store.remove("m.ubj")
    assert await answers(registry, OLD)
    with pytest.raises(ModelNotFoundError):
        await registry.refresh("m")
    assert registry.loaded() == []
    assert [event.cause for event in events if isinstance(event, ModelEvicted)] == ["deleted"]
    with pytest.raises(ModelNotFoundError):
        await registry.predict("m", ROWS)
    await registry.unload("m")
    await freed(registry)
    assert registry.stats().bytes_resident == 0
    assert "ModelNotFoundError" in registry.explain("m")


async def test_a_refresh_that_is_cancelled_completes(make_registry: MakeRegistry) -> None:
    """F3, F9: cancelling the caller touches only the caller."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.load("m")
    store.shut("m")
    store.put("m.ubj", NEW.ubj)
    refreshing = asyncio.create_task(registry.refresh("m"))
    await store.fetched(2)
    refreshing.cancel()
    await asyncio.wait((refreshing,))
    assert refreshing.cancelled()
    store.open("m")
    await revalidated(registry)
    assert await answers(registry, NEW)


# Beside other loads


async def test_refresh_during_a_load_starts_a_new_one(make_registry: MakeRegistry) -> None:
    """F10: those who wait get the version their load had begun with, and it never covers the newer one."""
    store = GatedStore({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    call = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(1)
    refreshing = asyncio.create_task(registry.refresh("m"))
    await store.fetched(2)
    later = asyncio.create_task(registry.predict("m", ROWS))
    await settle()
    assert len(store.fetches) == 2, "a later caller joins the newer load"
    store.put("m.ubj", NEW.ubj)
    store.open("m")
    await refreshing
    await asyncio.wait((call, later))
    assert np.array_equal(later.result(), NEW.expected(ROWS))
    assert await answers(registry, NEW)
    await freed(registry)
    assert len(registry.loaded()) == 1


async def test_refreshes_at_once_ask_once(make_registry: MakeRegistry) -> None:
    """F1: what the store has not been asked yet is asked for all; an answer may not be older than the call."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.load("m")
    store.put("m.ubj", NEW.ubj)
    store.shut("m")
    together = [asyncio.create_task(registry.refresh("m")) for _ in range(10)]
    await store.fetched(2)
    later = [asyncio.create_task(registry.refresh("m")) for _ in range(10)]
    await settle()
    assert len(store.fetches) == 2
    store.open("m")  # to the second fetch, and not yet to the third
    store.shut("m")
    await store.fetched(3)
    await settle()
    store.open("m")
    infos = await asyncio.gather(*together, *later)
    assert len(store.fetches) == 3
    assert {info.version for info in infos} == {registry.loaded()[0].version}
    assert registry.stats().loads == 2


async def test_refresh_clears_the_memory_of_a_failure(make_registry: MakeRegistry) -> None:
    """F8: after a failed load, refresh asks the store again at once."""
    store = Upright({"m.ubj": OLD.ubj[:500]})
    registry = await make_registry(store, failure_ttl=30, clock=FakeClock())
    with pytest.raises(CorruptArtifactError):
        await registry.predict("m", ROWS)
    store.put("m.ubj", NEW.ubj)
    with pytest.raises(CorruptArtifactError):
        await registry.predict("m", ROWS)
    await registry.refresh("m")
    assert await answers(registry, NEW)


@pytest.mark.parametrize("changed", [False, True])
async def test_unload_during_a_refresh(make_registry: MakeRegistry, changed: bool) -> None:
    """F10: the caller of refresh hears of the version the store has, and nothing of it stays."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.load("m")
    store.shut("m")
    refreshing = asyncio.create_task(registry.refresh("m"))
    await store.fetched(2)
    unloading = asyncio.create_task(registry.unload("m"))
    await settle()
    if changed:
        store.put("m.ubj", NEW.ubj)
    store.open("m")
    assert (await refreshing).artifact_bytes == len((NEW if changed else OLD).ubj)
    assert await unloading
    assert registry.loaded() == []
    assert registry.stats().bytes_resident == 0


async def test_a_worker_that_dies_during_a_refresh(make_registry: MakeRegistry) -> None:
    """P1: the version to be renewed is gone; the refresh loads what the store has, and calls join it."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    pid = (await registry.load("m")).workers[0]
    store.shut("m")
    refreshing = asyncio.create_task(registry.refresh("m"))
    await store.fetched(2)
    psutil.Process(pid).kill()
    while not registry.stats().worker_restarts:
        await asyncio.sleep(0)
    call = asyncio.create_task(registry.predict("m", ROWS))
    store.open("m")
    assert (await refreshing).workers != (pid,)
    assert np.array_equal(await call, OLD.expected(ROWS))


async def test_close_during_a_refresh(make_registry: MakeRegistry) -> None:
    """F11: the caller gets RegistryClosedError, and nothing is left."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await registry.load("m")
    store.shut("m")
    refreshing = [asyncio.create_task(registry.refresh("m")) for _ in range(2)]
    await store.fetched(2)
    refreshing.append(asyncio.create_task(registry.refresh("m")))
    await settle()
    await registry.close()
    for task in refreshing:
        with pytest.raises(RegistryClosedError):
            await task


# Beside the budget


async def fill(registry: ModelRegistry, names: Sequence[str], spare: float) -> None:
    """Load ``names`` and leave a budget with room for ``spare`` more."""
    sizes = [(await registry.load(name)).size_bytes for name in names]
    registry.resize(int(sum(sizes) + max(sizes) * spare))


async def test_others_make_room_for_the_new_version_and_not_the_old_one(make_registry: MakeRegistry) -> None:
    """S3: the version to be renewed serves on though the policy ranks it last; another model goes."""
    store = Upright({f"{name}.ubj": OLD.ubj for name in ("m", "a", "b")})
    registry = await make_registry(store, policy="lru")
    await fill(registry, ["m", "a", "b"], 0.3)
    store.put("m.ubj", NEW.ubj)
    events = told(registry)
    await registry.refresh("m")
    assert [type(event) for event in events].count(ModelRefreshed) == 1
    evicted = [(event.name, event.cause) for event in events if isinstance(event, ModelEvicted)]
    assert evicted[0] == ("a", "budget")
    assert evicted[-1] == ("m", "replaced")
    assert ("m", "budget") not in evicted


async def test_where_there_is_no_room_for_both_the_old_version_goes_first(make_registry: MakeRegistry) -> None:
    """A budget for one version: the swap is a cold load, and calls wait for it; none fails."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store)
    await fill(registry, ["m"], 0.3)
    store.put("m.ubj", NEW.ubj)
    events = told(registry)
    refreshing = asyncio.create_task(registry.refresh("m"))
    while not refreshing.done():
        answer = await registry.predict("m", ROWS)
        assert any(np.array_equal(answer, model.expected(ROWS)) for model in (OLD, NEW))
        oracle.check(registry)
    assert await answers(registry, NEW)
    assert [e.cause for e in events if isinstance(e, ModelEvicted)] == ["budget"]
    assert [type(event) for event in events].count(ModelLoaded) == 1


# In the background


async def test_a_version_is_trusted_for_refresh_after(make_registry: MakeRegistry) -> None:
    """The call that finds a version too old is answered by it, and those after the swap by the new one."""
    store, clock = Upright({"m.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, refresh_after=60, clock=clock)
    await registry.load("m")
    store.put("m.ubj", NEW.ubj)
    clock.advance(59)
    assert await answers(registry, OLD)
    assert len(store.fetches) == 1
    assert "is asked again by a call in 1.0 s or later" in registry.explain("m")
    clock.advance(1)
    for _ in range(10):
        assert await answers(registry, OLD) or await answers(registry, NEW)
    await revalidated(registry)
    assert await answers(registry, NEW)
    assert len(store.fetches) == 2
    clock.advance(60)
    assert await answers(registry, NEW)
    await revalidated(registry)
    assert len(store.fetches) == 3
    assert registry.stats().loads == 2
    clock.advance(59)
    assert await answers(registry, NEW)
    assert len(store.fetches) == 3


async def test_calls_do_not_wait_for_revalidation(make_registry: MakeRegistry) -> None:
    """S3: a store that does not answer holds up nobody, and is asked once."""
    store, clock = Upright({"m.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, refresh_after=0, clock=clock)
    await registry.load("m")
    store.shut("m")
    for _ in range(10):
        clock.advance(1)
        assert await answers(registry, OLD)
    assert len(store.fetches) == 2


async def test_revalidations_hold_up_no_cold_load(make_registry: MakeRegistry) -> None:
    """S2: however many resident models a hanging store is asked about, a cold one gets a slot."""
    names = [f"m{number}" for number in range(8)]
    store, clock = Upright({f"{name}.ubj": OLD.ubj for name in [*names, "cold"]}), FakeClock()
    registry = await make_registry(store, refresh_after=0, clock=clock, load_concurrency=4)
    await registry.preload(names)
    store.shut(*names)
    for name in names:
        assert await answers(registry, OLD, name)
    async with asyncio.timeout(10):
        assert await answers(registry, OLD, "cold")


async def test_with_zero_each_call_asks(make_registry: MakeRegistry) -> None:
    """refresh_after=0: each call has the store asked, one at a time."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, refresh_after=0, clock=FakeClock())
    await registry.load("m")
    for _ in range(3):
        await answers(registry, OLD)
        await revalidated(registry)
    assert len(store.fetches) == 4


async def test_a_revalidation_that_fails_is_not_repeated_at_once(make_registry: MakeRegistry) -> None:
    """S2: a store that is down is not asked by each call: failure_ttl has to pass first."""
    store, clock = Upright({"m.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, refresh_after=0, failure_ttl=5, clock=clock)
    await registry.load("m")
    store.error = StoreUnavailableError("The store is down.")
    for _ in range(5):
        assert await answers(registry, OLD)
        await revalidated(registry)
    assert len(store.fetches) == 2
    store.error = None
    clock.advance(5)
    assert await answers(registry, OLD)
    await revalidated(registry)
    assert len(store.fetches) == 3
    assert "could not be renewed" not in registry.explain("m")


async def test_a_refresh_that_is_given_up_in_the_queue_leaves_the_version_as_old_as_it_was(
    make_registry: MakeRegistry,
) -> None:
    """F9: its caller was cancelled before the store was asked; the next call that finds it too old asks again."""
    store, clock = Upright({"m.ubj": OLD.ubj, "n.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, refresh_after=60, clock=clock, load_concurrency=1)
    await registry.preload(["m", "n"])
    store.shut("n")
    other = asyncio.create_task(registry.refresh("n"))
    await store.fetched(3)
    refreshing = asyncio.create_task(registry.refresh("m"))
    await settle()
    refreshing.cancel()
    store.open("n")
    await asyncio.wait((refreshing, other))
    clock.advance(60)
    assert await answers(registry, OLD)
    await revalidated(registry)
    assert sorted(store.fetches) == ["m", "m", "n", "n"]


async def test_groups_have_their_models_revalidated(make_registry: MakeRegistry) -> None:
    """A hit is a hit: acquire_many of a resident model and a cold one has the store asked about the first."""
    store, clock = Upright({"m.ubj": OLD.ubj, "n.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, refresh_after=60, clock=clock)
    await registry.load("m")
    clock.advance(60)
    async with registry.acquire_many(["m", "n"]):
        await revalidated(registry)
    assert store.fetches.count("m") == 2


async def test_a_deletion_is_noticed_in_the_background(make_registry: MakeRegistry) -> None:
    """With refresh_after a model that the store has no more leaves by itself."""
    store, clock = Upright({"m.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, refresh_after=1, clock=clock)
    await registry.load("m")
    store.remove("m.ubj")
    clock.advance(1)
    assert await answers(registry, OLD)
    await revalidated(registry)
    with pytest.raises(ModelNotFoundError):
        await registry.predict("m", ROWS)


# In the background, of what leaves meanwhile


class Stubborn(Upright):
    """A store that delivers all the same when a fetch is cancelled."""

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        try:
            return await super().fetch(name, if_version=if_version)
        except asyncio.CancelledError:
            return await MemoryStore.fetch(self, name, if_version=if_version)


async def asked_about(registry: ModelRegistry, store: Upright) -> None:
    """Have a call start a revalidation of "m" that the store does not answer yet."""
    store.shut("m")
    fetches = len(store.fetches)
    assert await answers(registry, OLD)
    await store.fetched(fetches + 1)


def evict(registry: ModelRegistry) -> None:
    """Take what has no lease out of the memory, and let it come back."""
    budget = registry.stats().budget
    registry.resize(1)
    registry.resize(budget)


@pytest.mark.parametrize("changed", [False, True])
async def test_what_is_evicted_while_it_is_revalidated_is_not_loaded_again(
    make_registry: MakeRegistry, changed: bool
) -> None:
    """L3: nobody waits for it, whether or not the store has a newer version: it would evict others in vain."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, refresh_after=0)
    await registry.load("m")
    await asked_about(registry, store)
    if changed:
        store.put("m.ubj", NEW.ubj)
    evict(registry)
    store.open("m")
    await kept(registry)
    assert registry.loaded() == []
    assert store.fetches == ["m", "m"]
    assert registry.stats().loads == 1
    assert registry.stats().load_failures == 0
    assert await answers(registry, NEW if changed else OLD)


async def test_a_store_that_delivers_all_the_same_brings_nothing_back(make_registry: MakeRegistry) -> None:
    """F7: nobody can join what has been given up, so it must not cover what was loaded since."""
    store = Stubborn({"m.ubj": OLD.ubj})
    registry = await make_registry(store, refresh_after=0)
    await registry.load("m")
    await asked_about(registry, store)
    store.put("m.ubj", NEW.ubj)
    evict(registry)
    await kept(registry)
    await freed(registry)
    assert registry.loaded() == []
    assert registry.stats().bytes_resident == 0


async def test_a_call_after_the_eviction_does_not_wait_for_the_revalidation(make_registry: MakeRegistry) -> None:
    """S2: it asks for itself, in a slot for cold loads, though the store does not answer the one of before."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, refresh_after=0)
    await registry.load("m")
    await asked_about(registry, store)
    evict(registry)
    call = asyncio.create_task(registry.predict("m", ROWS))
    await store.fetched(3)
    store.put("m.ubj", NEW.ubj)
    store.open("m")
    assert np.array_equal(await call, NEW.expected(ROWS))
    assert store.fetches == ["m", "m", "m"]
    assert registry.stats().loads == 2


async def test_a_revalidation_that_waits_for_a_slot_ends_with_its_version(make_registry: MakeRegistry) -> None:
    """L3: the store is not even asked about what has left."""
    store = Upright({"m.ubj": OLD.ubj, "n.ubj": OLD.ubj})
    registry = await make_registry(store, refresh_after=0, load_concurrency=1)
    await registry.preload(["m", "n"])
    await asked_about(registry, store)
    assert await answers(registry, OLD, "n")
    await settle()
    evict(registry)
    store.open("m")
    await kept(registry)
    assert store.fetches == ["m", "n", "m"]
    assert registry.loaded() == []


async def test_a_revalidation_that_waits_for_bytes_ends_with_its_version(make_registry: MakeRegistry) -> None:
    """L3: the new version does not fit beside what is leased; it gets nothing when the lease ends."""
    store = Upright({"m.ubj": OLD.ubj, "n.ubj": OLD.ubj, "other.ubj": OLD.ubj})
    registry = await make_registry(store, refresh_after=60, clock=(clock := FakeClock()))
    await fill(registry, ["n", "m"], 0)
    clock.advance(60)
    async with registry.acquire("n"):
        store.put("m.ubj", zoo.model(trees=7).ubj)
        assert await answers(registry, OLD)
        while not registry._state.ledger.queue:
            await asyncio.sleep(0)
        registry.resize(registry.stats().budget - 1)
        await kept(registry)
        await freed(registry)
        assert [model.name for model in registry.loaded()] == ["n"]
        assert not registry._state.ledger.queue
    assert [model.name for model in registry.loaded()] == ["n"]


async def test_a_version_that_makes_room_for_its_successor_does_not_end_that(make_registry: MakeRegistry) -> None:
    """S3: with a budget for one version, a revalidation that finds another loads it in the place of the old one."""
    store, clock = Upright({"m.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, refresh_after=60, clock=clock)
    await fill(registry, ["m"], 0.3)
    store.put("m.ubj", NEW.ubj)
    clock.advance(60)
    events = told(registry)
    assert await answers(registry, OLD)
    await revalidated(registry)
    assert [event.cause for event in events if isinstance(event, ModelEvicted)] == ["budget"]
    assert [model.name for model in registry.loaded()] == ["m"]
    assert await answers(registry, NEW)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("joins", [False, True])
async def test_what_is_evicted_while_it_is_refreshed_is_loaded_again(
    make_registry: MakeRegistry, changed: bool, joins: bool
) -> None:
    """The caller of refresh wants the model, also if a revalidation had been waiting for a slot when it came."""
    store, clock = Upright({"m.ubj": OLD.ubj, "n.ubj": OLD.ubj}), FakeClock()
    registry = await make_registry(store, refresh_after=60, clock=clock, load_concurrency=1)
    await registry.preload(["m", "n"])
    store.shut("m", "n")
    other = asyncio.create_task(registry.refresh("n"))
    await store.fetched(3)
    if joins:
        clock.advance(60)
        assert await answers(registry, OLD)
    refreshing = asyncio.create_task(registry.refresh("m"))
    await settle()
    store.open("n")
    await store.fetched(4)
    evict(registry)
    if changed:
        store.put("m.ubj", NEW.ubj)
    store.open("m")
    await asyncio.gather(refreshing, other)
    assert await answers(registry, NEW if changed else OLD)
    assert store.fetches.count("m") == (2 if changed else 3)
    assert registry.stats().loads == 3


async def test_unload_does_not_wait_for_a_revalidation(make_registry: MakeRegistry) -> None:
    """F10: a call still holds the model and the store is silent: nothing is loaded, for nobody would have it."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, refresh_after=0)
    async with registry.acquire("m"):
        await asked_about(registry, store)
        unloading = asyncio.create_task(registry.unload("m"))
        await settle()
    assert await unloading
    assert store.fetches == ["m", "m"]
    assert registry.stats().loads == 1
    assert not registry._state.flights.airborne


async def test_a_pinned_model_whose_worker_ends_is_loaded_though_it_is_revalidated(make_registry: MakeRegistry) -> None:
    """P1: the revalidation ends with the worker, and the pin brings the model back."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, refresh_after=0)
    pid = (await registry.pin("m")).workers[0]
    await asked_about(registry, store)
    psutil.Process(pid).kill()
    await store.fetched(3)
    store.open("m")
    while not registry.loaded():
        await asyncio.sleep(0)
    assert registry.loaded()[0].pinned
    assert store.fetches == ["m", "m", "m"]


# Under load


@pytest.mark.parametrize("explicit", [True, False])
async def test_overwriting_under_load_fails_no_call(make_registry: MakeRegistry, explicit: bool) -> None:
    """S3: every answer is from the version that was current when the call was made, or a newer one."""
    store = Upright({"m.ubj": OLD.ubj})
    registry = await make_registry(store, workers=2, refresh_after=None if explicit else 0)
    await registry.load("m")
    expected = [model.expected(ROWS) for model in VERSIONS]
    current, done = 0, False

    async def call() -> int:
        count = 0
        while not done:
            before = current
            answer = await registry.predict("m", ROWS)
            index = next(i for i in range(current + 1, -1, -1) if np.array_equal(answer, expected[i % 4]))
            assert index >= before if explicit else index >= 0
            count += 1
        return count

    callers = [asyncio.create_task(call()) for _ in range(8)]
    for version in range(1, 20):
        store.put("m.ubj", VERSIONS[version % 4].ubj)
        if explicit:
            await registry.refresh("m")
        else:
            while registry.stats().refreshes < version:
                await asyncio.sleep(0)
        current = version
        oracle.check(registry)
    done = True
    assert min(await asyncio.gather(*callers)) > 0
    assert registry.stats().refreshes == 19
