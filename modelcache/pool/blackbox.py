"""The black box of a worker: what its threads are at, in memory that is still there when the worker has crashed.

The worker stores numbers where its parent can read them. A frame that said the same would cost a system call, and a
wake-up of the parent. Shared by both sides, so it imports little.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from modelcache.pool.shared import BOX_OFFSET

if TYPE_CHECKING:
    import mmap

_PARSING, _CONVERTING = range(2)
_TOTAL, _SINCE = range(2)


class BlackBox:
    """One end of it, at the end of ``memory``."""

    def __init__(self, memory: mmap.mmap) -> None:
        # Numbers of 32 and 64 bits: as such they are stored at once, so that nobody reads half of one.
        self._numbers = memoryview(memory)[BOX_OFFSET : BOX_OFFSET + 8].cast("I")
        self._rest = memoryview(memory)[BOX_OFFSET + 8 : BOX_OFFSET + 24].cast("d")
        self._last: list[int] = []

    @property
    def parsing(self) -> int:
        """The model that the parser is at, also after :meth:`close`; 0 for none."""
        return (self._last or self._numbers)[_PARSING]

    @parsing.setter
    def parsing(self, model: int) -> None:
        self._numbers[_PARSING] = model

    @property
    def converting(self) -> int:
        """The model that is being converted, also after :meth:`close`; 0 for none."""
        return (self._last or self._numbers)[_CONVERTING]

    @converting.setter
    def converting(self, model: int) -> None:
        self._numbers[_CONVERTING] = model

    def rest(self) -> None:
        """The main thread has no call to answer."""
        self._rest[_SINCE] = monotonic()

    def wake(self) -> None:
        """The main thread has one again."""
        since, self._rest[_SINCE] = self._rest[_SINCE], 0.0
        self._rest[_TOTAL] += monotonic() - since

    def rested(self, now: float) -> float:
        """Return for how many seconds the main thread has had no call to answer, until ``now``, which is monotonic."""
        total, since = self._rest
        return total + now - since if since else total

    def close(self) -> None:
        """Keep the numbers of models, and let go of the memory; harmless when done twice."""
        if not self._last:
            self._last = self._numbers.tolist()
            self._numbers.release()
            self._rest.release()
