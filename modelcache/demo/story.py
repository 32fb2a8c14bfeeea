"""The acts of the demo, each of which shows one promise kept."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rich.text import Text

from modelcache import ModelEvicted, ModelLoaded
from modelcache.commands.terminal import show_size
from modelcache.demo.fleet import NEWCOMERS
from modelcache.demo.houses import make_houses, price

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from modelcache import Event, ModelRegistry, Timings
    from modelcache.demo.fleet import Fleet
    from modelcache.demo.houses import Table

CALLERS = 200
_TIGHT_BUDGET = 0.4
"""Share of the fleet that fits, of models of average size; and half a model more, so that it does not depend on the
last byte how many fit."""
_CALLS_SHOWN = 10

_HEADER = "city            year  sqft bd bath acre gar predicted   formula call      time"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the demo, as it was answered."""

    act: str
    city: str
    house: Table
    predicted: float
    cold: bool
    timings: Timings


class Story:
    """Tells it on ``console``; what was called stays in ``calls``, but for the rush."""

    def __init__(self, registry: ModelRegistry, fleet: Fleet, console: Console, random: np.random.Generator) -> None:
        self.calls: list[Call] = []
        self._registry = registry
        self._fleet = fleet
        self._console = console
        self._random = random

    async def tell(self, calls: int) -> None:
        """All acts, in order; two of them make ``calls`` calls."""
        await self._call_at_random(calls)
        await self._welcome_a_new_city(NEWCOMERS[0])
        await self._tighten_the_budget(calls)
        await self._rush(NEWCOMERS[1])

    async def _call_at_random(self, calls: int) -> None:
        count = f"{_count(calls, 'call')} of {_count(len(self._fleet.cities), 'city', 'cities')}"
        self._title(f"{count} at random: the first call of each loads its model")
        self._say(_HEADER, style="bold")
        for _ in range(calls):
            self._say_call(await self._call("at random", self._any_of(self._fleet.cities)))

    async def _welcome_a_new_city(self, city: str) -> None:
        self._title(f"{city}.tar.gz is copied into the folder, and served at once")
        await asyncio.to_thread(self._fleet.copy_in, city)
        self._say(_HEADER, style="bold")
        for _ in range(2):
            self._say_call(await self._call("new city", city))
        stats = self._registry.stats()
        self._say(f"Nothing was restarted: {len(stats.workers)} workers, {stats.worker_restarts} restarts.")

    async def _tighten_the_budget(self, calls: int) -> None:
        cities = [*self._fleet.cities, NEWCOMERS[0]]
        sizes = [(await self._registry.load(city)).size_bytes for city in cities]
        fitting = max(1, round(_TIGHT_BUDGET * len(sizes)))
        budget = int((fitting + 0.5) * fmean(sizes))
        self._title(f"{_count(calls, 'call')} more, with a budget for {fitting} of the {len(sizes)} models")
        watch = _Watch(self._registry)
        self._registry.resize(budget)
        watch.peak = self._registry.stats().bytes_resident
        evicted = _count(len(watch.take_evicted()), "model")
        self._say(f"The models take {show_size(sum(sizes))}, the budget is now {show_size(budget)}: {evicted} evicted.")
        for number in range(calls):
            call = await self._call("tight budget", self._any_of(cities))
            if number < _CALLS_SHOWN:
                self._say_evictions(call, watch.take_evicted())
        watch.end()
        if calls > _CALLS_SHOWN:
            self._say(f"... and {_count(calls - _CALLS_SHOWN, 'call')} more.")
        total = _count(watch.evictions, "eviction")
        self._say(f"{total} in all. In use at most: {show_size(watch.peak)} of {show_size(budget)}.")

    async def _rush(self, city: str) -> None:
        self._title(f"{city} is copied in too, and {CALLERS} callers ask for it at the same moment")
        await asyncio.to_thread(self._fleet.copy_in, city)
        houses = make_houses(CALLERS, self._random)
        before, started = self._registry.stats(), time.perf_counter()
        answers = await asyncio.gather(*(self._registry.predict(city, house) for house in houses))
        milliseconds, after = (time.perf_counter() - started) * 1e3, self._registry.stats()
        loads, joins = after.loads - before.loads, after.joins - before.joins
        self._say(f"{len(answers)} answers after {milliseconds:.1f} ms, from {loads} load that {joins} callers shared.")

    async def _call(self, act: str, city: str) -> Call:
        house = make_houses(1, self._random)
        answer = await self._registry.invoke(city, house)
        call = Call(act, city, house, float(answer.predictions[0]), answer.tier != "memory", answer.timings)
        self.calls.append(call)
        return call

    def _any_of(self, cities: list[str]) -> str:
        return cities[self._random.integers(len(cities))]

    def _title(self, text: str) -> None:
        self._console.print(f"\n{text}\n", style="bold cyan")

    def _say(self, text: str, *, style: str = "") -> None:
        self._console.print(text, style=style, soft_wrap=True)

    def _say_call(self, call: Call) -> None:
        year, feet, bedrooms, bathrooms, acres, garage = call.house[0]
        what = f"{year:4.0f} {feet:5.0f} {bedrooms:2.0f} {bathrooms:4.1f} {acres:4.2f} {garage:3.0f}"
        prices = f"{_money(call.predicted):>9} {_money(price(call.house)[0]):>9}"
        self._console.print(_line(call, f"{what} {prices} "), soft_wrap=True)

    def _say_evictions(self, call: Call, evicted: list[str]) -> None:
        line = _line(call, "")
        if evicted:
            line.append(f"   evicts {', '.join(evicted)}")
        self._console.print(line, soft_wrap=True)


class _Watch:
    """Counts evictions, and the bytes in use after each load."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.evictions = 0
        self.peak = 0
        self._registry = registry
        self._evicted: list[str] = []
        self.end = registry.subscribe(self._note)

    def take_evicted(self) -> list[str]:
        """Return who has been evicted since the last time."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _note(self, event: Event) -> None:
        if isinstance(event, ModelEvicted):
            self.evictions += 1
            self._evicted.append(event.name)
        elif isinstance(event, ModelLoaded):
            stats = self._registry.stats()
            self.peak = max(self.peak, stats.bytes_resident + stats.bytes_reserved + stats.bytes_unloading)


def _line(call: Call, between: str) -> Text:
    tier, style = ("cold", "yellow") if call.cold else ("warm", "green")
    return Text(f"{call.city:<15} {between}").append(f"{tier} {call.timings.total * 1e3:6.2f} ms", style=style)


def _count(number: int, one: str, several: str = "") -> str:
    return f"1 {one}" if number == 1 else f"{number:,} {several or one + 's'}"


def _money(value: float) -> str:
    return f"${value:,.0f}"
