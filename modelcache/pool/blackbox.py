"""The black box of a worker: what its parser is at, in memory that is still there when the worker has crashed.

The worker stores a number where its parent can read it. A frame that said the same would cost each load a system call,
and a wake-up of the parent. Shared by both sides, so it imports little.
"""

from __future__ import annotations

import mmap
import os
import tempfile

_SIZE = 4
"""One number of 32 bits: as such it is stored at once, so that nobody reads half of one."""


def shared_memory() -> int:
    """Return a descriptor of zeroed memory for a worker to inherit; it is gone with the last process that has it."""
    if hasattr(os, "memfd_create"):  # not on macOS, nor where Python was built for an old C library
        descriptor = os.memfd_create("modelcache", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _SIZE)
    return descriptor


class BlackBox:
    """One end of it, which does not need ``descriptor`` any more when it is made."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._number = memoryview(self._memory).cast("I")
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
            self._memory.close()
