"""The black box of a worker: what its parser is at, in memory that is still there when the worker has crashed.

The worker stores a number where its parent can read it. A frame that said the same would cost each load a system call,
and a wake-up of the parent. Shared by both sides, so it imports little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcache.pool.shared import BOX_OFFSET

if TYPE_CHECKING:
    import mmap


class BlackBox:
    """One end of it, at the end of ``memory``."""

    def __init__(self, memory: mmap.mmap) -> None:
        # One number of 32 bits: as such it is stored at once, so that nobody reads half of one.
        self._number = memoryview(memory)[BOX_OFFSET:].cast("I")
        self._last: int | None = None

    @property
    def parsing(self) -> int:
        """The model that the parser is at, also after :meth:`close`; 0 for none."""
        return self._number[0] if self._last is None else self._last

    @parsing.setter
    def parsing(self, model: int) -> None:
        self._number[0] = model

    def close(self) -> None:
        """Keep the number, and let go of the memory; harmless when done twice."""
        if self._last is None:
            self._last = self._number[0]
            self._number.release()
