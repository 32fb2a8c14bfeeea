"""Hot copies: a model that one worker alone cannot answer for gets further ones, and gives way to everybody else."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import odd
import oracle
import zoo
from conftest import settle
from modelcache import Event, MemoryStore, ModelEvicted, ModelNotFoundError, ModelRegistry
from modelcache.copying import pick_seat
from modelcache.testing import FakeClock, GatedStore

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from conftest import MakeRegistry
    from modelcache.cache.entry import Entry
    from modelcache.pool.pool import Worker
    from modelcache.resident import Resident

WAITING = 8
"""As many calls as make a long line."""
ROW = [[odd.PREDICT, 21.0]]


def home(registry: ModelRegistry, name: str) -> Entry[Resident]:
    entry: Entry[Resident] = registry._state.ledger.table[name]
    return entry


def worker_of(registry: ModelRegistry, name: str) -> Worker:
    return home(registry, name).value.worker


def look(
    registry: ModelRegistry,
    *busy: Worker,
    times: int = 2,
    line: float = WAITING,
    slices: Mapping[int, float] = MappingProxyType({}),
) -> None:
    """Let the registry look ``times`` in a row, while only ``busy`` workers compute."""
    for worker in registry._pool.workers:
        worker.busy, worker.line = float(worker in busy), line
        worker.slices = dict(slices) if worker in busy else {}
    for _ in range(times):
        registry._copier.look()


async def copied(registry: ModelRegistry) -> None:
    """Wait until nothing is loading any more."""
    while registry._loader.tasks:
        await asyncio.wait(registry._loader.tasks)


class Line:
    """Calls that wait for one model, which stands at a gate."""

    def __init__(self, gate: odd.Gate, calls: list[asyncio.Task[Any]]) -> None:
        self._gate = gate
        self._calls = calls

    async def let_through(self) -> None:
        self._gate.open()
        await asyncio.gather(*self._calls)


@pytest.fixture
def gate(tmp_path: Path) -> odd.Gate:
    return odd.Gate(tmp_path / "gate")


@pytest.fixture
def store(gate: odd.Gate) -> GatedStore:
    """Models "hot" and "other", whose rows can wait at the gate; nothing else waits."""
    found = GatedStore({f"{name}.json": odd.artifact(gate=gate.path) for name in ("hot", "other")})
    found.open("hot", "other")
    return found


async def line_up(registry: ModelRegistry, gate: odd.Gate, name: str = "hot") -> Line:
    """Let so many calls wait for ``name`` that its line is long."""
    await registry.load(name)
    rows = [[[odd.WAIT, 1.0]], *[ROW] * (WAITING - 1)]
    calls = [asyncio.create_task(registry.predict(name, row)) for row in rows]
    await settle()
    gate.wait_for_worker()
    return Line(gate, calls)


async def with_copy(registry: ModelRegistry, gate: odd.Gate) -> Line:
    """Have "hot" copied, and calls that wait for the first of its workers."""
    line = await line_up(registry, gate)
    look(registry, worker_of(registry, "hot"))
    await copied(registry)
    assert registry.stats().copies == 1
    return line


class TestMaking:
    """When a model is copied, and when it is not."""

    async def test_a_long_line_at_a_busy_worker_is_shared(
        self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate
    ) -> None:
        """A model whose line stays long is brought into the other worker, which answers while the first is busy."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await with_copy(registry, gate)
        oracle.check(registry)
        assert (await registry.predict("hot", ROW)).tolist() == [42.0]
        (info,) = registry.loaded()
        assert set(info.workers) == {worker.pid for worker in registry._pool.workers}
        assert registry.stats().bytes_resident == 2 * info.size_bytes
        assert (registry.stats().copies_made, registry.stats().loads) == (1, 1)
        assert all(str(pid) in registry.explain("hot") for pid in info.workers)
        await line.let_through()

    @pytest.mark.parametrize(("share", "copies"), [(0.5, 1), (0.4, 0)])
    async def test_long_calls_at_a_busy_worker_are_shared(
        self, make_registry: MakeRegistry, store: GatedStore, share: float, copies: int
    ) -> None:
        """Few wait for a model that takes most of a worker's time, in slices: all their rows do."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        await registry.load("hot")
        worker, number = worker_of(registry, "hot"), home(registry, "hot").value.number
        look(registry, worker, line=2.0, slices={number: share, number + 1: 1 - share})
        await copied(registry)
        assert registry.stats().copies == copies

    async def test_the_long_calls_of_a_copy_are_its_originals(
        self, make_registry: MakeRegistry, store: GatedStore
    ) -> None:
        """What keeps a copy's worker busy is copied from where it came: there is one list of workers that hold it."""
        registry = await make_registry(store, workers=3, predictor=odd.ODD)
        await registry.load("hot")
        registry._loader.copy(home(registry, "hot"))
        await copied(registry)
        (copy,) = home(registry, "hot").copies
        look(registry, copy.value.worker, line=1.0, slices={copy.value.number: 1.0})
        await copied(registry)
        assert len(home(registry, "hot").copies) == 2

    async def test_one_look_is_not_enough(self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate) -> None:
        """A line that is long at one look only was a burst."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await line_up(registry, gate)
        look(registry, worker_of(registry, "hot"), times=1)
        look(registry, times=1)
        look(registry, worker_of(registry, "hot"), times=1)
        await copied(registry)
        assert registry.stats().copies == 0
        await line.let_through()

    @pytest.mark.parametrize("busy", ["none", "both"])
    async def test_a_copy_would_not_help(
        self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate, busy: str
    ) -> None:
        """Another worker does not help calls that wait for something else than computing, nor if it computes itself."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await line_up(registry, gate)
        look(registry, *(registry._pool.workers if busy == "both" else ()))
        await copied(registry)
        assert registry.stats().copies == 0
        await line.let_through()

    async def test_it_displaces_nobody(self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate) -> None:
        """L3: a copy takes only bytes that are free."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        await registry.load("other")
        line = await line_up(registry, gate)
        registry.resize(registry.stats().bytes_resident + home(registry, "hot").size - 1)
        look(registry, worker_of(registry, "hot"))
        await copied(registry)
        assert registry.stats().copies == 0
        assert [info.name for info in registry.loaded()] == ["other", "hot"]
        await line.let_through()

    async def test_another_version_is_no_copy(
        self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate
    ) -> None:
        """S3: a copy has the version of its original, or there is none."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await line_up(registry, gate)
        store.put("hot.json", odd.artifact(gate=gate.path, another=True))
        look(registry, worker_of(registry, "hot"))
        await copied(registry)
        assert (registry.stats().copies, registry.stats().load_failures) == (0, 0)
        await line.let_through()

    async def test_a_failed_copy_harms_nobody(
        self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate
    ) -> None:
        """F8: the failure is not remembered against the model, which is resident; a later look tries again."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await line_up(registry, gate)
        store.shut("hot")
        look(registry, worker_of(registry, "hot"))
        await store.fetched(2)
        store.fail("hot", OSError("the store is down"))
        await copied(registry)
        assert registry.stats().copies == 0
        assert registry._state.failures.recall("hot") is None
        store.open("hot")
        look(registry, worker_of(registry, "hot"), times=4)
        await copied(registry)
        assert registry.stats().copies == 1
        await line.let_through()

    async def test_the_store_is_not_asked_in_vain(
        self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate
    ) -> None:
        """Without bytes for a copy nothing is fetched; and while the store is down it is asked less and less."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await line_up(registry, gate)
        fetches = len(store.fetches)
        registry.resize(home(registry, "hot").size)
        look(registry, worker_of(registry, "hot"), times=20)
        await copied(registry)
        assert len(store.fetches) == fetches
        registry.resize("64 MiB")
        store.shut("hot")
        for _ in range(30):
            look(registry, worker_of(registry, "hot"), times=1)
            await settle()
            store.fail("hot", OSError("the store is down"))
            await copied(registry)
        assert len(store.fetches) == fetches + 4
        await line.let_through()

    async def test_it_is_made_once(self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate) -> None:
        """F1: while a copy is being loaded no other is."""
        registry = await make_registry(store, workers=3, predictor=odd.ODD)
        line = await line_up(registry, gate)
        store.shut("hot")
        look(registry, worker_of(registry, "hot"), times=5)
        store.open("hot")
        await copied(registry)
        assert registry.stats().copies == 1
        await line.let_through()

    async def test_the_original_leaves_meanwhile(
        self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate
    ) -> None:
        """L5: what was loaded for an original that is gone is freed again."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await line_up(registry, gate)
        store.shut("hot")
        look(registry, worker_of(registry, "hot"))
        unloading = asyncio.create_task(registry.unload("hot"))
        await settle()
        store.open("hot")
        await copied(registry)
        await line.let_through()
        await unloading
        assert registry.stats().bytes_resident == registry.stats().copies == 0

    async def test_an_unload_ends_it(self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate) -> None:
        """L5: when ``unload`` returns, nothing of the model is on its way any more."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await line_up(registry, gate)
        store.shut("hot")
        look(registry, worker_of(registry, "hot"))
        await settle()
        unloading = asyncio.create_task(registry.unload("hot"))
        await settle()
        await line.let_through()
        assert await unloading
        assert not registry._state.flights.airborne

    async def test_closing_meanwhile(self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate) -> None:
        """F11: close ends a copy that is on its way."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await line_up(registry, gate)
        store.shut("hot")
        look(registry, worker_of(registry, "hot"))
        await settle()
        closing = asyncio.create_task(registry.close())
        await settle()
        await line.let_through()
        await closing
        oracle.check_gone(registry)


class TestLeaving:
    """A copy is the first to go, and goes with its original."""

    async def test_it_is_shed_first(self, make_registry: MakeRegistry) -> None:
        """L3: a model that needs room gets that of a copy, however long ago other models were used."""
        model = zoo.model()
        registry = await make_registry(MemoryStore({f"{name}.ubj": model.ubj for name in "abc"}), workers=2)
        for name in "cab":
            await registry.load(name)
        await registry.unload("c")  # what it takes is known from now on
        registry._loader.copy(home(registry, "b"))
        await copied(registry)
        registry.resize(registry.stats().bytes_resident + home(registry, "b").size // 2)
        events: list[Event] = []
        registry.subscribe(events.append)
        await registry.load("c")
        assert {info.name for info in registry.loaded()} == {"a", "b", "c"}
        assert registry.stats().copies == 0
        assert not any(isinstance(event, ModelEvicted) for event in events)

    async def test_a_call_holds_it(self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate) -> None:
        """L4: a copy with a call in flight is not shed."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await with_copy(registry, gate)
        (copy,) = home(registry, "hot").copies
        call = asyncio.create_task(registry.predict("hot", ROW))
        await asyncio.sleep(0)
        registry.resize(1)
        assert home(registry, "hot").copies == (copy,)
        assert (await call).tolist() == [42.0]
        assert not registry._state.ledger.copies
        await line.let_through()
        registry.resize("64 MiB")

    @pytest.mark.parametrize("how", ["unload", "refresh"])
    async def test_it_leaves_with_its_original(self, make_registry: MakeRegistry, how: str) -> None:
        """S3, F10: what takes a model out of memory, or puts another version in its place, does so in all workers."""
        store = MemoryStore({"m.ubj": zoo.model().ubj})
        registry = await make_registry(store, workers=2)
        await registry.load("m")
        registry._loader.copy(home(registry, "m"))
        await copied(registry)
        store.put("m.ubj", zoo.model(seed=1).ubj)
        if how == "unload":
            await registry.unload("m")
        else:
            await registry.refresh("m")
        answers = await asyncio.gather(*(registry.predict("m", zoo.rows(1)) for _ in range(20)))
        assert np.array_equal(np.unique(answers), zoo.model(seed=1).expected(zoo.rows(1)))
        assert registry.stats().copies == 0

    async def test_a_call_of_a_copy_unloads_no_original(self, make_registry: MakeRegistry) -> None:
        """Without ``retain`` it is the last call of a model that unloads it, and of a pinned one none does."""
        registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}), workers=2, retain=False)
        await registry.pin("m")
        registry._loader.copy(home(registry, "m"))
        await copied(registry)
        await asyncio.gather(*(registry.predict("m", zoo.rows(1)) for _ in range(8)))
        assert [info.name for info in registry.loaded()] == ["m"]


class TestWorkersThatEnd:
    """Rule P1 for models that are in several workers."""

    async def test_a_copy_takes_over(self, make_registry: MakeRegistry) -> None:
        """The original's worker dies: the copy is the model from then on, pinned as it was, and nothing is loaded."""
        registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}), workers=3)
        await registry.pin("m")
        for _ in range(2):
            registry._loader.copy(home(registry, "m"))
            await copied(registry)
        home(registry, "m").past_hits = 7
        events: list[Event] = []
        registry.subscribe(events.append)
        worker = worker_of(registry, "m")
        worker.process.kill()
        await worker.ended
        while not worker.gone:
            await asyncio.sleep(0)
        oracle.check(registry)
        invocation = await registry.invoke("m", zoo.rows(1))
        assert invocation.tier == "memory"
        assert invocation.model.pinned
        assert len(invocation.model.workers) == 2
        assert invocation.model.total_hits == 7 + invocation.model.hits
        assert (registry.stats().loads, registry.stats().copies) == (1, 1)
        assert [getattr(event, "models", None) for event in events] == [()]

    async def test_a_renewal_goes_on_with_the_copy(self, make_registry: MakeRegistry) -> None:
        """S2, S3: what the store is asked about meanwhile is the copy by then, which was used when its original was."""
        clock, store = FakeClock(), GatedStore({"m.ubj": zoo.model().ubj})
        store.open("m")
        registry = await make_registry(store, workers=2, clock=clock)
        await registry.load("m")
        registry._loader.copy(home(registry, "m"))
        await copied(registry)
        store.shut("m")
        refreshing = asyncio.create_task(registry.refresh("m"))
        await store.fetched(3)
        worker = worker_of(registry, "m")
        worker.process.kill()
        while not worker.gone:
            await asyncio.sleep(0)
        assert registry.stats().lru_age == 0
        store.fail("m", ModelNotFoundError("deleted"))
        with pytest.raises(ModelNotFoundError):
            await refreshing
        assert registry.loaded() == []

    async def test_a_lost_copy_is_no_lost_model(self, make_registry: MakeRegistry) -> None:
        """The copy's worker dies: the original goes on, and no eviction is told."""
        registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}), workers=2)
        await registry.load("m")
        registry._loader.copy(home(registry, "m"))
        await copied(registry)
        (copy,) = home(registry, "m").copies
        copy.value.worker.process.kill()
        while not copy.value.worker.gone:
            await asyncio.sleep(0)
        assert registry.stats().copies == 0
        assert registry.stats().evictions == {}
        assert (await registry.invoke("m", zoo.rows(1))).tier == "memory"

    async def test_a_call_of_a_copy_is_retried(
        self, make_registry: MakeRegistry, store: GatedStore, gate: odd.Gate
    ) -> None:
        """P1: a call that dies with a copy's worker is answered by the original's."""
        registry = await make_registry(store, workers=2, predictor=odd.ODD)
        line = await with_copy(registry, gate)
        (copy,) = home(registry, "hot").copies
        copy.value.worker.process.kill()
        call = asyncio.create_task(registry.predict("hot", ROW))
        await settle()
        assert not call.done()
        await line.let_through()
        assert (await call).tolist() == [42.0]


class _Requests:
    def __init__(self, waiting: int) -> None:
        self.waiting = waiting


def _entry(*lines: int) -> Any:
    """Return what looks like an entry whose workers have these lines, the original's first."""
    entries: list[Any] = []
    for waiting in lines:
        worker = type("Worker", (), {"requests": _Requests(waiting)})
        entries.append(type("Entry", (), {"value": type("Place", (), {"worker": worker}), "copies": ()}))
    entries[0].copies = tuple(entries[1:])
    return entries[0]


@pytest.mark.parametrize(
    ("lines", "chosen"),
    [
        ((0, 0), 0), ((1, 0), 0), ((2, 0), 1), ((2, 2), 0), ((9, 3, 0), 1), ((9, 9, 0), 2), ((5, 4, 4), 0),
        ((20, 19), 1), ((20, 20), 0),
    ],
)  # fmt: skip
def test_bounded_loads(lines: tuple[int, ...], chosen: int) -> None:
    """A call goes to the first worker whose line is at most a quarter above the average with it, and not full."""
    entry = _entry(*lines)
    assert pick_seat(entry, limit=20) is (entry, *entry.copies)[chosen]
