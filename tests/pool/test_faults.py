"""Rules P1 to P4 and P6: workers that die, hang, crash or are too busy, and calls that are answered all the same."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import odd
import oracle
import zoo
from conftest import settle
from halting import go_on, halt
from modelcache import (
    Artifact,
    CorruptArtifactError,
    Event,
    LoadTimeoutError,
    MemoryStore,
    MissingDependencyError,
    ModelCacheError,
    ModelRegistry,
    NotModified,
    OverloadedError,
    PredictTimeoutError,
    RegistryClosedError,
    WorkerCrashedError,
    WorkerDied,
)
from modelcache.loader import _pause
from modelcache.pool.lost import Epitaph

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from conftest import MakeRegistry
    from modelcache.pool.pool import Worker

LONG = 20.0
ROW = [odd.PREDICT, 21.0]


def only_worker(registry: ModelRegistry) -> Worker:
    (worker,) = registry._pool.workers
    return worker


def pid_of(registry: ModelRegistry) -> int:
    return only_worker(registry).pid


def send(registry: ModelRegistry, signal_: signal.Signals) -> None:
    os.kill(pid_of(registry), signal_)


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0)


async def restarted(registry: ModelRegistry, times: int = 1) -> None:
    await until(lambda: registry._pool.restarts >= times)


def make_impatient(registry: ModelRegistry) -> None:
    """Take a worker for stuck after 0.3 s of silence."""
    pool = registry._pool
    pool._patience = 0.3
    assert pool._checking is not None
    pool._checking.cancel()
    pool._check()


def deaths(registry: ModelRegistry) -> list[WorkerDied]:
    """Return a list that grows by each death."""
    found: list[WorkerDied] = []

    def note(event: Event) -> None:
        if isinstance(event, WorkerDied):
            found.append(event)

    registry.subscribe(note)
    return found


@pytest.fixture
def gate(tmp_path: Path) -> odd.Gate:
    return odd.Gate(tmp_path / "gate")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


class Scene:
    """A registry with one worker that is held at a gate whenever the test wants it busy."""

    def __init__(self, registry: ModelRegistry, gate: odd.Gate, log: Path) -> None:
        self.registry = registry
        self.gate = gate
        self._log = log

    async def hold(self) -> asyncio.Task[Any]:
        """Return a call that the worker is at, and stays at until the gate is opened."""
        call = asyncio.create_task(self.registry.predict("odd", [odd.WAIT, 1.0]))
        await self.arrived()
        return call

    async def arrived(self) -> None:
        await until(self.gate.reached)

    def predicted(self) -> list[float]:
        """Return the values of all rows that have been predicted."""
        return [value for line in self._log.read_text().splitlines() for value in json.loads(line)[1]]


@pytest.fixture
async def scene(make_registry: MakeRegistry, gate: odd.Gate, log: Path) -> Scene:
    artifacts = {
        "odd.json": odd.artifact(gate=gate.path, log=str(log)),
        "other.json": odd.artifact(log=str(log)),
        "third.json": odd.artifact(),
    }
    registry = await make_registry(MemoryStore(artifacts), predictor=odd.ODD, queue_limit=8)
    await registry.preload(["odd", "other"])
    return Scene(registry, gate, log)


# P1: workers that are killed


async def test_calls_in_flight_survive_a_kill(scene: Scene) -> None:
    """Rule P1: whoever waited for a worker that is killed gets the answer of the next one."""
    held = await scene.hold()
    others = [asyncio.create_task(scene.registry.predict("other", [0, value])) for value in range(5)]
    await settle()
    send(scene.registry, signal.SIGKILL)
    scene.gate.open()
    await restarted(scene.registry)
    await scene.arrived()  # the retry, in the new worker
    scene.gate.open()
    assert (await held).tolist() == [2]
    assert [(await other).tolist() for other in others] == [[0], [2], [4], [6], [8]]
    assert scene.registry.stats().worker_restarts == 1


async def test_a_second_death_is_reported_to_the_caller(scene: Scene) -> None:
    """Rule P1: after two deaths the call fails, and says of which process and which signal."""
    before = pid_of(scene.registry)
    with pytest.raises(WorkerCrashedError, match="Two workers ended while other was predicting") as caught:
        await scene.registry.predict("other", [odd.KILL, 0])
    error = caught.value
    assert (error.model, error.signal, error.exit_code) == ("other", signal.SIGKILL, -signal.SIGKILL)
    assert error.pid not in (None, before)
    assert "SIGKILL" in str(error)
    assert (await scene.registry.predict("other", ROW)).tolist() == [42], "being killed from outside is no crash"


async def test_slices_survive_a_kill(make_registry: MakeRegistry) -> None:
    """Rule P1, for a call in slices: it is answered whole, and no failure stays behind unseen."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    model, rows = zoo.model(), zoo.rows(60_000)
    registry = await make_registry(MemoryStore({"m.ubj": model.ubj}))
    await registry.load("m")
    call = asyncio.create_task(registry.predict("m", rows))
    await until(lambda: registry.stats().workers[0].predict_latency.count >= 3)
    send(registry, signal.SIGKILL)
    assert np.array_equal(await call, model.expected(rows))
    await settle()
    assert complaints == []


async def test_an_idle_worker_that_is_killed_is_replaced(scene: Scene) -> None:
    """Rule P1: a new worker takes over, and models come back when they are asked for."""
    died = deaths(scene.registry)
    pid = pid_of(scene.registry)
    send(scene.registry, signal.SIGKILL)
    await restarted(scene.registry)
    assert [(event.pid, event.signal, set(event.models)) for event in died] == [(pid, 9, {"odd", "other"})]
    assert scene.registry.loaded() == []
    assert (await scene.registry.predict("other", ROW)).tolist() == [42]
    assert [info.name for info in scene.registry.loaded()] == ["other"]


async def test_pinned_models_come_back_by_themselves(scene: Scene) -> None:
    """Rule P1: what is pinned is loaded again at once, and is pinned still."""
    await scene.registry.pin("other")
    send(scene.registry, signal.SIGKILL)
    await restarted(scene.registry)
    await until(scene.registry.loaded)
    (info,) = scene.registry.loaded()
    assert (info.name, info.pinned, info.workers) == ("other", True, (pid_of(scene.registry),))


class HalfwayStore(MemoryStore):
    """Delivers half of an artifact, and the rest when the test says."""

    def __init__(self, artifacts: dict[str, bytes]) -> None:
        super().__init__(artifacts)
        self.fetches = 0
        self.halfway = asyncio.Event()
        self.go_on = asyncio.Event()

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        artifact = await super().fetch(name, if_version=if_version)
        assert isinstance(artifact, Artifact)
        self.fetches += 1
        return Artifact(
            version=artifact.version, size=artifact.size, suffix=artifact.suffix, chunks=self._cut(artifact.chunks)
        )

    async def _cut(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        data = b"".join([chunk async for chunk in chunks])
        yield data[: len(data) // 2]
        self.halfway.set()
        await self.go_on.wait()
        yield data[len(data) // 2 :]


async def test_a_kill_while_an_artifact_streams_costs_one_more_fetch(make_registry: MakeRegistry) -> None:
    """Rule P1: a load whose worker is killed halfway begins again in another, unnoticed."""
    model, rows = zoo.model(), zoo.rows(2)
    store = HalfwayStore({"m.ubj": model.ubj})
    registry = await make_registry(store)
    call = asyncio.create_task(registry.predict("m", rows))
    await store.halfway.wait()
    send(registry, signal.SIGKILL)
    store.go_on.set()
    assert np.array_equal(await call, model.expected(rows))
    assert store.fetches == 2


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that loses its worker again and again is tried again at once."""
    monkeypatch.setattr("modelcache.loader._LONGEST_PAUSE", 0.0)


class EndingStore(HalfwayStore):
    """Half of its artifact has been delivered whenever the worker is to end."""

    async def kill_at_each_fetch(self, registry: ModelRegistry, *, times: int) -> None:
        for killed in range(times):
            async with asyncio.timeout(LONG):
                await self.halfway.wait()
            self.halfway.clear()
            worker = only_worker(registry)
            send(registry, signal.SIGKILL)
            await until(lambda worker=worker: not worker.alive)  # type: ignore[misc]
            go_on, self.go_on = self.go_on, asyncio.Event()
            go_on.set()
            await restarted(registry, killed + 1)
        self.go_on.set()


@pytest.mark.usefixtures("no_pauses")
async def test_the_deaths_of_workers_do_not_count_against_a_load_on_its_way(make_registry: MakeRegistry) -> None:
    """Rule P1: only what the parser was at can have ended the worker; who came by is tried until it is loaded."""
    model, rows = zoo.model(), zoo.rows(2)
    store = EndingStore({"m.ubj": model.ubj})
    registry = await make_registry(store)
    call = asyncio.create_task(registry.predict("m", rows))
    await store.kill_at_each_fetch(registry, times=5)
    assert np.array_equal(await call, model.expected(rows))
    assert store.fetches == 6


@pytest.mark.usefixtures("no_pauses")
async def test_a_load_on_its_way_gives_up_in_the_end(make_registry: MakeRegistry) -> None:
    """Rule P1: it may be what exhausts the memory, and must not take worker after worker with it."""
    store = EndingStore({"m.ubj": zoo.model().ubj})
    registry = await make_registry(store)
    call = asyncio.create_task(registry.load("m"))
    await store.kill_at_each_fetch(registry, times=9)
    with pytest.raises(WorkerCrashedError, match=r"9 workers ended while m was loading: .* SIGKILL") as caught:
        await call
    assert caught.value.model == "m"


def test_a_load_that_loses_workers_is_tried_at_a_slower_and_slower_pace() -> None:
    """The first time at once; a worker that ends as soon as it is up must not keep the store and the CPU busy."""
    assert [_pause(losses) for losses in range(1, 10)] == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]


async def test_a_kill_while_the_parser_runs_is_retried(make_registry: MakeRegistry, gate: odd.Gate) -> None:
    """Rule P1: nor does it count against the artifact, which has done nothing wrong."""
    registry = await make_registry(
        MemoryStore({"m.json": odd.artifact(on_load="wait", gate=gate.path)}), predictor=odd.ODD
    )
    for kills in range(2):
        call = asyncio.create_task(registry.predict("m", ROW))
        await until(gate.reached)
        send(registry, signal.SIGKILL)
        gate.open()
        await restarted(registry, kills + 1)
        await until(gate.reached)
        gate.open()
        assert (await call).tolist() == [42]
        await registry.unload("m")


async def test_two_kills_while_the_parser_runs_fail_the_load(make_registry: MakeRegistry, gate: odd.Gate) -> None:
    """Rule P1: everyone who waited is told, after the second death."""
    registry = await make_registry(
        MemoryStore({"m.json": odd.artifact(on_load="wait", gate=gate.path)}), predictor=odd.ODD
    )
    calls = [asyncio.create_task(registry.predict("m", ROW)) for _ in range(3)]
    for kills in range(2):
        await until(gate.reached)
        send(registry, signal.SIGKILL)
        gate.open()
        await restarted(registry, kills + 1)
    for call in calls:
        with pytest.raises(WorkerCrashedError, match="Two workers ended while m was loading") as caught:
            await call
        assert caught.value.signal == signal.SIGKILL


async def test_a_kill_during_an_unload_frees_the_bytes(scene: Scene) -> None:
    """Rules P1, L5: bytes are free when the worker acknowledges, or dies."""
    halt(pid_of(scene.registry))
    unloading = asyncio.create_task(scene.registry.unload("other"))
    await settle()
    assert scene.registry.stats().bytes_unloading > 0
    send(scene.registry, signal.SIGKILL)
    assert await unloading
    assert scene.registry.stats().bytes_unloading == 0


async def test_a_lease_outlives_its_worker(scene: Scene) -> None:
    """Rule P1, for leases: the next call through it is answered by another worker."""
    async with scene.registry.acquire("other") as lease:
        send(scene.registry, signal.SIGKILL)
        assert (await lease.predict(ROW)).tolist() == [42]
        await restarted(scene.registry)


async def test_a_load_that_begins_as_the_last_worker_ends_waits_for_the_next(scene: Scene) -> None:
    """Between a worker's end and the moment its keeper notices, nothing is placed anywhere."""
    worker = only_worker(scene.registry)
    worker._lane_lost()
    placed = await scene.registry._pool.place()
    assert placed is not worker
    assert (await scene.registry.predict("third", ROW)).tolist() == [42]


@pytest.mark.parametrize("seed", range(3))
async def test_kills_at_random_moments_lose_no_call(make_registry: MakeRegistry, seed: int) -> None:
    """Rule P1: whatever is under way when a worker is killed, each call is answered rightly or fails by name.

    Callers predict with, unload and pin more models than the budget has room for meanwhile.
    """
    dice = random.Random(seed)
    names = [f"m{index:03}" for index in range(10)]
    registry = await make_registry(MemoryStore(zoo.fleet(10)), workers=2, memory_budget=160_000, failure_ttl=0)
    expected = {name: zoo.model(seed=index % 7).expected(zoo.rows(2)) for index, name in enumerate(names)}
    answered = crashed = 0
    killer = asyncio.create_task(kill_at_random(registry, dice, times=7))

    async def call_at_random() -> None:
        nonlocal answered, crashed
        while not killer.done():
            name, what = dice.choice(names), dice.random()
            try:
                if what < 0.9:
                    assert np.array_equal(await registry.predict(name, zoo.rows(2)), expected[name])
                    answered += 1
                elif what < 0.95:
                    await registry.unload(name)
                else:
                    await registry.pin(name)
                    registry.unpin(name)
            except WorkerCrashedError:
                crashed += 1

    await asyncio.gather(killer, *(call_at_random() for _ in range(8)))
    assert answered > 100
    assert registry.stats().evictions["budget"] > 0
    assert crashed <= 24, "a call fails after two deaths: with 7 kills, 3 times for each of 8 callers at most"
    for name in names:
        assert np.array_equal(await registry.predict(name, zoo.rows(2)), expected[name])


async def kill_at_random(registry: ModelRegistry, dice: random.Random, *, times: int) -> None:
    """Kill either worker, after any number of steps of the loop, and check the books when it has been replaced."""
    for deaths_before in range(times):
        for _ in range(dice.randrange(300)):
            await asyncio.sleep(0)
        os.kill(dice.choice(registry._pool.workers).pid, signal.SIGKILL)
        await restarted(registry, deaths_before + 1)
        oracle.check(registry)


# Models that crash their worker


async def test_a_model_that_crashes_workers_is_quarantined_and_others_are_not(scene: Scene) -> None:
    """Rule A3: two crashes over one model, and it is not loaded again until its artifact changes."""
    registry = scene.registry
    with pytest.raises(WorkerCrashedError, match="SIGABRT") as caught:
        await registry.predict("odd", [odd.ABORT, 0])
    assert (caught.value.model, caught.value.signal) == ("odd", signal.SIGABRT)
    assert "Fatal Python error: Aborted" in str(caught.value), "the worker's last words are passed on"
    with pytest.raises(CorruptArtifactError, match="crashed two workers"):
        await registry.predict("odd", ROW)
    assert (await registry.predict("other", ROW)).tolist() == [42]
    registry._store.put("odd.json", odd.artifact(gate=scene.gate.path, version=[3, 0, 1]))  # type: ignore[attr-defined]
    await registry.unload("odd")
    registry._state.failures.forget("odd")
    assert (await registry.predict("odd", ROW)).tolist() == [42]


async def test_a_call_that_was_in_flight_beside_a_crash_is_answered(scene: Scene) -> None:
    """Rule P1: the innocent lose nothing, and are not suspected for long."""
    held = await scene.hold()
    innocent = asyncio.create_task(scene.registry.predict("other", ROW))
    await settle()
    send(scene.registry, signal.SIGABRT)
    await restarted(scene.registry)
    assert list(scene.registry._loader.quarantine._crashes.values()) == [0.5, 0.5], "it was one of them"
    scene.gate.open()
    await scene.arrived()
    scene.gate.open()
    assert (await innocent).tolist() == [42]
    assert (await held).tolist() == [2]
    assert not scene.registry._loader.quarantine._crashes, "they answered, so it was not them"


async def test_models_that_share_two_crashes_are_not_quarantined(make_registry: MakeRegistry, gate: odd.Gate) -> None:
    """Rule A3: two calls were in flight at two crashes, and nobody knows over which: neither model is locked out."""
    artifact = odd.artifact(gate=gate.path)
    registry = await make_registry(MemoryStore({"one.json": artifact, "two.json": artifact}), predictor=odd.ODD)
    calls = [asyncio.create_task(registry.predict(name, [odd.WAIT, 0])) for name in ("one", "two")]
    for crashes in range(2):
        await until(gate.reached)
        await until(lambda: len(only_worker(registry).requests.pending) == 2)
        send(registry, signal.SIGABRT)
        await restarted(registry, crashes + 1)
        gate.open()
    for call in calls:
        with pytest.raises(WorkerCrashedError):
            await call
    for name in ("one", "two"):
        assert (await registry.predict(name, ROW)).tolist() == [42]


async def test_an_exit_code_is_reported_where_there_is_no_signal(scene: Scene) -> None:
    """A predictor that calls exit() is told from one that is killed."""
    with pytest.raises(WorkerCrashedError, match="ended with exit code 3") as caught:
        await scene.registry.predict("odd", [odd.EXIT, 0])
    assert (caught.value.exit_code, caught.value.signal) == (3, None)


async def test_an_artifact_that_crashes_the_parser_is_quarantined(make_registry: MakeRegistry) -> None:
    """Rule A3: the worker that died had announced which artifact it was about to parse."""
    store = MemoryStore({"bad.json": odd.artifact(on_load="abort"), "good.json": odd.artifact()})
    registry = await make_registry(store, predictor=odd.ODD, failure_ttl=0)
    with pytest.raises(WorkerCrashedError, match="Two workers ended while bad was loading") as caught:
        await registry.load("bad")
    assert (caught.value.model, caught.value.signal) == ("bad", signal.SIGABRT)
    with pytest.raises(CorruptArtifactError, match="crashed two workers"):
        await registry.load("bad")
    assert (await registry.predict("good", ROW)).tolist() == [42]
    store.put("bad.json", odd.artifact())
    assert (await registry.predict("bad", ROW)).tolist() == [42]


class EndlessScene:
    """A registry whose worker never ends parsing the artifact ``m``."""

    def __init__(self, registry: ModelRegistry, gate: odd.Gate) -> None:
        self.registry = registry
        self.gate = gate

    async def load(self, timeout: float) -> asyncio.Task[Any]:
        """Return a load that is given so many seconds, once the parser is at it; other loads are given long."""
        self.registry._loader.timeout = timeout
        loading = asyncio.create_task(self.registry.load("m"))
        await until(self.gate.reached)
        self.registry._loader.timeout = LONG
        return loading


@pytest.fixture
async def endless(make_registry: MakeRegistry, gate: odd.Gate) -> EndlessScene:
    artifacts = {"m.json": odd.artifact(on_load="wait", gate=gate.path), "good.json": odd.artifact()}
    registry = await make_registry(MemoryStore(artifacts), predictor=odd.ODD, failure_ttl=0)
    return EndlessScene(registry, gate)


async def test_a_parse_that_does_not_end_ends_with_its_worker(
    endless: EndlessScene, caplog: pytest.LogCaptureFixture
) -> None:
    """Rules A3, P1: at load_timeout the worker is killed, by name of the artifact; others are loaded by the next."""
    pid = pid_of(endless.registry)
    loading = await endless.load(timeout=0.5)
    bystander = asyncio.create_task(endless.registry.predict("good", ROW))
    with pytest.raises(LoadTimeoutError, match="m took more than"):
        await loading
    assert (await bystander).tolist() == [42]
    assert (
        f"process {pid} was killed by modelcache, since it was still parsing m after load_timeout; it is replaced"
        in caplog.text
    )
    assert endless.registry.stats().worker_restarts == 1
    endless.gate.open()


async def test_an_artifact_that_is_parsed_for_ever_is_quarantined(endless: EndlessScene) -> None:
    """Rule A3: twice, and it is not loaded again until it changes, or it would cost a worker each time."""
    registry = endless.registry
    for ended in range(2):
        loading = await endless.load(timeout=0.4)
        with pytest.raises(LoadTimeoutError):
            await loading
        endless.gate.open()
        await restarted(registry, ended + 1)
    with pytest.raises(CorruptArtifactError, match="was still being parsed by them at load_timeout"):
        await registry.load("m")
    registry._store.put("m.json", odd.artifact())  # type: ignore[attr-defined]
    assert (await registry.predict("m", ROW)).tolist() == [42]
    assert registry.stats().worker_restarts == 2


async def test_a_load_that_is_cancelled_is_not_blamed(endless: EndlessScene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules A3, F11: the registry is closed while the parser runs, which says nothing about the artifact."""
    loading = await endless.load(timeout=LONG)
    monkeypatch.setattr("modelcache.registry._UNLOAD_PATIENCE", 0.0)
    await endless.registry.close(drain=0)
    with pytest.raises(RegistryClosedError):
        await loading
    assert not endless.registry._loader.quarantine._crashes
    endless.gate.open()


async def test_a_load_that_times_out_behind_another_is_not_blamed(endless: EndlessScene) -> None:
    """Rule A3: it has waited for the parser, and its worker goes on with what it is at."""
    first = await endless.load(timeout=LONG)
    endless.registry._loader.timeout = 0.05
    with pytest.raises(LoadTimeoutError):
        await endless.registry.load("good")
    endless.gate.open()
    await first
    assert not endless.registry._loader.quarantine._crashes
    assert endless.registry.stats().worker_restarts == 0


async def test_a_talkative_worker_is_not_blocked(scene: Scene) -> None:
    """All that workers write to standard error is read; only its end is kept."""
    call = [odd.SHOUT, 4.0]
    assert [(await scene.registry.predict("odd", call, timeout=LONG)).tolist() for _ in range(3)] == [[8]] * 3
    send(scene.registry, signal.SIGKILL)
    await restarted(scene.registry)


async def test_a_process_started_by_a_predictor_holds_up_nothing(scene: Scene) -> None:
    """A grandchild that keeps standard error open does not keep the registry from replacing its parent."""
    await scene.registry.predict("odd", [odd.SPAWN, 0])
    await scene.arrived()
    send(scene.registry, signal.SIGKILL)
    assert (await scene.registry.predict("odd", ROW)).tolist() == [42]
    scene.gate.open()  # and the grandchild ends


# P2: workers that are stuck


async def test_a_stopped_worker_is_replaced_and_its_calls_are_retried(scene: Scene) -> None:
    """Rule P2: it is found although none of its calls has a timeout, killed, and its calls go to the next."""
    make_impatient(scene.registry)
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    died = deaths(scene.registry)
    halt(pid_of(scene.registry))
    calls = [asyncio.create_task(scene.registry.predict("other", [0, value])) for value in range(4)]
    async with asyncio.timeout(LONG):
        assert [(await call).tolist() for call in calls] == [[0], [2], [4], [6]]
    assert [event.signal for event in died] == [signal.SIGKILL]
    await settle()
    assert complaints == []


async def test_a_missed_deadline_finds_a_stopped_worker(scene: Scene) -> None:
    """Rule P2: the call is told at its deadline, and the worker is asked for a sign of life."""
    make_impatient(scene.registry)
    died = deaths(scene.registry)
    halt(pid_of(scene.registry))
    with pytest.raises(PredictTimeoutError) as caught:
        await scene.registry.predict("other", ROW, timeout=0.05)
    assert caught.value.model == "other"
    await restarted(scene.registry)
    assert [event.signal for event in died] == [signal.SIGKILL]
    assert (await scene.registry.predict("other", ROW)).tolist() == [42]


async def test_a_worker_that_is_found_stuck_is_not_said_to_be_out_of_memory(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Rule P2: who killed it, and why, is told to those who look for the cause; a kill from outside has another."""
    send(scene.registry, signal.SIGKILL)
    await restarted(scene.registry)
    assert "was ended by SIGKILL (the kernel's out-of-memory killer does that: see dmesg)" in caplog.text
    caplog.clear()
    make_impatient(scene.registry)
    pid = pid_of(scene.registry)
    halt(pid_of(scene.registry))
    only_worker(scene.registry).suspect()
    await restarted(scene.registry, 2)
    assert f"worker process {pid} was killed by modelcache, since it gave no sign of life; it is" in caplog.text
    assert "memory" not in caplog.text


async def test_a_worker_that_does_not_come_up_is_said_to_be_killed_for_that(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one that takes too long to start."""
    monkeypatch.setattr("modelcache.pool.pool._START_TIMEOUT", 0.0)
    with pytest.raises(WorkerCrashedError, match="was killed by modelcache, since it was not up after 0 seconds"):
        await make_registry()


@pytest.mark.parametrize(
    ("exit_code", "killed", "text"),
    [
        (-9, "it hung", "was killed by modelcache, since it hung"),
        (-9, "", "was ended by SIGKILL (the kernel's out-of-memory killer does that: see dmesg)"),
        (-11, "it hung", "was ended by SIGSEGV"),
        (1, "it hung", "ended with exit code 1"),
    ],
)
def test_the_cause_of_death_is_what_ended_it(exit_code: int, killed: str, text: str) -> None:
    """A kill that came too late, or had no reason but to make sure, is no cause."""
    assert str(Epitaph(7, exit_code, "", killed)) == f"worker process 7 {text}"
    assert str(Epitaph(7, exit_code, "ouch", killed)) == f"worker process 7 {text}; its last words: ouch"


async def test_a_load_into_a_stopped_worker_goes_to_the_next(scene: Scene) -> None:
    """Rule P2, for loads: something waits for the worker, so its silence is noticed."""
    make_impatient(scene.registry)
    halt(pid_of(scene.registry))
    async with asyncio.timeout(LONG):
        assert (await scene.registry.predict("third", ROW)).tolist() == [42]
    assert scene.registry.stats().worker_restarts == 1


async def test_an_unload_that_is_not_acknowledged_ends_the_worker(scene: Scene) -> None:
    """Rule L5: bytes that a stopped worker does not free are freed by its end."""
    make_impatient(scene.registry)
    halt(pid_of(scene.registry))
    async with asyncio.timeout(LONG):
        assert await scene.registry.unload("other")
    assert scene.registry.stats().bytes_unloading == 0
    await restarted(scene.registry)


async def test_a_worker_that_computes_is_not_taken_for_a_stuck_one(scene: Scene) -> None:
    """Rule P2: a prediction that takes long costs CPU time, and is let finish."""
    make_impatient(scene.registry)
    assert 2 * scene.registry._pool._patience < odd.COMPUTED
    assert (await scene.registry.predict("other", [odd.COMPUTE, 3.0])).tolist() == [6]
    assert scene.registry.stats().worker_restarts == 0


async def test_a_slow_load_does_not_end_its_worker(make_registry: MakeRegistry, gate: odd.Gate) -> None:
    """Rule P2: the main thread gives signs of life while the parser takes its time, longer than patience."""
    store = MemoryStore({"m.json": odd.artifact(on_load="wait", gate=gate.path), "n.json": odd.artifact()})
    registry = await make_registry(store, predictor=odd.ODD)
    make_impatient(registry)
    worker = only_worker(registry)
    loading = asyncio.create_task(registry.load("m"))
    await until(gate.reached)
    for _ in range(3):
        seen = worker._pinged
        await until(lambda seen=seen: worker._pinged > seen + 0.1)  # type: ignore[misc]
    gate.open()
    await loading
    assert registry.stats().worker_restarts == 0


# P3: work that nobody waits for


async def test_expired_calls_are_not_predicted(scene: Scene) -> None:
    """Rule P3: rows whose deadline has passed while they waited for the worker cost no prediction."""
    held = await scene.hold()
    late = [asyncio.create_task(scene.registry.predict("other", [0, 50 + n], timeout=0.05)) for n in range(3)]
    for call in late:
        with pytest.raises(PredictTimeoutError):
            await call
    scene.gate.open()
    await held
    await scene.registry.predict("other", [0, 60])
    assert scene.predicted() == [1, 60]


async def test_cancelled_calls_are_not_predicted(scene: Scene) -> None:
    """Rule P3: the worker skips what was cancelled while it was busy."""
    held = await scene.hold()
    calls = [asyncio.create_task(scene.registry.predict("other", [0, 70 + n])) for n in range(4)]
    await settle()
    for call in calls[1:3]:
        call.cancel()
    await asyncio.gather(*calls[1:3], return_exceptions=True)
    scene.gate.open()
    await asyncio.gather(held, calls[0], calls[3])
    assert scene.predicted() == [1, 70, 73]


async def test_a_cancelled_call_in_slices_stops_after_the_slice_it_is_at(make_registry: MakeRegistry) -> None:
    """Rule P3: the rest of a large call is not sent any more, and the lane is clear."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    await registry.load("m")
    call = asyncio.create_task(registry.predict("m", zoo.rows(100_000)))
    worker = only_worker(registry)
    await until(lambda: worker.latency.count >= 2)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert not worker.requests.pending
    slices = worker.latency.count
    await registry.predict("m", zoo.rows(1))
    assert worker.latency.count == slices + 1


async def test_a_call_in_slices_times_out_once(make_registry: MakeRegistry) -> None:
    """Rule P3: the deadline is that of the whole call, and no slice's failure stays behind unseen."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    await registry.load("m")
    halt(pid_of(registry))
    with pytest.raises(PredictTimeoutError):
        await registry.predict("m", zoo.rows(5000), timeout=0.05)
    go_on(pid_of(registry))
    assert not {pending.model for pending in only_worker(registry).requests.pending.values()} - {0}
    await registry.predict("m", zoo.rows(1))
    assert complaints == []


# P4: large calls


async def test_small_calls_overtake_a_large_one(make_registry: MakeRegistry) -> None:
    """Rule P4: while half a million rows are predicted, one-row calls of others are answered between slices."""
    large, small, rows = zoo.model(trees=40), zoo.model(), zoo.rows(500_000)
    registry = await make_registry(MemoryStore({"large.ubj": large.ubj, "small.ubj": small.ubj}))
    await registry.preload(["large", "small"])
    call = asyncio.create_task(registry.predict("large", rows))
    await until(lambda: only_worker(registry).requests.pending)
    overtaken = {"small": 0, "large": 0}
    while not call.done():
        for name in overtaken:
            await registry.predict(name, rows[:1])
            overtaken[name] += not call.done()
    assert np.array_equal(await call, large.expected(rows))
    assert min(overtaken.values()) >= 5, overtaken


async def test_costly_outputs_are_cut_by_their_own_cost(make_registry: MakeRegistry) -> None:
    """Rule P4: contributions cost a thousand times what values do, and are sliced accordingly."""
    model, rows = zoo.model(trees=100), zoo.rows(1500)
    registry = await make_registry(MemoryStore({"m.ubj": model.ubj}))
    await registry.predict("m", rows)  # now values are known to be cheap
    call = asyncio.create_task(registry.predict("m", rows, output="contribs"))
    await until(lambda: only_worker(registry).requests.pending)
    overtaken = 0
    while not call.done():
        await registry.predict("m", rows[:1])
        overtaken += 1
    assert np.array_equal(await call, model.expected(rows, pred_contribs=True))
    assert overtaken >= 5


# P6: too many calls


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(scene: Scene) -> None:
    """Rule P6: nothing is sent and nothing waited for; ``retry_after`` is no shorter than the queue is old."""
    began = monotonic()
    held = await scene.hold()
    calls = [asyncio.create_task(scene.registry.predict("other", [0, value])) for value in range(7)]
    await settle()
    waited = (
        monotonic()
        - only_worker(scene.registry).requests.pending[min(only_worker(scene.registry).requests.pending)].sent
    )
    refused = scene.registry.predict("other", [0, 99])
    with pytest.raises(OverloadedError) as caught, pytest.raises(StopIteration):
        refused.send(None)
    assert caught.value.model == "other"
    assert caught.value.retry_after is not None
    assert waited <= caught.value.retry_after <= monotonic() - began
    scene.gate.open()
    await asyncio.gather(held, *calls)
    assert 99 not in scene.predicted()
    assert (await scene.registry.predict("other", ROW)).tolist() == [42], "and there is room again"


# Workers that cannot start


async def test_a_predictor_that_cannot_be_imported_fails_the_start(no_processes_left: None) -> None:
    """The error says what could not be imported; nothing is left behind."""
    descriptors = oracle.open_descriptors()
    registry = ModelRegistry(MemoryStore(), workers=2, memory_budget="64 MiB", predictor="no.such:Thing")
    with pytest.raises(MissingDependencyError, match=r"'no\.such:Thing' cannot be imported"):
        await registry.start()
    assert not registry._pool.workers
    await registry.close()
    await settle()
    oracle.check_gone(registry)
    assert oracle.open_descriptors() <= descriptors


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", r"'mine:Predictor' cannot be used \(ZeroDivisionError: division by zero\): name it as"),
        ("", r"'mine:Predictor' cannot be used \(AttributeError: module 'mine' has no attribute 'Predictor'\)"),
        ("Predictor = 7", r"'mine:Predictor' cannot be used \(TypeError: it has no method load\)"),
        (
            "import odd\nclass Predictor(odd.Odd):\n  sample = int",
            r"mine\.Predictor'> cannot load its sample \(TypeError",
        ),
    ],
    ids=["raises", "has none", "is none", "sample"],
)
async def test_a_predictor_that_is_broken_fails_the_start(
    no_processes_left: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    """Nothing has to be installed, so it is no MissingDependencyError; the predictor and the cause are named."""
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = ModelRegistry(MemoryStore(), workers=1, memory_budget="64 MiB", predictor="mine:Predictor")
    with pytest.raises(ModelCacheError, match=message) as caught:
        await registry.start()
    assert type(caught.value) is ModelCacheError
    await registry.close()
    oracle.check_gone(registry)


async def test_a_start_without_xgboost_names_the_extra_and_can_be_tried_again(
    no_processes_left: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the package is there the same registry starts, and its workers are kept up as ever."""
    (tmp_path / "xgboost.py").touch()  # hides the package from the workers
    registry = ModelRegistry(MemoryStore({"m.ubj": zoo.model().ubj}), workers=1, memory_budget="64 MiB")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        for attempt in (registry.start, lambda: registry.predict("m", zoo.rows(1))):
            with pytest.raises(MissingDependencyError, match=r"pip install 'modelcache\[cpu\]'"):
                await attempt()
    async with registry:
        await registry.load("m")
        send(registry, signal.SIGKILL)
        await restarted(registry)
        await registry.predict("m", zoo.rows(1))
    oracle.check_gone(registry)


async def test_while_no_worker_can_be_started_calls_fail_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule P1: nobody waits for a worker that does not come; when one can be started again, all is well."""
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/no/such/python")
        send(scene.registry, signal.SIGKILL)
        with pytest.raises(WorkerCrashedError, match="No worker can be started"):
            await scene.registry.predict("third", ROW)
    await restarted(scene.registry)
    assert (await scene.registry.predict("other", ROW)).tolist() == [42]


async def test_closing_while_a_worker_is_replaced_is_no_error(
    make_registry: MakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """Rule F11: a start that the close has given up is nothing to be told of."""
    registry = await make_registry(predictor=odd.ODD)
    send(registry, signal.SIGKILL)
    await until(lambda: not registry._pool.workers)
    await registry.close()
    assert [record.message for record in caplog.records if "is replaced" not in record.message] == []


# Nothing is left


async def test_start_and_close_leave_nothing_behind(no_processes_left: None) -> None:
    """Rule F11: twenty times, and there are as many descriptors, tasks, threads and processes as before."""
    children = {child.pid for child in psutil.Process().children()}

    async def cycle() -> None:
        async with ModelRegistry(
            MemoryStore({"m.json": odd.artifact()}), workers=1, memory_budget="64 MiB", predictor=odd.ODD
        ) as registry:
            assert (await registry.predict("m", ROW)).tolist() == [42]
        oracle.check_gone(registry)
        oracle.check_no_tasks_left()

    await cycle()
    await settle()
    descriptors, threads = oracle.open_descriptors(), threading.active_count()
    for _ in range(20):
        await cycle()
    await settle()
    assert oracle.open_descriptors() <= descriptors
    assert threading.active_count() <= threads + 1
    assert {child.pid for child in psutil.Process().children()} <= children


async def test_a_start_that_is_cancelled_leaves_nothing_behind(no_processes_left: None) -> None:
    """The caller is gone, the workers come up for nobody, and close ends them."""
    descriptors = oracle.open_descriptors()
    registry = ModelRegistry(MemoryStore(), workers=2, memory_budget="64 MiB", predictor=odd.ODD)
    starting = asyncio.create_task(registry.start())
    await settle(2)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await registry.close()
    await settle()
    oracle.check_gone(registry)
    oracle.check_no_tasks_left()
    assert oracle.open_descriptors() <= descriptors
