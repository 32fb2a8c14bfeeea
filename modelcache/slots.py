"""Load slots: how many loads run at once."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from modelcache.cache.flight import Phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modelcache.cache.flight import Flight, Flights


class Slots:
    """``count`` slots, given out in the order in which flights ask for them.

    A flight whose bytes a group has been granted needs none: the group holds other models, and those who have the slots
    may be waiting for just these.
    """

    def __init__(self, count: int, flights: Flights) -> None:
        self._free = count
        self._flights = flights
        self._line: deque[tuple[Flight, asyncio.Future[bool]]] = deque()

    @asynccontextmanager
    async def slot(self, flight: Flight) -> AsyncIterator[None]:
        """Hold a slot for ``flight``, waiting for one if need be."""
        holds = await self._take(flight)
        try:
            yield
        finally:
            if holds:
                self._give_back()

    def exempt(self, flight: Flight) -> None:
        """Let ``flight`` wait no more: it has got bytes."""
        for waiting, promise in self._line:
            if waiting is flight and not promise.done():
                promise.set_result(False)

    async def _take(self, flight: Flight) -> bool:
        if flight.reserve is not None:
            return False
        if self._free:
            self._free -= 1
            return True
        promise: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        place = flight, promise
        self._line.append(place)
        try:
            self._flights.wait(flight, Phase.QUEUED)
            return await promise
        except asyncio.CancelledError:
            if promise.done() and not promise.cancelled() and promise.result():
                self._give_back()  # it came in the same tick
            raise
        finally:
            if place in self._line:
                self._line.remove(place)

    def _give_back(self) -> None:
        while self._line:
            _, promise = self._line.popleft()
            if not promise.done():
                promise.set_result(True)
                return
        self._free += 1
