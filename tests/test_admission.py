"""Admission: a full queue refuses, and nobody's flood keeps others out of it (P6)."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import odd
import oracle
import zoo
from conftest import settle
from lanes import FakeTransport, Line, both_ends
from modelcache import InvalidInputError, MemoryStore, OverloadedError
from modelcache.admission import admit, check_not_in_vain
from modelcache.pool import wire
from modelcache.pool.requests import RequestChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from conftest import MakeRegistry
    from modelcache import ModelRegistry

LIMIT = 10
ROWS = np.zeros((1, 2), np.float32)


class Lane:
    """A request lane whose worker answers nothing, and the models that calls wait for."""

    def __init__(self) -> None:
        self.transport = FakeTransport()
        self.channel = RequestChannel(lambda: None, lambda _: None, both_ends()[0])
        self.channel.connection_made(self.transport)
        self.noisy, self.quiet, self.third = (Line(number) for number in (1, 2, 3))
        self.futures: dict[int, asyncio.Future[Any]] = {}
        self.large = ExitStack()
        """Calls in slices."""

    def send(self, line: Line, count: int = 1, *, begun: bool = False) -> list[int]:
        """Send calls past the limit, or slices of as many that have ``begun``; return their numbers."""
        sent = [self._send(line, begun=begun) for _ in range(count)]
        self.futures.update(sent)
        return [number for number, _ in sent]

    def _send(self, line: Line, *, begun: bool) -> tuple[int, asyncio.Future[Any]]:
        if not begun:
            return self.channel.predict(line, ROWS, 0, 0.0)
        sliced = self.large.enter_context(self.channel.slices_of(line))
        sliced.begun = True
        return self.channel.predict_written(line, ROWS.shape, partial(np.copyto, src=ROWS), 0, 0.0, sliced=sliced)

    def call(self, line: Line, limit: int = LIMIT) -> None:
        """Send a call if it is admitted."""
        admit(f"m{line.number}", line, self.channel, limit)
        self.send(line)

    def displaced(self) -> list[int]:
        """Return the calls that have made way, and that the worker was told to skip, in their order."""
        failed = [number for number, future in self.futures.items() if future.done() and future.exception()]
        stream, cancelled = b"".join(self.transport.writes), []
        while stream:
            size, kind, _, _, number, *_ = wire.REQUEST.unpack_from(stream)
            cancelled += [number] * (kind == wire.CANCEL)
            stream = stream[wire.REQUEST.size + size :]
        assert sorted(cancelled) == failed
        return cancelled


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    made = Lane()
    yield made
    made.transport.close()


async def test_a_lone_model_may_fill_the_queue_and_no_more(lane: Lane) -> None:
    """P6: the limit is exact, and it is refused what would only take the place of its own."""
    for _ in range(LIMIT):
        lane.call(lane.noisy)
    with pytest.raises(OverloadedError, match="10 calls wait for the worker of m1 already") as refused:
        lane.call(lane.noisy)
    assert refused.value.model == "m1"
    assert lane.channel.waiting == lane.noisy.waiting == LIMIT


async def test_a_call_of_a_quiet_model_displaces_the_newest_of_a_noisy_one(lane: Lane) -> None:
    """P6: the queue stays as long as it is, and the worker is told to skip the call that made way."""
    noisy = lane.send(lane.noisy, LIMIT)
    lane.call(lane.quiet)
    lane.call(lane.quiet)
    await settle(2)
    assert lane.displaced() == [noisy[-1], noisy[-2]]
    assert (lane.channel.waiting, lane.noisy.waiting, lane.quiet.waiting) == (LIMIT, LIMIT - 2, 2)
    with pytest.raises(OverloadedError, match="10 of the 10 calls") as made_way:
        await lane.futures[noisy[-1]]
    assert made_way.value.retry_after is not None


async def test_a_queue_is_shared_evenly_and_then_refuses(lane: Lane) -> None:
    """P6: nobody displaces a call of a model that has not two more: two floods would displace each other for ever."""
    lane.send(lane.noisy, LIMIT)
    for _ in range(LIMIT // 2):
        lane.call(lane.quiet)
    assert lane.noisy.waiting == lane.quiet.waiting == LIMIT // 2
    for line in (lane.noisy, lane.quiet):
        with pytest.raises(OverloadedError):
            lane.call(line)
    lane.call(lane.third)
    assert sorted((lane.noisy.waiting, lane.quiet.waiting, lane.third.waiting)) == [1, 4, 5]


async def test_a_flood_that_goes_on_is_found_behind_the_newest_calls(lane: Lane) -> None:
    """P6: the newest calls may all be of quiet models; who asked while the queue was full is remembered."""
    noisy = lane.send(lane.noisy, 12)
    for number in range(10, 18):
        lane.send(Line(number))
    for line in (lane.quiet, lane.noisy):  # nothing tells of the flood, until it asks
        with pytest.raises(OverloadedError):
            lane.call(line, limit=20)
    lane.call(lane.quiet, limit=20)
    with pytest.raises(OverloadedError):
        await lane.futures[noisy[-1]]


async def test_a_half_done_call_is_displaced_last(lane: Lane) -> None:
    """P6: slices of a call that has been answered in part make way only where nothing else of their model waits."""
    fresh = lane.send(lane.noisy, 2)
    begun = lane.send(lane.noisy, LIMIT - 2, begun=True)
    for _ in range(3):
        lane.call(lane.quiet)
    await settle(2)
    assert lane.displaced() == [fresh[1], fresh[0], begun[-1]]


async def test_a_call_that_is_being_cancelled_is_not_displaced(lane: Lane) -> None:
    """Its place is about to be free: another one's would be lost for nothing."""
    noisy = lane.send(lane.noisy, LIMIT)
    lane.futures[noisy[-1]].cancel()
    lane.call(lane.quiet)
    with pytest.raises(OverloadedError):
        await lane.futures[noisy[-2]]


async def test_rows_are_looked_at_only_if_there_is_a_chance(lane: Lane) -> None:
    """The check before the conversion displaces nobody: the rows may turn out to be none."""
    lane.send(lane.noisy, LIMIT)
    check_not_in_vain("m2", lane.quiet, lane.channel, LIMIT)
    with pytest.raises(OverloadedError, match="of m1 already"):
        check_not_in_vain("m1", lane.noisy, lane.channel, LIMIT)
    assert lane.noisy.waiting == lane.channel.waiting == LIMIT
    check_not_in_vain("m1", lane.noisy, lane.channel, LIMIT + 1)


# With a worker


@pytest.fixture
async def registry(make_registry: MakeRegistry, gate: odd.Gate, tmp_path: Path) -> ModelRegistry:
    """A worker that its first call of ``noisy`` holds at the gate, and a queue for four."""
    log = str(tmp_path / "log")
    artifacts = {
        "noisy.json": odd.artifact(gate=gate.path, log=log),
        "quiet.json": odd.artifact(log=log),
    }
    made = await make_registry(MemoryStore(artifacts), predictor=odd.ODD, queue_limit=4)
    await made.preload(["noisy", "quiet"])
    return made


@pytest.fixture
def gate(tmp_path: Path) -> odd.Gate:
    return odd.Gate(tmp_path / "gate")


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def flood(registry: ModelRegistry, gate: odd.Gate) -> list[asyncio.Task[Any]]:
    """Fill the queue with calls of ``noisy``, at the first of which the worker is held."""
    calls = [asyncio.create_task(registry.predict("noisy", [odd.WAIT, 0]))]
    await until(gate.reached)
    calls += [asyncio.create_task(registry.predict("noisy", [0, value])) for value in (1, 2, 3)]
    await settle()
    return calls


async def test_a_displaced_call_is_refused_and_never_predicted(
    registry: ModelRegistry, gate: odd.Gate, tmp_path: Path
) -> None:
    """P6, P3: it fails with its model's name and when to come back; who displaced it gets its answer."""
    calls = await flood(registry, gate)
    quiet = asyncio.create_task(registry.predict("quiet", [0, 21]))
    with pytest.raises(OverloadedError, match="4 of the 4 calls") as made_way:
        await calls[-1]
    assert made_way.value.model == "noisy"
    gate.open()
    assert (await quiet).tolist() == [42]
    assert [(await call).tolist() for call in calls[:-1]] == [[0], [2], [4]]
    assert "3.0" not in (tmp_path / "log").read_text()
    assert registry.stats().rejected == 1


async def test_refused_calls_are_counted(registry: ModelRegistry, gate: odd.Gate) -> None:
    """P6: by name or by a lease, and whether they waited or not."""
    async with registry.acquire("noisy") as lease:
        calls = await flood(registry, gate)
        for refused in (registry.predict("noisy", [0, 9]), lease.predict([0, 9]), registry.invoke("noisy", [0, 9])):
            with pytest.raises(OverloadedError):
                await refused
        gate.open()
        await asyncio.gather(*calls)
    assert registry.stats().rejected == 3


async def test_many_rows_are_not_converted_in_vain(registry: ModelRegistry, gate: odd.Gate) -> None:
    """P6: while calls are being refused, what may take long to convert is refused first; one row is checked before."""
    calls = await flood(registry, gate)
    for rows, error in (
        ("no rows", InvalidInputError), ([[0, 9]], OverloadedError), ("no rows", OverloadedError),
        ([["nothing"]], InvalidInputError),
    ):  # fmt: skip
        with pytest.raises(error):
            await registry.predict("noisy", rows)
    with pytest.raises(InvalidInputError):
        await registry.predict("quiet", "no rows")
    async with registry.acquire("noisy") as lease:
        with pytest.raises(OverloadedError):
            await lease.predict("no rows")
    gate.open()
    await asyncio.gather(*calls)
    for name in ("noisy", "unknown"):
        with pytest.raises(InvalidInputError):
            await registry.predict(name, "no rows")


async def test_a_displaced_slice_fails_its_call(make_registry: MakeRegistry) -> None:
    """P6: a call in slices whose slice makes way is refused as a whole, and nothing of it stays behind."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    artifacts = {"large.ubj": zoo.model(trees=40).ubj, "small.ubj": zoo.model().ubj}
    registry = await make_registry(MemoryStore(artifacts), queue_limit=2)
    await registry.preload(["large", "small"])
    requests = registry._pool.workers[0].requests
    large = [asyncio.create_task(registry.predict("large", zoo.rows(300_000))) for _ in range(2)]
    await until(lambda: len(requests.pending) == 4)
    small = registry.predict("small", zoo.rows(1))
    assert len(await small) == 1
    answers = await asyncio.gather(*large, return_exceptions=True)
    (refused,) = (answer for answer in answers if isinstance(answer, OverloadedError))
    assert "2 of the 2" in str(refused)
    assert sum(isinstance(answer, np.ndarray) for answer in answers) == 1
    await settle()
    assert not requests.pending
    assert complaints == []


async def test_a_call_in_slices_makes_way_as_a_whole(lane: Lane) -> None:
    """P6: who comes in the same tick as another displaces another call, not a second slice of the same."""
    write = partial(np.copyto, src=ROWS)
    slices: list[tuple[int, asyncio.Future[Any]]] = []
    for _ in range(4):
        sliced = lane.large.enter_context(lane.channel.slices_of(lane.noisy))
        slices += [lane.channel.predict_written(lane.noisy, ROWS.shape, write, 0, 0.0, sliced=sliced) for _ in range(2)]
    lane.call(lane.quiet, limit=4)
    lane.call(lane.third, limit=4)
    assert (lane.channel.waiting, lane.noisy.waiting) == (4, 2)
    assert [future.done() for _, future in slices] == [False] * 5 + [True, False, True]
    lane.large.close()
    assert (lane.channel.waiting, lane.noisy.waiting) == (2, 0)
    for _, future in slices:
        future.cancel() or future.exception()


async def test_a_cancelled_call_in_slices_leaves_nothing_behind(registry: ModelRegistry, gate: odd.Gate) -> None:
    """P3: each of its slices is cancelled at the worker, the one that it waited for too."""
    requests = registry._pool.workers[0].requests
    held = asyncio.create_task(registry.predict("noisy", [odd.WAIT, 0]))
    await until(gate.reached)
    large = asyncio.create_task(registry.predict("noisy", np.zeros((200_000, 2), np.float32), timeout=1000))
    await until(lambda: len(requests.pending) == 3)
    large.cancel()
    await settle()
    assert len(requests.pending) == requests.waiting == 1
    gate.open()
    await held
    await oracle.slots_come_back(registry)
    assert not requests.pending


async def test_a_call_in_slices_waits_once(registry: ModelRegistry, gate: odd.Gate) -> None:
    """P4, P6: ``queue_limit`` counts calls, however many slices of a large one are on their way."""
    requests = registry._pool.workers[0].requests
    calls = [asyncio.create_task(registry.predict("noisy", [odd.WAIT, 0]))]
    await until(gate.reached)
    calls.append(asyncio.create_task(registry.predict("noisy", np.zeros((200_000, 2), np.float32))))
    await until(lambda: len(requests.pending) == 3)
    assert requests.waiting == 2
    calls += [asyncio.create_task(registry.predict("quiet", [0, value])) for value in (1, 2)]
    await settle()
    with pytest.raises(OverloadedError):
        await registry.predict("noisy", [0, 3])
    gate.open()
    await asyncio.gather(*calls)
    assert requests.waiting == 0
