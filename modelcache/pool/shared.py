"""Memory that a worker shares with its parent: slots for large batches, and behind them the black box.

The parent makes it before the worker starts. It has no name, so there is nothing to clean up: it is gone with the last
process that has it, however that ends. Pages that nobody has touched take no memory. Shared by both sides, so it
imports little.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from math import prod

import numpy as np
from numpy.typing import NDArray

SLOT_BYTES = 512 << 10
"""What one slice takes at most: its rows, and then what is predicted for them."""

SLOTS = 12
"""More than two are lent at a time only where several callers have large batches."""

BOX_OFFSET = SLOTS * SLOT_BYTES
_SIZE = BOX_OFFSET + 24

Matrix = NDArray[np.float32]


def shared_memory() -> int:
    """Return a descriptor of zeroed memory for a worker to inherit."""
    if hasattr(os, "memfd_create"):  # not on macOS, nor where Python was built for an old C library
        descriptor = os.memfd_create("modelcache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, _SIZE)
        # A worker that made it smaller would end its parent, by SIGBUS.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return descriptor
    with tempfile.TemporaryFile() as file:
        descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _SIZE)
    return descriptor


def map_memory(descriptor: int) -> mmap.mmap:
    """Map all of it; ``descriptor`` is not needed any more then."""
    return mmap.mmap(descriptor, _SIZE)


class Arena:
    """The slots in ``memory`` as one side sees them, numbered from 1."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory: mmap.mmap | None = memory

    def at(self, slot: int, shape: tuple[int, ...]) -> Matrix:
        """Return the beginning of ``slot`` as an array, to be read or written; it must not be kept."""
        assert self._memory is not None
        assert 0 < slot <= SLOTS
        assert 4 * prod(shape) <= SLOT_BYTES
        offset = (slot - 1) * SLOT_BYTES
        return np.ndarray(shape, np.float32, self._memory, offset)

    def close(self) -> None:
        """Let go of the memory; harmless when done twice.

        It is unmapped when the last array in it has gone, which the traceback of an error may keep for a while.
        """
        self._memory = None


class Slots(Arena):
    """The parent's side, which lends the slots: each from the moment rows are put into it until the worker reports it.

    That a call has been cancelled is not enough, since the worker may be reading its rows.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__(memory)
        self.free = list(range(SLOTS, 0, -1))
        """Those that are not lent; what was used last is used next, as it is in the caches, and has its pages."""

    def take(self, shape: tuple[int, int]) -> int:
        """Return a slot for rows of ``shape``; 0 if all are lent, or a slot is too small for it."""
        return self.free.pop() if self.free and 4 * shape[0] * shape[1] <= SLOT_BYTES else 0

    def give_back(self, slot: int) -> None:
        """Take back a slot that the worker has reported, or never heard of."""
        self.free.append(slot)

    def close(self) -> None:
        """Let go of the memory, and lend nothing any more."""
        super().close()
        self.free.clear()
