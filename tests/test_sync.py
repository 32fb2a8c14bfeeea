"""modelcache.sync: the registry for threads, made of the asynchronous one."""

from __future__ import annotations

import asyncio
import gc
import inspect
import signal
import socket
import subprocess
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import ContextVar
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import modelcache
import oracle
import zoo
from apps import PATIENCE
from modelcache import (
    FeatureMismatchError,
    InvalidInputError,
    InvalidModelNameError,
    LoadTimeoutError,
    MemoryStore,
    ModelCacheError,
    ModelEvicted,
    ModelLoaded,
    ModelNotFoundError,
    PreloadProgress,
    RegistryClosedError,
    errand,
    loop_thread,
)
from modelcache.errand import END, Errand
from modelcache.sync import Lease, ModelRegistry
from modelcache.testing import GatedStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from modelcache import Artifact, Event, NotModified

ROWS = zoo.rows(3)
ANSWER = zoo.model().expected(ROWS)


def close_and_check(registry: ModelRegistry) -> None:
    """Nothing is lost on the way, and nothing is left at the end."""
    inner = registry._registry
    registry._thread.ask(oracle.check, inner)
    registry.close(drain=5)
    oracle.check_gone(inner)
    assert not registry._thread._under_way
    assert registry._thread._thread is None or not registry._thread._thread.is_alive()


def check_nothing_is_under_way(registry: ModelRegistry) -> None:
    """What has been given up ends, and nobody else waits for anything."""

    async def rest() -> None:
        tasks = {errand._task for errand in registry._thread._under_way if errand._task is not None}
        others = tasks - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)

    registry._thread.call(rest)
    assert not registry._thread._under_way


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """A process that a shell has started in the background ignores SIGINT, and so do the tests in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make(no_processes_left: None) -> Iterator[Callable[..., ModelRegistry]]:
    """Make registries; all are closed after the test, and nothing must be left of them."""
    with ExitStack() as stack:

        def make_one(store: Any, **options: Any) -> ModelRegistry:
            registry = ModelRegistry(store, **{"workers": 1, "memory_budget": "64 MiB", **options})
            stack.callback(close_and_check, registry)
            return registry

        yield make_one


@pytest.fixture(scope="module")
def registry() -> Iterator[ModelRegistry]:
    """One for all tests that leave it as it was."""
    store = MemoryStore({f"city_{index}.ubj": zoo.model().ubj for index in range(8)})
    with ModelRegistry(store, workers=1, memory_budget="64 MiB") as found:
        yield found
        found._thread.ask(oracle.check, found._registry)


# The shape


def parameters(function: Any) -> list[inspect.Parameter]:
    """What it takes, whatever the annotations say."""
    return [each.replace(annotation=each.empty) for each in inspect.signature(function).parameters.values()]


def public(kind: type[Any]) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_no_method_is_forgotten() -> None:
    """Each method of the asynchronous registry is here, and no other."""
    assert public(ModelRegistry) == public(modelcache.ModelRegistry)
    assert public(Lease) == public(modelcache.Lease) - {"check_held"}  # which the other's predict() calls


@pytest.mark.parametrize("name", sorted(public(modelcache.ModelRegistry)))
def test_a_method_takes_what_the_asynchronous_one_takes(name: str) -> None:
    """The same parameters in the same order, kinds and defaults; documented; and nobody has to await it."""
    method = getattr(ModelRegistry, name)
    assert parameters(method) == parameters(getattr(modelcache.ModelRegistry, name))
    assert inspect.getdoc(method)
    assert not inspect.iscoroutinefunction(method)
    assert not inspect.isasyncgenfunction(method)


def test_the_constructor_takes_what_the_asynchronous_one_takes() -> None:
    """The same parameters, for type checkers and for help()."""
    assert parameters(ModelRegistry) == parameters(modelcache.ModelRegistry)
    with pytest.raises(ValueError, match="workers is 0"):
        ModelRegistry(MemoryStore(), workers=0)


def test_a_lease_predicts_as_the_asynchronous_one_does() -> None:
    """The same parameters."""
    assert parameters(Lease.predict) == parameters(modelcache.Lease.predict)


def test_constructing_touches_nothing(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """It can be made at the top of a module, also before a fork; what is known can be asked without starting it."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("constructing a registry must not do that")

    for owner, name in (
        (asyncio, "new_event_loop"), (socket, "socketpair"), (subprocess, "Popen"), (threading.Thread, "start"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, forbidden)
    registry = ModelRegistry(MemoryStore(), memory_budget="64 MiB")
    assert registry.loaded() == []
    assert registry.stats().budget == 64 << 20
    assert registry.explain("m").startswith("m is cold")
    registry.resize("32 MiB")
    registry.unpin("m")
    assert repr(registry).startswith("<sync.ModelRegistry memory (0 artifacts) 0 ready, 0 loading, 0.0/32.0 MiB")
    del registry
    assert not recwarn.list


# Calls


def test_every_method_does_what_its_asynchronous_one_does(make: Callable[..., ModelRegistry]) -> None:
    """From the first call, which starts it, to the last."""
    store = MemoryStore({"m.ubj": zoo.model().ubj, "broken.ubj": b"{"})
    registry = make(store)
    assert np.array_equal(registry.predict("m", ROWS), ANSWER)
    invocation = registry.invoke("m", ROWS, output="margin", timeout=30)
    assert (invocation.tier, invocation.model.name) == ("memory", "m")
    assert registry.start() is registry
    assert registry.load("m").n_features == zoo.N
    assert registry.pin("m").pinned
    registry.unpin("m")
    assert [info.name for info in registry.loaded()] == ["m"]
    assert not registry.loaded()[0].pinned
    store.put("m.ubj", zoo.model(seed=1).ubj)
    registry.refresh("m")
    assert np.array_equal(registry.predict("m", ROWS), zoo.model(seed=1).expected(ROWS))
    assert sorted(registry.names()) == ["broken", "m"]
    assert list(registry.names("b")) == ["broken"]
    report = registry.preload(registry.names())
    assert ([info.name for info in report.loaded], set(report.failed)) == (["m"], {"broken"})
    with registry.acquire("m") as lease:
        assert np.array_equal(lease.predict(ROWS), zoo.model(seed=1).expected(ROWS))
        assert (lease.name, lease.model.name) == ("m", "m")
        assert repr(lease).startswith("<Lease ")
    with pytest.raises(ModelCacheError, match="has ended"):
        lease.predict(ROWS)
    with registry.acquire_many(["m"]) as leases:
        assert registry._thread.ask(lambda: registry._registry._state.ledger.leases) == 1
        assert [lease.name for lease in leases] == ["m"]
    assert registry._thread.ask(lambda: registry._registry._state.ledger.leases) == 0
    assert registry.stats().hits > 0
    assert "m is resident" in registry.explain("m")
    assert registry.unload("m")
    assert not registry.unload("m")
    registry.resize("32 MiB")
    assert registry.stats().budget == 32 << 20


@pytest.mark.parametrize(
    ("name", "rows", "error"),
    [
        ("nowhere", ROWS, ModelNotFoundError), ("city_0", [[1, 2]], FeatureMismatchError),
        ("city_0", [["x"]], InvalidInputError),
    ],
)  # fmt: skip
def test_errors_are_those_of_the_asynchronous_registry(
    registry: ModelRegistry, name: str, rows: Any, error: type[ModelCacheError]
) -> None:
    """With their facts, and a traceback that shows where they were raised."""
    with pytest.raises(error) as raised:
        registry.predict(name, rows)
    assert raised.value.model in (name, None)
    assert any("answering" in str(entry.path) for entry in raised.traceback)


def test_a_cancelled_error_of_the_store_comes_through(make: Callable[..., ModelRegistry]) -> None:
    """As from the asynchronous registry: nobody has closed this one."""

    class Cancelled(MemoryStore):
        async def names(self, prefix: str = "") -> AsyncIterator[str]:
            yield f"{prefix}m"
            raise asyncio.CancelledError

    names = make(Cancelled()).names()
    assert next(names) == "m"
    with pytest.raises(asyncio.CancelledError):
        next(names)


@pytest.mark.parametrize("way", ["names", "half of the names", "acquire", "preload", "an error"])
def test_what_a_call_leaves_is_freed_at_once(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Without the garbage collector, which would pause the process now and then."""
    errands: list[weakref.ref[Errand[Any]]] = []

    class Noted(Errand[Any]):
        def __init__(self, start: Any) -> None:
            super().__init__(start)
            errands.append(weakref.ref(self))

    monkeypatch.setattr(loop_thread, "Errand", Noted)
    gc.disable()
    try:
        if way == "acquire":
            with registry.acquire("city_0"):
                pass
        elif way == "preload":
            registry.preload(["city_0", "city_1"])
        elif way == "an error":
            with pytest.raises(InvalidModelNameError):  # of a load that failed, asyncio keeps a cycle by itself
                registry.predict("../nowhere", ROWS)
        else:
            names = registry.names()
            next(names)
            if way == "names":
                list(names)
            del names
        monkeypatch.undo()
        registry.stats()  # by now the loop is done with it
        assert [ref() for ref in errands] == [None]
    finally:
        gc.enable()


def test_a_block_that_fails_lets_go_of_its_model(registry: ModelRegistry) -> None:
    """The error is the block's own, and the lease has ended."""
    with pytest.raises(ZeroDivisionError), registry.acquire("city_1") as lease:
        1 / 0  # noqa: B018
    assert not registry._thread.ask(lambda: lease._lease.held)
    with pytest.raises(ModelNotFoundError), registry.acquire_many(["city_1", "nowhere"]):
        pass
    with pytest.raises(TypeError, match="several names"), registry.acquire_many("city_1"):
        pass
    with pytest.raises(TypeError, match="several names"):
        registry.preload("city_1")


def test_many_threads_share_one_load(make: Callable[..., ModelRegistry]) -> None:
    """F1, of threads: 16 callers of a cold model make one fetch, and each gets the answer to its own rows."""
    store = GatedStore({"m.ubj": zoo.model().ubj})
    registry = make(store)
    boarded = boardings(registry.start())
    with ThreadPoolExecutor(16) as threads:
        batches = [zoo.rows(2, seed) for seed in range(16)]
        calls = [threads.submit(registry.predict, "m", rows) for rows in batches]
        assert all(boarded.acquire(timeout=PATIENCE) for _ in calls)
        assert registry._thread.ask(waiters, registry) == 16
        registry._thread.ask(store.open, "m")
        for call, rows in zip(calls, batches, strict=True):
            assert np.array_equal(call.result(), zoo.model().expected(rows))
        warm = [threads.submit(registry.predict, "m", rows) for rows in batches * 20]
        for call, rows in zip(warm, batches * 20, strict=True):
            assert np.array_equal(call.result(), zoo.model().expected(rows))
    assert store.fetches == ["m"]


def boardings(registry: ModelRegistry) -> threading.Semaphore:
    """Released by each call that comes to wait for a load, from now on."""
    leasing = registry._registry._leasing
    board, boarded = leasing.board, threading.Semaphore(0)

    def board_and_tell(*args: Any, **options: Any) -> Any:
        boarding = board(*args, **options)
        boarded.release()
        return boarding

    leasing.board = board_and_tell  # type: ignore[method-assign]
    return boarded


def waiters(registry: ModelRegistry) -> int:
    return sum(len(flight.live_waiters()) for flight in registry._registry._state.flights.airborne)


def test_the_first_calls_start_one_loop(make: Callable[..., ModelRegistry]) -> None:
    """Threads that call an unstarted registry together start it once."""
    before = loops()
    registry = make(MemoryStore({"m.ubj": zoo.model().ubj}))
    together = threading.Barrier(8)

    def call() -> Any:
        together.wait()
        return registry.predict("m", ROWS)

    with ThreadPoolExecutor(8) as threads:
        for answer in [threads.submit(call) for _ in range(8)]:
            assert np.array_equal(answer.result(), ANSWER)
    assert len(loops() - before) == 1


def loops() -> set[threading.Thread]:
    """The event loops of registries that there are."""
    return {thread for thread in threading.enumerate() if thread.name == "modelcache"}


def test_a_call_carries_its_context(make: Callable[..., ModelRegistry]) -> None:
    """A trace that is under way in the caller's thread is seen by the store."""
    trace: ContextVar[str] = ContextVar("trace", default="none")
    seen = []

    class Traced(MemoryStore):
        async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
            seen.append(trace.get())
            return await super().fetch(name, if_version=if_version)

    registry = make(Traced({"m.ubj": zoo.model().ubj}))
    trace.set("request 7")
    registry.load("m")
    assert seen == ["request 7"]


def test_progress_is_told_in_the_callers_thread(registry: ModelRegistry) -> None:
    """So that a progress bar, or a database session, may be used in it; it may make calls."""
    told: list[tuple[PreloadProgress, threading.Thread]] = []

    def progress(step: PreloadProgress) -> None:
        registry.predict(step.name, ROWS)
        told.append((step, threading.current_thread()))

    registry.preload(registry.names(), on_progress=progress, concurrency=2)
    assert [step.done for step, _ in told] == list(range(1, 9))
    assert {thread for _, thread in told} == {threading.current_thread()}


def test_progress_that_fails_ends_the_preload(registry: ModelRegistry) -> None:
    """As it does in the asynchronous registry."""

    def fail(_: PreloadProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        registry.preload(registry.names(), on_progress=fail)
    check_nothing_is_under_way(registry)


class Endless(MemoryStore):
    """Lists names for ever."""

    listed = 0

    def __init__(self, artifacts: dict[str, bytes] | None = None) -> None:
        super().__init__(artifacts)
        self.let_go = threading.Event()

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        try:
            while True:
                self.listed += 1
                yield f"{prefix}{self.listed}"
        finally:
            self.let_go.set()


def test_names_are_read_as_they_are_wanted(make: Callable[..., ModelRegistry]) -> None:
    """The store is never more than 1,000 names ahead, and is let go of when nobody wants more."""
    store = Endless()
    registry = make(store)
    names = registry.names("m")
    assert [next(names) for _ in range(1500)] == [f"m{number}" for number in range(1, 1501)]
    assert 1500 <= store.listed <= 2501
    del names
    assert store.let_go.wait(PATIENCE)


def test_names_may_be_dropped_in_the_registrys_own_thread(make: Callable[..., ModelRegistry]) -> None:
    """By a subscriber, or by the garbage collector, which runs in any thread: that thread must not wait for itself."""
    store = Endless({"m.ubj": zoo.model().ubj})
    registry = make(store)
    half_read = [registry.names()]
    next(half_read[0])
    registry.subscribe(lambda _: half_read.clear())
    registry.load("m")
    assert not half_read
    assert store.let_go.wait(PATIENCE)


def test_events_are_told_in_the_thread_of_the_registry(make: Callable[..., ModelRegistry]) -> None:
    """What needs no waiting may be asked there; what does is refused, or it would wait for itself."""
    registry = make(MemoryStore({"m.ubj": zoo.model().ubj}))
    events: list[Event] = []
    seen: list[int] = []

    def note(event: Event) -> None:
        events.append(event)
        seen.append(len(registry.loaded()))
        with pytest.raises(RegistryClosedError, match="block the event loop"):
            registry.load("m")

    leave = registry.subscribe(note)
    registry.load("m")
    registry.unload("m")
    leave()
    leave()
    registry.load("m")
    assert [type(event) for event in events] == [ModelLoaded, ModelEvicted]
    assert seen == [1, 0]


async def test_on_an_event_loop_it_refers_to_the_other_registry(registry: ModelRegistry) -> None:
    """A call would block the loop of this thread; in a thread it is welcome, and what does not wait is anywhere."""
    for call in (
        lambda: registry.predict("city_0", ROWS), lambda: registry.acquire("city_0").__enter__(), registry.start,
        lambda: next(registry.names()), registry.close,
    ):  # fmt: skip
        with pytest.raises(RegistryClosedError, match=r"modelcache\.ModelRegistry"):
            call()
    assert registry.stats().worker_restarts == 0
    answer = await asyncio.to_thread(registry.predict, "city_0", ROWS)
    assert np.array_equal(answer, ANSWER)


# Interrupts and ends


class Interrupting(MemoryStore):
    """Presses Ctrl-C when a model is asked for, and never delivers."""

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        if name != "slow":
            return await super().fetch(name, if_version=if_version)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["predict", "acquire", "preload"])
def test_ctrl_c_cancels_the_call(make: Callable[..., ModelRegistry], way: str) -> None:
    """Nobody waits for the load any more, and the registry goes on."""
    registry = make(Interrupting({"m.ubj": zoo.model().ubj}))
    registry.load("m")
    calls: dict[str, Callable[[], Any]] = {
        "predict": lambda: registry.predict("slow", ROWS),
        "acquire": lambda: registry.acquire("slow").__enter__(),
        "preload": lambda: registry.preload(["slow"]),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[way]()
    check_nothing_is_under_way(registry)
    assert registry._thread.ask(waiters, registry) == 0
    registry.predict("m", ROWS)


@pytest.mark.parametrize("way", ["predict", "acquire"])
def test_an_interrupt_before_the_loop_hears_of_the_call(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """It leaves nothing behind, and the loop is woken for the next one."""

    def interrupted(_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(registry._thread._loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.predict("city_0", ROWS) if way == "predict" else registry.acquire("city_0").__enter__()
    assert np.array_equal(registry.predict("city_0", ROWS), ANSWER)
    check_nothing_is_under_way(registry)


@pytest.mark.parametrize("way", ["names", "acquire", "preload", "predict"])
def test_an_interrupt_as_the_last_item_is_read(
    make: Callable[..., ModelRegistry], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Whoever has taken the end mark from the queue, and does not know it yet, waits for no other."""
    registry = make(MemoryStore({"m.ubj": zoo.model().ubj}))
    registry.load("m")

    class Interrupted(SimpleQueue[Any]):
        def get(self, *args: Any, **options: Any) -> Any:
            item = super().get(*args, **options)
            if item is END or way == "acquire":
                monkeypatch.undo()
                raise KeyboardInterrupt
            return item

    calls: dict[str, Callable[[], Any]] = {
        "names": lambda: list(registry.names()),
        "acquire": lambda: registry.acquire("m").__enter__(),
        "preload": lambda: registry.preload(["m"]),
        "predict": lambda: registry.predict("m", ROWS),
    }
    monkeypatch.setattr(errand, "SimpleQueue", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        calls[way]()
    assert registry._thread.ask(lambda: registry._registry._state.ledger.leases) == 0
    check_nothing_is_under_way(registry)


def test_an_interrupt_as_the_thread_starts(make: Callable[..., ModelRegistry], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows of that thread, which ends; the next call starts another."""
    registry = make(MemoryStore({"m.ubj": zoo.model().ubj}))
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_and_interrupt(thread: threading.Thread) -> None:
        monkeypatch.undo()
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        registry.start()
    assert np.array_equal(registry.predict("m", ROWS), ANSWER)
    started[0].join()
    assert registry._thread._thread is not started[0]


def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no thread start, as at a limit, or once the interpreter shuts down."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)


def test_a_thread_that_cannot_start_is_tried_again(
    make: Callable[..., ModelRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many threads at one moment is no reason to refuse calls for ever; whoever asks then is answered."""
    registry = make(MemoryStore({"m.ubj": zoo.model().ubj}))

    def ask_and_fail(_: threading.Thread) -> None:
        assert registry.loaded() == []
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", ask_and_fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            registry.start()
    assert np.array_equal(registry.predict("m", ROWS), ANSWER)


def test_a_block_that_cannot_start_its_thread_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not started by a later call, which nobody would end."""
    store = GatedStore()
    registry = ModelRegistry(store)
    before = loops()
    with monkeypatch.context() as patch:
        no_thread(patch)
        with pytest.raises(RuntimeError, match="can't start new thread"), registry:
            pass
    assert store.closed
    with pytest.raises(RegistryClosedError, match="closed"):
        registry.predict("m", ROWS)
    registry.close()
    assert loops() == before


def test_a_timeout_is_the_loops(make: Callable[..., ModelRegistry]) -> None:
    """A call that is out of time raises what the asynchronous one raises; the load goes on."""
    store = GatedStore({"m.ubj": zoo.model().ubj})
    registry = make(store)
    registry.start()
    with pytest.raises(LoadTimeoutError):
        registry.predict("m", ROWS, timeout=0.01)


def test_close_answers_everybody(make: Callable[..., ModelRegistry]) -> None:
    """Those who wait for a load, and those who come later, get RegistryClosedError; to close again is harmless."""
    store = GatedStore({"m.ubj": zoo.model().ubj})
    registry = make(store)
    boarded = boardings(registry.start())
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(registry.predict, "m", ROWS) for _ in range(4)]
        assert all(boarded.acquire(timeout=PATIENCE) for _ in calls)
        registry.close()
        for call in calls:
            with pytest.raises(RegistryClosedError, match="closed"):
                call.result()
    registry.close()
    for call_again in (lambda: registry.predict("m", ROWS), registry.start, lambda: next(registry.names())):
        with pytest.raises(RegistryClosedError, match="make a new one"):
            call_again()
    assert store.closed
    assert (registry.loaded(), registry.stats().bytes_resident) == ([], 0)
    assert "0 ready" in repr(registry)


def test_ctrl_c_ends_the_draining(make: Callable[..., ModelRegistry]) -> None:
    """What it waited for is waited for no more, and the next close() waits only for the end."""
    registry = make(MemoryStore({"m.ubj": zoo.model().ubj}))
    leasing = registry._registry._leasing
    drained = leasing.drained

    async def interrupt_and_drain(seconds: float) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        await drained(seconds)

    leasing.drained = interrupt_and_drain  # type: ignore[method-assign]
    with registry.acquire("m"):
        with pytest.raises(KeyboardInterrupt):
            registry.close(drain=3600)
        registry.close(drain=3600)
    assert registry.loaded() == []


def test_one_that_never_started_closes_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a thread, which nobody gets while the interpreter shuts down; and cannot be started after that."""
    store = GatedStore()
    registry = ModelRegistry(store)
    no_thread(monkeypatch)
    registry.close()
    assert store.closed
    with pytest.raises(RegistryClosedError, match="closed"):
        registry.start()


def test_a_start_that_fails_leaves_nothing(no_processes_left: None) -> None:
    """Whoever enters a block that never begins has nothing to close."""

    before = loops()
    with pytest.raises(ModelCacheError, match=r"no\.such"), ModelRegistry(MemoryStore(), predictor="no.such:Class"):
        pass
    assert loops() == before


def test_the_end_of_the_loop_is_told(no_processes_left: None, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody's callback ends it: who waits, and who calls later, hears why; the workers end at once."""
    registry = ModelRegistry(MemoryStore({"m.ubj": zoo.model().ubj}), workers=1)

    def leave(_: Event) -> None:
        raise SystemExit(3)

    registry.subscribe(leave)
    for _ in range(2):
        with pytest.raises(RegistryClosedError, match=r"ended by SystemExit\(3\): make a new registry"):
            registry.predict("m", ROWS)
    assert "has broken down" in caplog.text
    registry._thread.join()
    registry.close()


def test_one_that_nobody_closes_warns_and_ends(no_processes_left: None) -> None:
    """A ResourceWarning that names it; its thread and workers end by themselves."""
    registry = ModelRegistry(MemoryStore({"m.ubj": zoo.model().ubj}), workers=1)
    registry.predict("m", ROWS)
    thread = registry._thread
    with pytest.warns(ResourceWarning, match=r"unclosed registry <sync\.ModelRegistry memory"):
        del registry
    thread.join()
