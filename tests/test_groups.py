"""``acquire_many``: leases on several models at once, on all of them or on none (rules L3, L4)."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zoo
from conftest import settle
from modelcache import (
    Artifact,
    BudgetTimeoutError,
    CorruptArtifactError,
    InvalidModelNameError,
    MemoryStore,
    ModelEvicted,
    ModelNotFoundError,
    ModelRegistry,
    ModelTooLargeError,
    RegistryClosedError,
    StoreError,
)
from modelcache.cache.sizes import Bounds
from modelcache.testing import GatedStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeRegistry
    from modelcache import Event, Lease

ROWS = zoo.rows(2)
FLEET = {f"m{index}": zoo.model(seed=index, trees=20) for index in range(6)}
ARTIFACTS = {f"{name}.ubj": model.ubj for name, model in FLEET.items()}
PACKED = {f"{name}.tar.gz": model.targz for name, model in FLEET.items()}


async def with_room_for(registry: ModelRegistry, *names: str, known: bool = True) -> dict[str, int]:
    """Leave a budget that ``names`` fit into together, and no further model; return what each takes."""
    sizes = {name: (await registry.load(name)).size_bytes for name in FLEET}
    for name in FLEET:
        await registry.unload(name)
    if not known:
        registry._state.sizes.__init__()  # type: ignore[misc]
        registry._state.history._past.clear()
        registry._state.sizes.bounds = lambda unpacked, suffix: Bounds(unpacked, int(unpacked * 1.6))  # type: ignore[method-assign]
    registry.resize(sum(sizes[name] for name in names) + min(sizes.values()) // 2)
    return sizes


def resident(registry: ModelRegistry) -> list[str]:
    return [info.name for info in registry.loaded()]


async def assert_answer(*leases: Lease) -> None:
    for lease in leases:
        assert np.array_equal(await lease.predict(ROWS), FLEET[lease.name].expected(ROWS))


def evictions(registry: ModelRegistry) -> list[str]:
    """Note from now on who is evicted."""
    names: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, ModelEvicted):
            names.append(event.name)

    registry.subscribe(note)
    return names


@asynccontextmanager
async def pending(registry: ModelRegistry, *names: str) -> AsyncIterator[asyncio.Task[None]]:
    """A group that waits for bytes."""

    async def take() -> None:
        async with registry.acquire_many(names) as leases:
            await assert_answer(*leases)

    task = asyncio.create_task(take())
    while not (registry._state.ledger.queue or registry._state.ledger.parked):
        assert not task.done(), "it does not wait"
        await asyncio.sleep(0)
    yield task


class Sizeless(GatedStore):
    """Announces no sizes, and delivers in small pieces."""

    async def fetch(self, name: str, *, if_version: str | None = None) -> Any:
        artifact = await super().fetch(name, if_version=if_version)
        return Artifact(version="1", size=None, suffix=".ubj", chunks=small_chunks(artifact))


async def small_chunks(artifact: Any) -> AsyncIterator[bytes]:
    async for chunk in artifact.chunks:
        for start in range(0, len(chunk), 4096):
            yield chunk[start : start + 4096]


# All


@pytest.mark.parametrize("artifacts", [ARTIFACTS, PACKED], ids=["raw", "packed"])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
async def test_all_of_a_group_are_held(make_registry: MakeRegistry, artifacts: dict[str, bytes], known: bool) -> None:
    """L3: whether or not they have been loaded before; those outside make room, and nothing is left reserved."""
    registry = await make_registry(MemoryStore(artifacts))
    await with_room_for(registry, "m0", "m1", "m2", known=known)
    for name in ("m3", "m4", "m0"):
        await registry.load(name)
    async with registry.acquire_many(["m1", "m0", "m2"]) as leases:
        assert [lease.name for lease in leases] == ["m1", "m0", "m2"]
        await assert_answer(*leases)
        assert sorted(resident(registry)) == ["m0", "m1", "m2"]
        assert registry.stats().bytes_reserved == 0
    assert registry._state.ledger.leases == 0


async def test_a_resident_group_asks_the_store_nothing(make_registry: MakeRegistry) -> None:
    """F12: its models are hits; a group that loads asks once for the size of each, and once for the model."""
    store = GatedStore(ARTIFACTS)
    store.open(*FLEET)
    registry = await make_registry(store)
    async with registry.acquire_many(["m0", "m1"]) as leases:
        await assert_answer(*leases)
    assert sorted(store.fetches) == ["m0", "m0", "m1", "m1"]
    async with registry.acquire_many(["m1", "m0"]) as leases:
        await assert_answer(*leases)
    assert len(store.fetches) == 4
    stats = registry.stats()
    assert (stats.hits, stats.requests, stats.loads) == (2, 4, 2)


async def test_a_name_given_twice_has_two_leases(make_registry: MakeRegistry) -> None:
    """api.md: one lease for each name, in their order, resident or not; an empty group is no error."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    for _ in range(2):
        async with registry.acquire_many(["m0", "m1", "m0", "m0.ubj"]) as leases:
            assert len({id(lease) for lease in leases}) == 4
            assert registry._state.ledger.leases == 4
            await asyncio.gather(*(lease.predict(ROWS) for lease in leases))
    async with registry.acquire_many([]) as leases:
        assert leases == []
    with pytest.raises(TypeError, match=r"acquire_many takes several names: write acquire_many\(\['m0'\]\)"):
        async with registry.acquire_many("m0"):
            pass


async def test_groups_that_would_deadlock_take_turns(make_registry: MakeRegistry) -> None:
    """L4: groups of two, with room for one group, take turns; none waits for ever with half of what it needs."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    await with_room_for(registry, "m0", "m1")
    order: list[str] = []

    async def use(first: str, second: str) -> None:
        async with registry.acquire_many([first, second]) as leases:
            assert [lease.name for lease in leases] == [first, second]
            await settle()
            await assert_answer(*leases)
            order.append(first + second)

    pairs = [(f"m{one}", f"m{other}") for one in range(6) for other in range(6) if one != other]
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for pair in pairs:
            group.create_task(use(*pair))
    assert sorted(order) == [first + second for first, second in pairs]
    assert registry._state.ledger.leases == 0


async def test_groups_share_what_others_load(make_registry: MakeRegistry) -> None:
    """F1: a load under way is waited for, not repeated; a caller who comes later shares what a group loads."""
    store = GatedStore(ARTIFACTS)
    store.open("m1")
    registry = await make_registry(store)
    call = asyncio.create_task(registry.predict("m0", ROWS))
    await store.fetched(1)

    async def take() -> None:
        async with registry.acquire_many(["m0", "m1"]) as leases:
            await assert_answer(*leases)

    group = asyncio.create_task(take())
    await settle()
    assert store.fetches.count("m0") == 1
    store.open("m0")
    await group
    await call
    assert registry.stats().loads == 2


async def test_a_caller_shares_what_a_group_loads(make_registry: MakeRegistry) -> None:
    """F1: one load for both, with the bytes that the group was granted."""
    store = GatedStore(ARTIFACTS)
    registry = await make_registry(store)
    async with AsyncExitStack() as stack:
        taking = asyncio.create_task(stack.enter_async_context(registry.acquire_many(["m0", "m1"])))
        await store.fetched(2)
        call = asyncio.create_task(registry.predict("m0", ROWS))
        store.open("m0", "m1")
        assert np.array_equal(await call, FLEET["m0"].expected(ROWS))
        await assert_answer(*await taking)
    assert registry.stats().loads == 2


async def test_what_was_loaded_before_the_group_woke_up_is_not_loaded_again(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1: between the grant and the group's next step a caller may have brought one of its models."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    claim = registry._groups._claim

    async def claim_and_sleep_late(*arguments: Any) -> Any:
        group = await claim(*arguments)
        await registry.predict("m1", ROWS)
        return group

    monkeypatch.setattr(registry._groups, "_claim", claim_and_sleep_late)
    async with registry.acquire_many(["m0", "m1"]) as leases:
        await assert_answer(*leases)
        assert registry.stats().bytes_reserved == 0
    assert registry.stats().loads == 2


# Or none


async def test_a_missing_name_costs_nobody_anything(make_registry: MakeRegistry) -> None:
    """L3: the group is refused before anybody is evicted for those of it that are there."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    await with_room_for(registry, "m0", "m1")
    for name in ("m0", "m1"):
        await registry.load(name)
    evicted = evictions(registry)
    for group in (["m2", "absent"], ["absent", "m2"], ["m0", "m2", "absent"]):
        with pytest.raises(ModelNotFoundError, match="absent"):
            async with registry.acquire_many(group):
                raise AssertionError("unreachable")
    with pytest.raises(InvalidModelNameError):
        async with registry.acquire_many(["m2", "../absent"]):
            raise AssertionError("unreachable")
    assert evicted == []
    assert resident(registry) == ["m0", "m1"]
    assert registry._state.ledger.leases == 0


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
async def test_a_group_beyond_the_budget_is_refused_at_once(make_registry: MakeRegistry, known: bool) -> None:
    """L3: with the figures, and nothing is evicted for it, whether or not its models were ever loaded."""
    registry = await make_registry(MemoryStore(PACKED))
    sizes = await with_room_for(registry, "m0", "m1", known=known)
    await registry.load("m0")
    evicted = evictions(registry)
    with pytest.raises(ModelTooLargeError, match=r"m0, m1, m2, m3 take .* hold fewer at once") as caught:
        async with registry.acquire_many(["m0", "m1", "m2", "m3"]):
            raise AssertionError("unreachable")
    assert caught.value.model == "m0, m1, m2, m3"
    assert caught.value.budget == registry.stats().budget < caught.value.needed
    if known:
        assert caught.value.needed == pytest.approx(sum(sizes[name] for name in ("m0", "m1", "m2", "m3")), rel=0.1)
    assert evicted == []
    assert registry._state.ledger.leases == 0


async def test_a_group_that_waits_in_vain_names_the_holders(make_registry: MakeRegistry) -> None:
    """L4: it gives up after load_timeout, holding nothing before or after."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    await with_room_for(registry, "m0", "m1")
    await registry.load("m0")
    async with registry.acquire("m1"):
        registry._loader.timeout = 0.1
        with pytest.raises(BudgetTimeoutError, match="held by leases and pins of m1") as caught:
            async with registry.acquire_many(["m0", "m2"]):
                raise AssertionError("unreachable")
        assert caught.value.model == "m0, m2"
        assert caught.value.holders == ("m1",)
        assert registry._state.ledger.leases == 1
        assert "m0" in resident(registry)
    assert not registry._state.ledger.queue


async def test_a_group_holds_nothing_while_it_waits(make_registry: MakeRegistry) -> None:
    """L3, L4: what is resident of it serves others and can be evicted; it is granted when a lease ends."""
    registry = await make_registry(MemoryStore(ARTIFACTS), policy="lru")
    await with_room_for(registry, "m0", "m1")
    await registry.load("m0")
    async with registry.acquire("m1"), pending(registry, "m0", "m2") as group:
        assert registry._state.ledger.leases == 1
        assert np.array_equal(await registry.predict("m0", ROWS), FLEET["m0"].expected(ROWS))
        assert not group.done()
    await group
    assert sorted(resident(registry)) == ["m0", "m2"]


async def test_a_group_waits_for_pins_with_nothing_in_hand(make_registry: MakeRegistry) -> None:
    """L3: others load meanwhile; it is told when there is room; a pin on a model of its own is no obstacle."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    await with_room_for(registry, "m0", "m1")
    await registry.pin("m0")
    async with registry.acquire_many(["m0", "m1"]) as leases:
        await assert_answer(*leases)
    async with pending(registry, "m1", "m2") as group:
        assert registry._state.ledger.parked
        for name in ("m3", "m4"):
            assert np.array_equal(await registry.predict(name, ROWS), FLEET[name].expected(ROWS))
        registry.unpin("m0")
    await group


async def test_a_failing_load_gives_the_others_back(make_registry: MakeRegistry) -> None:
    """L4: a model that turns out damaged after the bytes were granted leaves no lease, and the others resident."""
    broken = {**ARTIFACTS, "broken.ubj": FLEET["m0"].ubj[:-200]}
    registry = await make_registry(MemoryStore(broken))
    await registry.load("m0")
    with pytest.raises(CorruptArtifactError) as caught:
        async with registry.acquire_many(["m0", "broken", "m1"]):
            raise AssertionError("unreachable")
    assert caught.value.model == "broken"
    await settle()
    assert registry._state.ledger.leases == 0
    async with registry.acquire_many(["m0", "m1"]) as leases:
        await assert_answer(*leases)


# At any moment


async def test_a_group_can_be_cancelled_at_any_moment(make_registry: MakeRegistry) -> None:
    """F3, L4: after each number of steps of the event loop, from the first to the last; nothing is left of it."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    await with_room_for(registry, "m0", "m1", "m2")
    steps, finished = 0, False
    while not finished:
        for name in ("m3", "m4"):
            await registry.load(name)
        async with AsyncExitStack() as stack:
            group = registry.acquire_many(["m0", "m1", "m3"])
            taking = asyncio.create_task(stack.enter_async_context(group))
            for _ in range(steps):
                await asyncio.sleep(0)
            taking.cancel()
            (outcome,) = await asyncio.gather(taking, return_exceptions=True)
            finished = not isinstance(outcome, BaseException)
        while registry._state.flights.airborne or registry.stats().bytes_unloading:
            await asyncio.sleep(0)
        assert registry._state.ledger.leases == 0
        assert registry.stats().bytes_reserved == 0
        assert not registry._state.ledger.queue
        for name in ("m0", "m1"):
            await registry.unload(name)
        steps += 1
    assert steps > 10


@pytest.mark.parametrize("ending", ["cancelled", "granted"])
async def test_a_group_can_be_cancelled_in_the_tick_of_its_grant(make_registry: MakeRegistry, ending: str) -> None:
    """F5: it has leases and bytes by then, and gives them back."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    await with_room_for(registry, "m0", "m1")
    await registry.load("m0")
    async with registry.acquire("m1"), pending(registry, "m0", "m2") as group:
        registry.resize("64 MiB")
        assert registry.stats().bytes_reserved > 0
        assert registry._state.ledger.leases == 2
        if ending == "cancelled":
            group.cancel()
            with pytest.raises(asyncio.CancelledError):
                await group
            assert registry.stats().bytes_reserved == 0
            assert registry._state.ledger.leases == 1
        else:
            await group


async def test_bytes_granted_for_a_load_that_fails_are_given_back(make_registry: MakeRegistry) -> None:
    """L1: the store fails before they are claimed, or the group is cancelled by then."""
    store = GatedStore(ARTIFACTS)
    store.open(*FLEET)
    registry = await make_registry(store, failure_ttl=0)
    await with_room_for(registry, "m0", "m1")
    async with registry.acquire("m1"), pending(registry, "m0", "m2") as group:
        store.shut("m2")
        registry.resize("64 MiB")
        await settle()
        assert registry.stats().bytes_reserved > 0
        store.fail("m2", ConnectionError("gone"))
        with pytest.raises(StoreError, match="gone"):
            await group
        while registry._state.flights.airborne:  # the other one, which goes on
            await asyncio.sleep(0)
        await settle()
        assert registry.stats().bytes_reserved == 0


@pytest.mark.parametrize("joined", [True, False], ids=["load in line", "new load"])
async def test_loads_of_a_group_need_no_slot(make_registry: MakeRegistry, joined: bool) -> None:
    """L2: all slots are held by loads that wait for what the group has leased; they go on when it has been served."""
    store = GatedStore(ARTIFACTS)
    store.open(*FLEET)
    registry = await make_registry(store, load_concurrency=1)
    sizes = await with_room_for(registry, "m0", "m1")
    await registry.load("m0")
    async with registry.acquire("m1"), pending(registry, "m0", "m2") as group:
        store.shut("m3")
        slow = asyncio.create_task(registry.predict("m3", ROWS))  # has the slot
        await settle()
        call = asyncio.create_task(registry.predict("m2", ROWS)) if joined else None
        await settle()
        registry.resize(registry.stats().budget + sizes["m2"])
        await group
        if call is not None:
            assert np.array_equal(await call, FLEET["m2"].expected(ROWS))
        assert not slow.done()
    store.open("m3")
    await slow


async def test_a_load_that_queues_takes_the_bytes_of_its_group(make_registry: MakeRegistry) -> None:
    """L2, F1: its own claim, further back in the line, is given up."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    sizes = await with_room_for(registry, "m0", "m1")
    await registry.load("m0")
    async with registry.acquire("m1"), pending(registry, "m0", "m2") as group:
        call = asyncio.create_task(registry.predict("m2", ROWS))
        while len(registry._state.ledger.queue) < 2:
            await asyncio.sleep(0)
        registry.resize(registry.stats().budget + sizes["m2"])
        await group
        assert np.array_equal(await call, FLEET["m2"].expected(ROWS))
    assert registry.stats().loads == len(FLEET) + 3


async def test_a_group_claims_what_its_resident_models_really_take(make_registry: MakeRegistry) -> None:
    """L3: not what was found out before they were loaded by somebody else."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    size = (await registry.load("m0")).size_bytes
    deadline = asyncio.get_running_loop().time() + 10
    group = await registry._groups._claim({"m0": Bounds(1, 2), "m1": Bounds(size, size)}, deadline)
    assert group.needs == {"m0": size, "m1": size}
    registry._groups._disband(group)


async def test_a_model_of_unknown_size_may_outgrow_its_share(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L6: a store that announces no sizes; the group comes back asking for what it knows by now, not for the same."""
    kinds = {name: zoo.model(seed=seed, trees=200) for seed, name in enumerate(("a", "b", "c"))}
    monkeypatch.setattr("test_groups.FLEET", kinds)

    store = Sizeless({f"{name}.ubj": model.ubj for name, model in kinds.items()})
    store.open(*kinds)
    registry = await make_registry(store)
    size = (await registry.load("c")).size_bytes
    async with registry.acquire("c"):
        registry.resize(2 * size + size // 2)
        async with pending(registry, "a", "b") as group:
            rounds, asked = 0, 0
            while len(store.fetches) > asked:
                rounds, asked = rounds + 1, len(store.fetches)
                await settle(500)
                assert rounds < 50, "it goes on asking"
            assert registry._state.ledger.leases == 1
        registry.resize("64 MiB")
        await group


async def test_a_group_that_is_cancelled_asks_the_store_no_more(make_registry: MakeRegistry) -> None:
    """F9: unlike a load, the search for a size is of no use to later callers."""
    store = GatedStore(ARTIFACTS)
    registry = await make_registry(store)
    group = asyncio.create_task(registry.acquire_many(["m0", "m1"]).__aenter__())
    await store.fetched(2)
    group.cancel()
    await settle()
    assert group.cancelled()
    assert not registry._state.flights.airborne


async def test_a_version_that_is_known_to_be_larger_is_not_begun_with_too_little(make_registry: MakeRegistry) -> None:
    """L1: it came after the group had asked for sizes; nothing is parsed before its bytes are there."""
    small, large = FLEET["m2"], zoo.model(trees=60)
    store = MemoryStore(ARTIFACTS)
    registry = await make_registry(store)
    await with_room_for(registry, "m0", "m1")
    registry.resize("64 MiB")
    store.put("m2.ubj", large.ubj)
    size = (await registry.load("m2")).size_bytes
    await registry.unload("m2")
    store.put("m2.ubj", small.ubj)
    held = (await registry.load("m1")).size_bytes
    await registry.load("m0")
    async with registry.acquire("m1"):
        registry.resize(registry.stats().bytes_resident + held // 2)
        async with pending(registry, "m0", "m2") as group:
            store.put("m2.ubj", large.ubj)
            begun = registry._pool.next_number()
            registry.resize(registry.stats().budget + size // 2)
            while registry._state.flights.airborne or not registry._state.ledger.queue:
                await asyncio.sleep(0)
            assert registry._pool.next_number() == begun + 2, "it was loaded once, alone"
            assert registry._state.ledger.leases == 1
            group.cancel()
    assert held < size


async def test_close_ends_groups_that_wait(make_registry: MakeRegistry) -> None:
    """F11: for a size, for a lease, for an unpin, or for a load: each hears that the registry was closed."""
    store = GatedStore(ARTIFACTS)
    store.open(*FLEET)
    registry = await make_registry(store)
    await with_room_for(registry, "m0", "m1", "m2")
    await registry.pin("m0")
    held = registry.acquire("m1")
    await held.__aenter__()
    calls = [asyncio.create_task(take_and_fail(registry, *names)) for names in (("m2", "m3"), ("m3", "m4", "m5"))]
    while not (registry._state.ledger.queue and registry._state.ledger.parked):
        await asyncio.sleep(0)
    closing = asyncio.create_task(registry.close())
    await asyncio.gather(*calls)
    await held.__aexit__(None, None, None)
    await closing


async def take_and_fail(registry: ModelRegistry, *names: str) -> None:
    with pytest.raises(RegistryClosedError):
        async with registry.acquire_many(names):
            raise AssertionError("unreachable")


async def test_close_ends_a_group_that_has_just_been_granted(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F11: in the tick in which all loads are cancelled; it starts no more of them."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    await with_room_for(registry, "m0", "m1")
    ground = registry._ground_flights

    async def grant_and_ground() -> None:
        registry.resize("64 MiB")
        await ground()

    monkeypatch.setattr(registry, "_ground_flights", grant_and_ground)
    async with registry.acquire("m1"), pending(registry, "m0", "m2") as group:
        closing = asyncio.create_task(registry.close())
        with pytest.raises(RegistryClosedError):
            await group
        assert registry.stats().bytes_reserved == 0
    await closing


async def test_close_ends_a_group_that_asks_for_sizes(make_registry: MakeRegistry) -> None:
    """F11: the store never answers."""
    store = GatedStore(ARTIFACTS)
    registry = await make_registry(store)
    call = asyncio.create_task(take_and_fail(registry, "m0", "m1"))
    waiting = asyncio.create_task(registry.predict("m2", ROWS))
    await store.fetched(3)
    behind = asyncio.create_task(take_and_fail(registry, "m2"))
    await settle()
    await registry.close()
    await asyncio.gather(call, behind)
    assert store.fetches.count("m2") == 1
    with pytest.raises(RegistryClosedError):
        await waiting


async def test_a_model_that_outgrows_its_share_sends_the_group_back(make_registry: MakeRegistry) -> None:
    """L6: what was taken for enough is not, and the rest is leased: the group holds nothing while it waits again."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    sizes = await with_room_for(registry, "m0", "m1", "m2")
    registry._state.history._past.clear()
    registry._state.sizes.bounds = lambda unpacked, suffix: Bounds(0, unpacked // 2)  # type: ignore[method-assign]
    async with registry.acquire("m2"):
        registry.resize(sizes["m2"] + sizes["m0"] + sizes["m1"] // 2)
        async with pending_after_loads(registry, "m0", "m1") as group:
            assert registry._state.ledger.leases == 1, "only the one on m2"
        assert not group.done()
        registry.resize("64 MiB")
        await group
    assert sorted(resident(registry)) == ["m0", "m1", "m2"]


@asynccontextmanager
async def pending_after_loads(registry: ModelRegistry, *names: str) -> AsyncIterator[asyncio.Task[None]]:
    """A group that has found out, by loading, that it does not fit beside what is leased."""

    async def take() -> None:
        async with registry.acquire_many(names) as leases:
            await assert_answer(*leases)

    learned = registry._state.sizes._ratios[".ubj"]
    measured = learned.count + len(names)
    task = asyncio.create_task(take())
    while learned.count < measured or not registry._state.ledger.queue:
        await asyncio.sleep(0)
    yield task


async def test_a_store_that_fails_fails_the_group(make_registry: MakeRegistry) -> None:
    """F6, F8: with the store's own error, which is remembered as a load's would be."""

    class Broken(MemoryStore):
        asked = 0

        async def fetch(self, name: str, *, if_version: str | None = None) -> Any:
            if name == "m1":
                self.asked += 1
                raise ConnectionError("gone")
            return await super().fetch(name, if_version=if_version)

    store = Broken(ARTIFACTS)
    registry = await make_registry(store, failure_ttl=60)
    for _ in range(3):
        with pytest.raises(StoreError, match="ConnectionError: gone"):
            async with registry.acquire_many(["m0", "m1"]):
                raise AssertionError("unreachable")
    assert store.asked == 1
    assert registry.stats().load_failures == 1


async def test_without_retention_a_group_stays_for_its_block(make_registry: MakeRegistry) -> None:
    """api.md: ``retain=False`` unloads each model when the last lease on it ends."""
    registry = await make_registry(MemoryStore(ARTIFACTS), retain=False)
    async with registry.acquire_many(["m0", "m1"]) as leases:
        await assert_answer(*leases)
        await assert_answer(*leases)
        assert sorted(resident(registry)) == ["m0", "m1"]
    while registry.stats().bytes_unloading:
        await asyncio.sleep(0)
    assert resident(registry) == []


@pytest.mark.parametrize("factor", [0.8, 1.05, 1.2, 1.5])
async def test_a_group_of_unknown_sizes_is_decided(make_registry: MakeRegistry, factor: float) -> None:
    """L3, L6: beside nobody else, it is held if it fits, and refused if it does not; it does not ask for ever."""
    kinds = {name: zoo.model(seed=seed, trees=200) for seed, name in enumerate(("a", "b"))}
    store = Sizeless({f"{name}.ubj": model.ubj for name, model in kinds.items()})
    store.open(*kinds)
    registry = await make_registry(store, load_timeout=20)
    sizes = [(await registry.load(name)).size_bytes for name in kinds]
    for name in kinds:
        await registry.unload(name)
    registry._state.history._past.clear()
    registry.resize(int(sum(sizes) * factor))
    asked = len(store.fetches)
    if factor > 1:
        async with registry.acquire_many(["a", "b"]) as leases:
            for lease in leases:
                assert np.array_equal(await lease.predict(ROWS), kinds[lease.name].expected(ROWS))
    else:
        with pytest.raises(ModelTooLargeError):
            async with registry.acquire_many(["a", "b"]):
                raise AssertionError("unreachable")
    assert len(store.fetches) - asked < 30


@pytest.mark.parametrize("factor", [1.1, 1.5])
async def test_a_load_of_unknown_size_beside_a_pin_is_decided(make_registry: MakeRegistry, factor: float) -> None:
    """L6: it grows as far as there is room, and not as far as the budget goes."""
    kinds = {name: zoo.model(seed=seed, trees=200) for seed, name in enumerate(("pinned", "a"))}
    store = Sizeless({f"{name}.ubj": model.ubj for name, model in kinds.items()})
    store.open(*kinds)
    registry = await make_registry(store, load_timeout=20)
    size = (await registry.load("a")).size_bytes
    await registry.unload("a")
    registry._state.history._past.clear()
    pinned = (await registry.pin("pinned")).size_bytes
    registry.resize(pinned + int(size * factor))
    asked = len(store.fetches)
    assert np.array_equal(await registry.predict("a", ROWS), kinds["a"].expected(ROWS))
    assert len(store.fetches) - asked < 10
