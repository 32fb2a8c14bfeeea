"""Turns: how many models are parsed at once while there are calls to be answered.

A parse has a processor to itself for as long as it takes, whatever its priority: the scheduler does not interrupt it
for a thread that has just woken up. With as many parses as processors, warm calls wait behind one of them; and with one
after another without a rest, each finds one in its way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

BRIEF = 2 << 20
"""Bytes of memory of the largest model that takes turns: to parse it takes some 10 ms, which others can wait for."""

_PATIENCE = 0.05
"""Seconds to wait for a turn at most: somebody's parse may never end."""

_REST = 1.0
"""So many times as long as a turn took is the rest before the next: calls have half of the time to themselves."""
_LONGEST_REST = 0.05
"""Seconds."""


class Turns:
    """``count`` turns at a time, given in the order in which they are asked for, as long as the pool ``is_asked()``."""

    def __init__(self, count: int, is_asked: Callable[[], bool]) -> None:
        self._count = count
        self._is_asked = is_asked
        self._taken = 0
        self._line: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold a turn, waiting for it if need be."""
        if self._taken >= self._count and self._is_asked():
            await self._wait()
        self._taken += 1
        began = monotonic()
        try:
            yield
        finally:
            self._rest(_REST * (monotonic() - began))

    def _rest(self, seconds: float) -> None:
        """Keep a turn that has ended from the next for so long, if there are calls now."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a load that was dropped with its loop ends when it is collected
            self._end()
            return
        if self._is_asked():
            loop.call_later(min(seconds, _LONGEST_REST), self._end)
        else:
            self._end()

    def _end(self) -> None:
        self._taken -= 1
        self._call_next()

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        promise: asyncio.Future[None] = loop.create_future()
        self._line.append(promise)
        impatience = loop.call_later(_PATIENCE, _fulfil, promise)
        try:
            await promise
        except asyncio.CancelledError:
            if not promise.cancelled():  # it came in the same tick
                self._call_next()
            raise
        finally:
            impatience.cancel()
            with suppress(ValueError):  # it was called
                self._line.remove(promise)

    def _call_next(self) -> None:
        """Give a turn to the next, if there is one: who has lost patience has taken one more than there are."""
        while self._line and self._taken < self._count:
            promise = self._line.popleft()
            if not promise.done():
                promise.set_result(None)
                return


def _fulfil(promise: asyncio.Future[None]) -> None:
    if not promise.done():
        promise.set_result(None)
