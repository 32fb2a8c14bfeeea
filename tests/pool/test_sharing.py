"""A call that takes long is answered by all workers which hold its model and have time; and is as good as any."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import odd
import zoo
from halting import go_on, halt
from modelcache import (
    InvalidInputError,
    MemoryStore,
    ModelCacheError,
    PredictTimeoutError,
    WorkerCrashedError,
    leasing,
    slicing,
)
from modelcache.inputs import LARGE_CELLS
from modelcache.pacing import Pace
from modelcache.pool.shared import SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakeRegistry
    from modelcache import ModelRegistry
    from modelcache.pool.pool import Worker
    from modelcache.records import Output

MODEL = zoo.model()
LARGE = zoo.rows(LARGE_CELLS // zoo.N + 1000)
FIRST = Pace().rows_within(slicing._SHORT_SLICE_SECONDS, LARGE_CELLS)
"""Rows of each of the first slices: what a row takes is not known."""
OUTPUTS: dict[Output, dict[str, Any]] = {"value": {}, "leaf": {"pred_leaf": True}, "contribs": {"pred_contribs": True}}


async def copy(registry: ModelRegistry, name: str) -> None:
    """Have a model in one more worker."""
    registry._loader.copy(registry._state.ledger.table[name])
    await asyncio.wait(registry._loader.tasks)


def seats(registry: ModelRegistry, name: str) -> list[Worker]:
    """Return the workers that hold a model, its home first."""
    entry = registry._state.ledger.table[name]
    return [seat.value.worker for seat in (entry, *entry.copies)]


def answered(workers: list[Worker]) -> list[int]:
    return [worker.latency.count for worker in workers]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def nobody_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a helper stands at a gate; but where that is what is tested."""
    monkeypatch.setattr(slicing, "_LATE", 1e6)


@pytest.fixture
async def registry(make_registry: MakeRegistry) -> ModelRegistry:
    registry = await make_registry(MemoryStore({"m.ubj": MODEL.ubj}), workers=2)
    await registry.load("m")
    await copy(registry, "m")
    return registry


async def test_all_who_hold_the_model_take_part(registry: ModelRegistry, subtests: pytest.Subtests) -> None:
    """The answer is that of one worker, bit for bit, whoever has predicted which rows."""
    for output, options in OUTPUTS.items():
        with subtests.test(output=output):
            before = answered(seats(registry, "m"))
            rows = LARGE if output == "value" else LARGE[:8000]
            assert np.array_equal(await registry.predict("m", rows, output=output), MODEL.expected(rows, **options))
            assert all(map(int.__gt__, answered(seats(registry, "m")), before))


async def test_a_lease_is_answered_by_all(registry: ModelRegistry) -> None:
    """As is a call that names its model."""
    async with registry.acquire("m") as lease:
        assert np.array_equal(await lease.predict(LARGE), MODEL.expected(LARGE))
    assert all(answered(seats(registry, "m")))


async def test_a_short_call_is_for_one(registry: ModelRegistry) -> None:
    """What one worker has done before another could be asked is not shared."""
    await registry.predict("m", zoo.rows(100))
    assert answered(seats(registry, "m")) == [1, 0]


async def test_many_at_once(registry: ModelRegistry) -> None:
    """Callers with large batches share both workers, and each has the answer to his own rows."""
    every = [zoo.rows(30_000, seed=seed) for seed in range(8)]
    answers = await asyncio.gather(*(registry.predict("m", rows) for rows in every))
    for rows, answer in zip(every, answers, strict=True):
        assert np.array_equal(answer, MODEL.expected(rows))


@pytest.mark.parametrize("which", [0, 1], ids=["home", "helper"])
async def test_a_worker_is_killed(registry: ModelRegistry, which: int) -> None:
    """Rule P1: the whole call is made again, by those that are left."""
    worker = seats(registry, "m")[which]
    call = asyncio.create_task(registry.predict("m", LARGE))
    await until(lambda: len(worker.requests.slots.free) < SLOTS)
    os.kill(worker.pid, signal.SIGKILL)
    assert np.array_equal(await call, MODEL.expected(LARGE))
    assert worker not in seats(registry, "m")


async def test_a_cancelled_call_leaves_nothing_anywhere(registry: ModelRegistry) -> None:
    """Its slices are withdrawn from all workers; the slots come back, as is checked after each test."""
    both = seats(registry, "m")
    call = asyncio.create_task(registry.predict("m", LARGE))
    await until(lambda: all(worker.requests.pending for worker in both))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not any(worker.requests.pending for worker in both)
    assert registry._state.ledger.leases == 0


async def test_what_slices_take_is_noted(registry: ModelRegistry) -> None:
    """Who looks for models to be copied is told which of them keep a worker busy with long calls, and since when."""
    worker, number = seats(registry, "m")[0], registry._state.ledger.table["m"].value.number
    assert registry._pool._checking is not None
    registry._pool._checking.cancel()  # who looks is the test
    await registry.predict("m", zoo.rows(10))
    assert worker.requests.slice_seconds == {}
    await registry.predict("m", LARGE)
    taken = worker.requests.slice_seconds[number]
    assert 0 < taken <= worker.latency.sum
    worker._look_back(worker._checked + 2 * taken)
    assert worker.slices == {number: pytest.approx(0.5)}
    assert worker.requests.slice_seconds == {}


# Workers that do as their rows say


class Odd:
    """A registry of two workers that hold "m"; "other" is at home in the second."""

    def __init__(self, registry: ModelRegistry, gate: odd.Gate) -> None:
        self.registry = registry
        self.gate = gate
        self.home, self.helper = seats(registry, "m")

    def call(self, *orders: tuple[int, int], timeout: float | None = None) -> asyncio.Task[Any]:
        """Ask with many rows, some of which are (number, order)."""
        rows = np.full((LARGE_CELLS, 2), odd.PREDICT, np.float32)
        rows[:, 1] = np.arange(LARGE_CELLS)
        for number, order in orders:
            rows[number, 0] = order
        return asyncio.create_task(self.registry.predict("m", rows, timeout=timeout))

    async def other(self) -> asyncio.Task[Any]:
        """Return a call for another model, which keeps the helper at the gate."""
        call = asyncio.create_task(self.registry.predict("other", [[odd.WAIT, 1.0]]))
        await until(self.gate.reached)
        return call


@pytest.fixture
async def workers(make_registry: MakeRegistry, tmp_path: Path) -> Odd:
    gate = odd.Gate(tmp_path / "gate")
    store = MemoryStore({f"{name}.json": odd.artifact(gate=gate.path) for name in ("m", "other", "third")})
    registry = await make_registry(store, workers=2, predictor=odd.ODD)
    await registry.preload(["m", "other"])
    await copy(registry, "m")
    found = Odd(registry, gate)
    assert seats(registry, "other") == [found.helper]
    return found


IN_HOME, IN_HELPER = 0, 2 * FIRST
"""The first two slices are for the home, the next two for the helper."""


def all_doubled(answer: Any) -> bool:
    return np.array_equal(answer, 2 * np.arange(LARGE_CELLS, dtype=np.float32))


async def test_a_worker_that_a_call_waits_for_is_left_alone(workers: Odd) -> None:
    """Calls for other models do not come to wait for slices there; the home does all of them."""
    other = await workers.other()
    assert all_doubled(await workers.call())
    assert answered([workers.helper]) == [0]
    workers.gate.open()
    assert (await other).tolist() == [2.0]


async def test_it_takes_part_as_soon_as_it_has_time(workers: Odd) -> None:
    """A call that has begun in one worker goes on in both when the other has nothing else to do."""
    other = await workers.other()
    call = workers.call()
    await until(lambda: answered([workers.home])[0] > 1)
    halt(workers.home.pid)
    workers.gate.open()
    await other
    go_on(workers.home.pid)
    assert all_doubled(await call)
    assert answered([workers.helper])[0] > 1


async def test_the_slow_one_does_less(workers: Odd) -> None:
    """Who is given the next slice is decided by who has done one; when all else is done, nobody waits for him there."""
    call = workers.call((IN_HELPER, odd.WAIT))
    await until(workers.gate.reached)
    await until(lambda: not workers.home.requests.waiting)
    assert not workers.home.requests.pending
    assert not call.done()
    workers.gate.open()
    assert all_doubled(await call)
    assert answered([workers.helper]) == [2]


async def test_who_waits_for_a_helper_takes_no_place_at_home(workers: Odd) -> None:
    """Rule P6: when the home has done its part, its queue is free for others."""
    workers.registry._answering._queue_limit = 1
    await workers.registry.load("third")
    assert seats(workers.registry, "third") == [workers.home]
    call = workers.call((IN_HELPER, odd.WAIT))
    await until(workers.gate.reached)
    await until(lambda: not workers.home.requests.waiting)
    assert (await workers.registry.predict("third", [[odd.PREDICT, 4.0]])).tolist() == [8.0]
    workers.gate.open()
    assert all_doubled(await call)


async def test_a_helper_that_stands_still_is_not_waited_for(workers: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules P2, P3: what it was to do is done at home, and it is asked for no more until it gives a sign of life."""
    monkeypatch.setattr(slicing, "_LATE", 0.01)
    halt(workers.helper.pid)
    assert all_doubled(await workers.call(timeout=20))
    lent = len(workers.helper.requests.slots.free)
    assert all_doubled(await workers.call(timeout=20))
    assert answered([workers.helper]) == [0]
    assert len(workers.helper.requests.slots.free) == lent == SLOTS - 2
    go_on(workers.helper.pid)
    await until(lambda: not workers.helper.requests.pending)
    assert all_doubled(await workers.call())
    assert answered([workers.helper])[0] > 0


SECOND_IN_HELPER = IN_HELPER + FIRST
"""What waits there for an answer to the first."""


def let_nobody_look(registry: ModelRegistry) -> None:
    """Stop the looks at all workers, which would suspect one that stands still, and end it."""
    assert registry._pool._checking is not None
    registry._pool._checking.cancel()


async def late(workers: Odd, call: asyncio.Task[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the helper answer the slice at the gate, and be late with its next, which waits there as well."""
    let_nobody_look(workers.registry)
    monkeypatch.setattr(slicing, "_LATE", 0.01)
    workers.gate.open()
    await until(lambda: workers.helper.suspected)
    assert not call.done()


async def let_all_through(workers: Odd, call: asyncio.Task[Any], *, helper: bool = True) -> None:
    """Open the gate for whoever comes, until the call is answered and the ``helper`` has done what it was sent."""
    free = workers.helper.requests.slots.free
    async with asyncio.timeout(20):
        while not call.done() or (helper and len(free) < SLOTS):
            if workers.gate.reached():
                workers.gate.open()
            await asyncio.sleep(0)


async def test_who_does_again_what_a_helper_was_to_do_waits_again(
    workers: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule P6: the call is back in the queue of its home, once, and can be displaced there."""
    call = workers.call((IN_HELPER, odd.WAIT), (SECOND_IN_HELPER, odd.WAIT))
    home = workers.home.requests
    await until(workers.gate.reached)
    await until(lambda: not home.waiting)
    await late(workers, call, monkeypatch)
    await until(lambda: home.pending)
    entry = workers.registry._state.ledger.table["m"]
    assert home.waiting == entry.value.waiting == 1
    assert home.newest_of(entry.value) is not None
    await let_all_through(workers, call)
    assert all_doubled(await call)
    assert home.waiting == entry.value.waiting == 0


async def test_a_home_that_ends_after_its_part(workers: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule P1: nothing of the call was there to fail with it, and nothing more is sent there."""
    call = workers.call((IN_HELPER, odd.WAIT), (SECOND_IN_HELPER, odd.WAIT))
    await until(workers.gate.reached)
    await until(lambda: not workers.home.requests.waiting)
    os.kill(workers.home.pid, signal.SIGKILL)
    await until(lambda: workers.home.gone)
    await late(workers, call, monkeypatch)
    await let_all_through(workers, call)
    assert all_doubled(await call)
    assert not workers.home.requests.waiting


async def test_a_slow_helper_of_a_home_that_takes_nothing(workers: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could do again what it is late with: it goes on, and does all of it."""
    monkeypatch.setattr(leasing, "pick_seat", lambda entry, _limit: entry)
    monkeypatch.setattr(slicing, "_LATE", 0.001)
    workers.home.requests.pause_writing()
    assert all_doubled(await workers.call((0, odd.COMPUTE)))
    assert answered([workers.home]) == [0]
    workers.home.requests.resume_writing()


async def test_a_late_helper_of_a_home_that_takes_something_again(
    workers: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket was full, and the helper stands still: the call goes on as soon as the home does."""
    monkeypatch.setattr(leasing, "pick_seat", lambda entry, _limit: entry)
    monkeypatch.setattr(slicing, "_LATE", 0.001)
    let_nobody_look(workers.registry)
    home = workers.home.requests
    home.pause_writing()
    call = workers.call((0, odd.WAIT))
    await until(workers.gate.reached)
    halt(workers.helper.pid)
    workers.gate.open()
    home.resume_writing()
    await let_all_through(workers, call, helper=False)
    assert all_doubled(await call)
    assert answered([workers.home])[0] > 0
    go_on(workers.helper.pid)


async def test_a_helper_that_takes_nothing_is_left_alone(workers: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is full: what it was sent would wait in the parent."""
    monkeypatch.setattr(type(workers.helper.requests), "congested", property(lambda lane: lane is lane_of_helper))
    lane_of_helper = workers.helper.requests
    assert all_doubled(await workers.call())
    assert answered([workers.helper]) == [0]


async def test_a_home_that_takes_nothing_keeps_nobody_else(workers: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is full: the helper does all of it meanwhile."""
    lane_of_home = workers.home.requests
    monkeypatch.setattr(type(lane_of_home), "congested", property(lambda lane: lane is lane_of_home))
    monkeypatch.setattr(leasing, "pick_seat", lambda entry, _limit: entry)
    assert all_doubled(await workers.call())
    assert answered([workers.home]) == [0]


async def test_calls_of_others_come_between_its_slices(workers: Odd) -> None:
    """Rule P4: what a helper does for a call that waits elsewhere is no call, and takes nobody's place in the queue."""
    call = workers.call((IN_HELPER, odd.WAIT))
    await until(workers.gate.reached)
    assert workers.helper.requests.waiting == 0
    (copy,) = workers.registry._state.ledger.table["m"].copies
    assert workers.helper.requests.newest_of(copy.value) is None, "nobody could be displaced"
    other = asyncio.create_task(workers.registry.predict("other", [[odd.PREDICT, 4.0]]))
    await until(lambda: workers.helper.requests.waiting == 1)
    workers.gate.open()
    assert (await other).tolist() == [8.0]
    assert all_doubled(await call)


async def test_rows_that_a_helper_refuses(workers: Odd) -> None:
    """The call fails as it would with one worker, and nothing of it is left in either."""
    with pytest.raises(InvalidInputError, match="does not like this row") as failed:
        await workers.call((IN_HELPER, odd.REFUSE))
    assert failed.value.model == "m"
    assert not workers.home.requests.pending
    assert not workers.helper.requests.pending


async def test_a_helper_that_breaks_its_word(workers: Odd) -> None:
    """It has answered for fewer rows than it was given."""
    with pytest.raises(ModelCacheError, match="no predictions"):
        await workers.call((IN_HELPER, odd.MISCOUNT))


@pytest.mark.parametrize("place", [IN_HOME, IN_HELPER], ids=["home", "helper"])
async def test_a_call_that_kills_workers(workers: Odd, place: int) -> None:
    """Rule P1: it is tried twice, whoever it was that it killed."""
    with pytest.raises(WorkerCrashedError, match="Two workers ended while m was predicting"):
        await workers.call((place, odd.KILL))
    await until(lambda: workers.registry._pool.restarts == 2)


async def test_a_deadline_is_that_of_all_slices(workers: Odd) -> None:
    """Rule P3: what waits in a helper ends the call in time, and slots are the helper's until it reports them."""
    call = workers.call((IN_HELPER, odd.WAIT), timeout=1)
    await until(workers.gate.reached)
    with pytest.raises(PredictTimeoutError):
        await call
    assert len(workers.helper.requests.slots.free) == SLOTS - 2
    workers.gate.open()
    await until(lambda: len(workers.helper.requests.slots.free) == SLOTS)


async def test_a_helper_is_held_while_it_helps(workers: Odd) -> None:
    """Rules L3, L4: its copy is leased for its slice, and leaves after that if its bytes are waited for."""
    registry = workers.registry
    call = workers.call((IN_HELPER, odd.WAIT))
    await until(workers.gate.reached)
    halt(workers.home.pid)
    registry.resize(1)
    assert seats(registry, "m") == [workers.home, workers.helper]
    workers.gate.open()
    await until(lambda: not registry.stats().copies)
    assert not call.done()
    go_on(workers.home.pid)
    assert all_doubled(await call)
    registry.resize("64 MiB")


async def test_long_calls_withhold_no_bytes(workers: Odd) -> None:
    """Rule L3: where one is made after the other, somebody else can have the bytes of their model's copy."""
    registry = workers.registry
    ledger = registry._state.ledger
    await registry.load("third")
    await asyncio.gather(registry.unload("other"), registry.unload("third"))  # what that takes is known
    call = workers.call((IN_HELPER, odd.WAIT))
    await until(workers.gate.reached)
    registry.resize(ledger.resident)
    loading = asyncio.create_task(registry.load("third"))
    await until(lambda: ledger.queue)
    calls = [call, workers.call(), workers.call()]
    workers.gate.open()
    assert (await loading).name == "third"
    assert registry.stats().copies == 0
    assert all(map(all_doubled, await asyncio.gather(*calls)))
    registry.resize("64 MiB")
