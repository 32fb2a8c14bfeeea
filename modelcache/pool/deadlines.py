"""Deadlines of calls: one timer for all that wait on a lane.

Nearly all calls are answered long before their deadline. To set and cancel a timer for each takes 1 us, to note and
forget a deadline 0.1; and asyncio keeps cancelled timers until their time has come.
"""

from __future__ import annotations

import asyncio
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Deadlines:
    """Calls what was noted for each deadline (monotonic) that passes before it is forgotten."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._noted: dict[int, tuple[float, Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = inf
        """When the timer goes off; perhaps nothing is left to do then, but never later than the first deadline."""

    def note(self, number: int, deadline: float, expire: Callable[[], None]) -> None:
        """Call ``expire`` when ``deadline`` has passed, unless ``number`` is forgotten before."""
        self._noted[number] = deadline, expire
        if deadline < self._next:
            self._set_timer(deadline)

    def forget(self, number: int) -> None:
        """The call has ended; harmless if it had no deadline."""
        self._noted.pop(number, None)

    def clear(self) -> None:
        """The lane has ended, and so have all of its calls."""
        self._noted.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._next = None, inf

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = deadline
        self._timer = self._loop.call_later(max(0.0, deadline - monotonic()), self._look)

    def _look(self) -> None:
        now = monotonic()
        self._timer, self._next = None, inf
        try:
            for number in [number for number, (deadline, _) in self._noted.items() if deadline <= now]:
                self._expire(number)
        finally:  # whatever one of them raises, the others have their turn
            self._look_again()

    def _expire(self, number: int) -> None:
        noted = self._noted.pop(number, None)
        if noted is not None:  # one that has just expired may have ended this call, too
            _, expire = noted
            expire()

    def _look_again(self) -> None:
        first = min((deadline for deadline, _ in self._noted.values()), default=inf)
        if first < self._next:  # what has just expired may have led to another call
            self._set_timer(first)
