"""Stores that hang, or raise what nobody expects, at each of the points where the registry depends on them."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import oracle
import zoo
from conftest import settle
from modelcache import (
    Artifact,
    CorruptArtifactError,
    LoadTimeoutError,
    MemoryStore,
    ModelCacheError,
    ModelLoaded,
    ModelRegistry,
    RegistryClosedError,
    StoreError,
)
from modelcache.pool.pool import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import MakeRegistry
    from modelcache import Event, NotModified

CLOSE_PATIENCE = "modelcache.registry._STORE_PATIENCE"
ACLOSE_PATIENCE = "modelcache.origin._ACLOSE_TIMEOUT"
SHORT, LONG = 0.05, 20.0

Kind = type[BaseException]

MODEL = zoo.model()
ROWS = zoo.rows(3)


class Strange(BaseException):
    """What a library may raise that does not want to be caught by accident."""


class Chunks:
    """Delivers ``data`` in two halves. Hangs, or raises, where it is told to; ``reached`` is set there."""

    def __init__(self, data: bytes, trouble: dict[str, Any], reached: asyncio.Event) -> None:
        half = len(data) // 2
        self._parts = [data[:half], data[half:]]
        self._trouble = trouble
        self._reached = reached

    def __aiter__(self) -> Chunks:
        return self

    async def __anext__(self) -> bytes:
        if len(self._parts) == 1:
            await self._meet("chunks")
        if not self._parts:
            raise StopAsyncIteration
        return self._parts.pop(0)

    async def aclose(self) -> None:
        await self._meet("aclose")

    async def _meet(self, place: str) -> None:
        await meet(self._trouble, place, self._reached)


async def meet(trouble: dict[str, Any], place: str, reached: asyncio.Event) -> None:
    if place not in trouble:
        return
    reached.set()
    if trouble[place] is None:
        await asyncio.Event().wait()
    raise trouble[place]("gone")


class Rude:
    """A store with ``trouble``: by place, the kind it raises there, or None to hang for ever. Model "good" has none."""

    def __init__(self, **trouble: Any) -> None:
        self.artifacts = {"m": MODEL.ubj, "good": MODEL.ubj}
        self.trouble = trouble
        self.reached = asyncio.Event()

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        trouble = {} if name == "good" else self.trouble
        await meet(trouble, "fetch", self.reached)
        data = self.artifacts[name]
        return Artifact(version="1", size=len(data), suffix=".ubj", chunks=Chunks(data, trouble, self.reached))

    async def close(self) -> None:
        await meet(self.trouble, "close", self.reached)


async def assert_serves(registry: ModelRegistry, name: str = "good") -> None:
    assert np.array_equal(await registry.predict(name, ROWS), MODEL.expected(ROWS))


def listen(registry: ModelRegistry) -> list[Event]:
    events: list[Event] = []
    registry.subscribe(events.append)
    return events


def listen_to_the_loop() -> Callable[[], list[str]]:
    """Return a function that gives what the event loop has complained of."""
    found: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: found.append(f"{context['message']}: {context.get('exception')!r}")
    )

    def collected() -> list[str]:
        gc.collect()
        return found

    return collected


def str_of(value: Any) -> str:
    return getattr(value, "__name__", "hangs")


# Letting go of an artifact

TROUBLES = [None, OSError, Strange, asyncio.CancelledError]


@pytest.mark.parametrize("trouble", TROUBLES, ids=str_of)
async def test_a_model_that_has_landed_is_served_whatever_becomes_of_its_artifact(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch, trouble: Kind | None
) -> None:
    """F4: once a load has landed, neither a hanging ``aclose`` nor one that raises takes the model away."""
    monkeypatch.setattr(ACLOSE_PATIENCE, SHORT)
    store = Rude(aclose=trouble)
    registry = await make_registry(store)
    async with asyncio.timeout(LONG):
        await assert_serves(registry, "m")
        await store.reached.wait()
        for name in ("m", "good", "m"):
            await assert_serves(registry, name)


@pytest.mark.parametrize("trouble", TROUBLES, ids=str_of)
async def test_a_load_that_has_landed_is_no_failure(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch, trouble: Kind | None
) -> None:
    """F8: what goes wrong after it is not told as a failed load, nor remembered against the next one."""
    monkeypatch.setattr(ACLOSE_PATIENCE, SHORT)
    complaints = listen_to_the_loop()
    store = Rude(aclose=trouble)
    registry = await make_registry(store, failure_ttl=30)
    events = listen(registry)
    await assert_serves(registry, "m")
    await all_loads_ended()
    assert [type(event) for event in events] == [ModelLoaded]
    assert registry.stats().load_failures == 0
    budget = registry.stats().budget
    registry.resize(1)
    registry.resize(budget)
    store.trouble = {}
    await assert_serves(registry, "m")
    assert complaints() == []


async def all_loads_ended() -> None:
    async with asyncio.timeout(LONG):
        while any(task.get_name().startswith("modelcache load") for task in asyncio.all_tasks()):
            await asyncio.sleep(0)


@pytest.mark.parametrize("trouble", TROUBLES, ids=str_of)
async def test_a_load_that_failed_is_told_whatever_becomes_of_its_artifact(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch, trouble: Kind | None
) -> None:
    """F6: the caller gets a typed error, in time, also if the store does not let go of what has failed."""
    monkeypatch.setattr(ACLOSE_PATIENCE, SHORT)
    registry = await make_registry(Rude(chunks=OSError, aclose=trouble), failure_ttl=0)
    async with asyncio.timeout(LONG):
        for _ in range(2):
            with pytest.raises(StoreError, match="The store failed"):
                await registry.load("m")
            await assert_serves(registry)


@pytest.mark.parametrize("trouble", TROUBLES, ids=str_of)
async def test_a_load_that_failed_says_what_failed(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch, trouble: Kind | None
) -> None:
    """F6: an artifact that is refused is the caller's news, not that the store would not let go of it."""
    monkeypatch.setattr(ACLOSE_PATIENCE, SHORT)
    store = Rude(aclose=trouble)
    store.artifacts["m"] = b"{broken"
    registry = await make_registry(store, failure_ttl=0)
    async with asyncio.timeout(LONG):
        with pytest.raises(CorruptArtifactError):
            await registry.load("m")


@pytest.mark.parametrize("place", ["fetch", "chunks"])
@pytest.mark.parametrize("trouble", TROUBLES[1:], ids=str_of)
async def test_whatever_a_store_raises_each_caller_gets_a_store_error(
    make_registry: MakeRegistry, place: str, trouble: Kind
) -> None:
    """F6: of a library's own kind, or a cancellation that nobody of us has asked for; the registry goes on."""
    registry = await make_registry(Rude(**{place: trouble}), failure_ttl=0)
    async with asyncio.timeout(LONG):
        outcomes = await asyncio.gather(*(registry.load("m") for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreError] * 3
    assert all(f"{trouble.__name__}: gone" in str(outcome) for outcome in outcomes)
    await assert_serves(registry)
    assert registry.stats().bytes_reserved == 0
    await all_loads_ended()


@pytest.mark.parametrize("trouble", TROUBLES[1:], ids=str_of)
async def test_what_a_store_raises_is_told_to_its_callers_alone(make_registry: MakeRegistry, trouble: Kind) -> None:
    """F6: the event loop has nothing to complain of, such as an exception that nobody has retrieved."""
    complaints = listen_to_the_loop()
    registry = await make_registry(Rude(fetch=trouble), failure_ttl=0)
    for _ in range(2):  # what failed last is remembered, for explain()
        with suppress(StoreError):
            await registry.load("m")
    await all_loads_ended()
    assert complaints() == []


# Closing


@pytest.mark.parametrize("place", ["fetch", "chunks", "aclose"])
async def test_a_store_that_hangs_does_not_hold_up_close(
    no_processes_left: None, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """F11: a load is cancelled, and its waiters told, wherever the store has it."""
    monkeypatch.setattr(CLOSE_PATIENCE, SHORT)
    store = Rude(**{place: None})
    async with asyncio.timeout(LONG):
        registry = await ModelRegistry(store, workers=1, memory_budget="64 MiB").start()
        call = asyncio.create_task(registry.load("m"))
        await store.reached.wait()
        await registry.close(drain=0)
        if place == "aclose":
            assert (await call).name == "m"
        else:
            with pytest.raises(RegistryClosedError):
                await call
    oracle.check_gone(registry)


async def test_close_does_not_wait_for_a_worker_that_does_not_come_up(
    no_processes_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F11: a predictor's import may take for ever, when the registry starts or when a worker is replaced."""
    reached = asyncio.Event()

    greet = Worker._greet

    async def wait_in_vain(worker: Worker) -> None:
        reached.set()
        worker.hello = asyncio.get_running_loop().create_future()
        await greet(worker)

    registry = await ModelRegistry(Rude(), workers=1, memory_budget="64 MiB").start()
    monkeypatch.setattr(Worker, "_greet", wait_in_vain)
    registry._pool.workers[0].process.kill()
    await reached.wait()
    async with asyncio.timeout(LONG):
        await registry.close()
    oracle.check_gone(registry)
    reached.clear()
    registry = ModelRegistry(Rude(), workers=2, memory_budget="64 MiB")
    starting = asyncio.create_task(registry.start())
    await reached.wait()
    async with asyncio.timeout(LONG):
        await registry.close()
        with pytest.raises(RegistryClosedError):
            await starting
    oracle.check_gone(registry)


class Stubborn(Rude):
    """Does not let itself be cancelled; ``freed`` ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.freed = asyncio.Event()

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        self.reached.set()
        while not self.freed.is_set():
            with suppress(asyncio.CancelledError):
                await self.freed.wait()
        return await super().fetch(name)


async def test_a_store_that_does_not_let_go_of_a_load_is_left_behind(
    no_processes_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F11: close waits for it as long as it has patience, and frees all the rest."""
    monkeypatch.setattr(CLOSE_PATIENCE, SHORT)
    store = Stubborn()
    registry = await ModelRegistry(store, workers=1, memory_budget="64 MiB").start()
    call = asyncio.create_task(registry.load("m"))
    await store.reached.wait()
    async with asyncio.timeout(LONG):
        await registry.close(drain=0)
        assert not registry._pool.workers
        store.freed.set()
        with pytest.raises(RegistryClosedError):
            await call
        await all_loads_ended()
    oracle.check_gone(registry)


async def test_who_waits_for_such_a_load_is_told_when_the_registry_closes(
    no_processes_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F11: no caller waits for a store longer than close does."""
    monkeypatch.setattr(CLOSE_PATIENCE, SHORT)
    store = Stubborn()
    registry = await ModelRegistry(store, workers=1, memory_budget="64 MiB").start()
    call = asyncio.create_task(registry.load("m"))
    await store.reached.wait()
    async with asyncio.timeout(LONG):
        await registry.close(drain=0)
        await settle()
        told = call.done()
        store.freed.set()
        with pytest.raises(RegistryClosedError):
            await call
        await all_loads_ended()
    assert told


@pytest.mark.parametrize("trouble", TROUBLES, ids=str_of)
async def test_a_store_that_cannot_be_closed_is_closed_last(
    no_processes_left: None, monkeypatch: pytest.MonkeyPatch, trouble: Kind | None
) -> None:
    """F11: whatever becomes of it, and however long that takes, workers and models are gone."""
    monkeypatch.setattr(CLOSE_PATIENCE, SHORT)
    complaints = listen_to_the_loop()
    descriptors = oracle.open_descriptors()
    registry = await ModelRegistry(Rude(close=trouble), workers=1, memory_budget="64 MiB").start()
    await registry.load("good")
    async with asyncio.timeout(LONG) as limit:
        with suppress(OSError, Strange, asyncio.CancelledError, ModelCacheError):
            await registry.close()
    assert not limit.expired()
    await settle()
    oracle.check_gone(registry)
    assert oracle.open_descriptors() <= descriptors
    with pytest.raises(RegistryClosedError):
        await registry.load("good")
    assert complaints() == []


async def test_a_store_that_never_says_it_is_done_keeps_nobody_waiting(make_registry: MakeRegistry) -> None:
    """P3: it goes on to deliver nothing after the last byte, and never waits; others have their turn all the same."""
    empty = turns = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal empty
        yield MODEL.ubj
        while True:
            empty += 1
            yield b""

    class Endless(MemoryStore):
        async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
            return Artifact(version="1", size=len(MODEL.ubj), suffix=".ubj", chunks=chunks())

    registry = await make_registry(Endless({}), load_timeout=0.5)
    endless = asyncio.create_task(registry.predict("m", ROWS))
    while not endless.done():
        turns += 1
        await asyncio.sleep(0)
    assert isinstance(endless.exception(), LoadTimeoutError)
    assert 1 < empty <= turns


async def test_a_store_that_uses_its_buffer_again_is_read_before(make_registry: MakeRegistry) -> None:
    """A4: what was delivered last waits for the store to say so, and must not be another thing by then."""
    buffer = bytearray(MODEL.ubj)

    async def chunks() -> AsyncIterator[bytes]:
        yield memoryview(buffer)  # type: ignore[misc]
        buffer[:] = bytes(len(buffer))

    class Reusing(MemoryStore):
        async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
            return Artifact(version="1", size=len(buffer), suffix=".ubj", chunks=chunks())

    registry = await make_registry(Reusing({}))
    assert np.array_equal(await registry.predict("m", ROWS), MODEL.expected(ROWS))
