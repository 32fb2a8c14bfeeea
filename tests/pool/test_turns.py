"""Turns: while calls wait for answers, small models are parsed one after another, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

import zoo
from conftest import settle
from halting import go_on, halt
from modelcache import MemoryStore
from modelcache.pool.turns import Turns

if TYPE_CHECKING:
    from conftest import MakeRegistry

MODEL = zoo.model()
ROWS = zoo.rows(1)


class Parses:
    """Parses that end when the test says so."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.running: list[int] = []
        self.ends: dict[int, asyncio.Event] = {}

    def begin(self, number: int) -> asyncio.Task[None]:
        return asyncio.create_task(self._run(number))

    async def _run(self, number: int) -> None:
        end = self.ends[number] = asyncio.Event()
        async with self.turns.turn():
            self.running.append(number)
            await end.wait()
            self.running.remove(number)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next turn begin in the tick after one has ended."""
    monkeypatch.setattr("modelcache.pool.turns._REST", 0.0)


@pytest.fixture
async def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody lose it."""
    monkeypatch.setattr("modelcache.pool.turns._PATIENCE", 1000.0)


async def test_as_many_as_there_are_turns_in_order(patience: None) -> None:
    """Who has asked first is next, and who has gone is passed over."""
    parses = Parses(Turns(2, lambda: True))
    tasks = [parses.begin(number) for number in range(6)]
    await settle()
    assert parses.running == [0, 1]
    tasks[2].cancel()
    parses.ends[0].set()
    await settle()
    assert parses.running == [1, 3]
    parses.ends[3].set()
    parses.ends[1].set()
    await settle()
    assert parses.running == [4, 5]
    for end in parses.ends.values():
        end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settle()
    assert parses.turns._taken == 0
    assert not parses.turns._line


async def test_where_no_call_waits_nobody_does() -> None:
    """A registry that is being filled uses all processors."""
    parses = Parses(Turns(1, lambda: False))
    tasks = [parses.begin(number) for number in range(5)]
    await settle()
    assert parses.running == [0, 1, 2, 3, 4]
    for end in parses.ends.values():
        end.set()
    await asyncio.gather(*tasks)


async def test_a_turn_that_is_given_to_one_who_goes_in_that_tick_is_passed_on(patience: None) -> None:
    """Otherwise the next would wait until his patience ends."""
    turns = Turns(1, lambda: True)
    parses = Parses(turns)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(turns.turn())
        leaver, next_one = parses.begin(0), parses.begin(1)
        await settle()
    leaver.cancel()  # he has been called, and has not heard
    await settle()
    assert parses.running == [1]
    parses.ends[1].set()
    await asyncio.gather(leaver, next_one, return_exceptions=True)
    await settle()
    assert turns._taken == 0


async def test_a_parse_that_never_ends_keeps_the_others_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged model may take until load_timeout; those in other workers are no concern of it."""
    monkeypatch.setattr("modelcache.pool.turns._PATIENCE", 0.0)
    parses = Parses(Turns(1, lambda: True))
    tasks = [parses.begin(number) for number in range(3)]
    while len(parses.running) < 3:
        await asyncio.sleep(0)
    for end in parses.ends.values():
        end.set()
    await asyncio.gather(*tasks)


async def test_who_has_lost_patience_makes_no_more_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each of them would let one more be parsed at once, until nobody waits any more."""
    monkeypatch.setattr("modelcache.pool.turns._PATIENCE", 0.0)
    parses = Parses(Turns(1, lambda: True))
    tasks = [parses.begin(number) for number in range(2)]
    while len(parses.running) < 2:
        await asyncio.sleep(0)
    monkeypatch.setattr("modelcache.pool.turns._PATIENCE", 1000.0)
    tasks.append(parses.begin(2))
    await settle()
    parses.ends[0].set()
    await settle()
    assert parses.running == [1]
    parses.ends[1].set()
    await settle()
    assert parses.running == [2]
    parses.ends[2].set()
    await asyncio.gather(*tasks)


async def test_calls_have_the_processor_for_as_long_as_a_turn_took(
    monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    """The next waits for the end of the rest, as long as there are calls; if there are none, nobody rests."""
    monkeypatch.setattr("modelcache.pool.turns._REST", 1e12)
    monkeypatch.setattr("modelcache.pool.turns._LONGEST_REST", 1000.0)
    calls = True
    parses = Parses(Turns(1, lambda: calls))
    tasks = [parses.begin(number) for number in range(2)]
    await settle()
    parses.ends[0].set()
    await settle()
    assert parses.running == []
    assert parses.turns._taken == 1
    calls = False
    tasks.append(parses.begin(2))
    await settle()
    assert parses.running == [2]
    parses.ends[2].set()
    parses.turns._end()  # the rest is over
    await settle()
    assert parses.running == [1]
    parses.ends[1].set()
    await asyncio.gather(*tasks)
    assert parses.turns._taken == 0


def test_a_load_that_is_dropped_with_its_loop_gives_its_turn_back() -> None:
    """It ends when it is collected, and there is nothing left that could end a rest."""
    turns = Turns(1, lambda: True)

    async def load() -> None:
        async with turns.turn():
            await asyncio.sleep(0)

    dropped = load()
    dropped.send(None)
    assert turns._taken == 1
    dropped.close()
    assert turns._taken == 0


async def test_no_rest_is_longer_than_others_have_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged model was parsed for half a minute: that is no reason to load nothing for as long again."""
    monkeypatch.setattr("modelcache.pool.turns._REST", 1e12)
    monkeypatch.setattr("modelcache.pool.turns._LONGEST_REST", 0.0)
    parses = Parses(Turns(1, lambda: True))
    tasks = [parses.begin(number) for number in range(2)]
    await settle()
    parses.ends[0].set()
    await settle()
    assert parses.running == [1]
    parses.ends[1].set()
    await asyncio.gather(*tasks)


async def test_loads_take_turns_while_calls_wait(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    """With two processors one worker parses at a time; as soon as nobody waits for an answer, both do."""
    monkeypatch.setattr("modelcache.registry.usable_cores", lambda: 2)
    registry = await make_registry(MemoryStore({f"m{number}.ubj": MODEL.ubj for number in range(4)}), workers=2)
    await registry.load("m0")
    turns, workers = registry._pool.turns, registry._pool.workers
    for worker in workers:
        halt(worker.pid)
    call = asyncio.create_task(registry.predict("m0", ROWS))
    await settle()
    loads = [asyncio.create_task(registry.load(f"m{number}")) for number in (1, 2, 3)]
    while len(turns._line) < 2:
        await asyncio.sleep(0)
    assert turns._taken == 1
    for worker in workers:
        go_on(worker.pid)
    await asyncio.gather(call, *loads)
    await settle()
    assert turns._taken == 0


async def test_large_models_take_no_turns(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    """They would keep all others waiting."""
    monkeypatch.setattr("modelcache.registry.usable_cores", lambda: 2)
    monkeypatch.setattr("modelcache.attempt.BRIEF", 1000)
    registry = await make_registry(MemoryStore({"m.ubj": MODEL.ubj, "n.ubj": MODEL.ubj}))
    await registry.load("m")
    (worker,) = registry._pool.workers
    async with registry._pool.turns.turn():
        halt(worker.pid)
        call = asyncio.create_task(registry.predict("m", ROWS))
        await settle()
        load = asyncio.create_task(registry.load("n"))
        await settle()
        go_on(worker.pid)
        assert (await load).name == "n"
    await call
