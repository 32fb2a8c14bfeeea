"""Bytes a model takes: what the allocator has handed out, and giving freed bytes back to the system.

With glibc, the loader thread allocates from an arena of its own, and ``malloc_info`` reports each arena
separately. Leaving out the main thread's arena leaves out what predictions allocate meanwhile: readings of a 43 kB
model scatter by 2 kB instead of the 23 kB that the process-wide ``mallinfo2`` shows. Chunks too large for an arena
are mapped by themselves and are counted for the whole process.

Elsewhere (musl, macOS) there is no such figure, and the size is estimated from the model's serialised bytes.
"""

from __future__ import annotations

import ctypes
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_M_MMAP_THRESHOLD = -3
_LARGEST_ARENA_CHUNK = 32 << 20  # glibc's upper bound for the threshold on 64-bit systems

_TOLERATED, _TOLERATED_SHARE = 256 << 10, 1 / 16
"""Bytes that may stay with the allocator for good, or their share of the models' bytes."""
_PRESSING, _PRESSING_SHARE = 32 << 20, 1 / 4
"""As many may stay while one order follows another: about what a worker without models takes. Trimmed in the midst of
unloads, the heap would fetch page by page for the next loads, which takes as long as a quarter of their parses."""

_PARSED = {"ubj": 3, "json": 11, "other": 1}
"""Bytes that parsing takes at its peak, per byte of the model, beyond what stays."""

_TOTALS = re.compile(
    rb'<total type="fast" count="\d+" size="(\d+)"/>\s*'
    rb'<total type="rest" count="\d+" size="(\d+)"/>\s*'
    rb'(?:<total type="mmap" count="\d+" size="(\d+)"/>\s*)?'
    rb'<system type="current" size="(\d+)"/>'
)


class Heap:
    """Readings of this process's allocator; ``exact`` says whether they are measured or estimated."""

    def __init__(self) -> None:
        self._libc = _glibc()
        self.exact = self._libc is not None
        if self._libc:
            # A fixed threshold keeps the main thread's buffers in its arena and out of the process-wide figure.
            self._libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_ARENA_CHUNK)

    def in_use(self) -> int:
        """Return the bytes handed out outside the main thread's arena; 0 where the allocator tells nothing."""
        if self._libc is None:
            return 0
        report = self._report()
        # The first totals are those of the main thread's arena, the last those of all arenas.
        return _handed_out(report, report.rindex(b"</heap>")) - _handed_out(report, report.index(b"</sizes>"))

    def trim(self) -> None:
        """Return freed bytes to the system: freeing alone leaves the process as large as it was."""
        if self._libc is not None:
            self._libc.malloc_trim(0)

    def _report(self) -> bytes:
        libc = self._libc
        assert libc is not None
        text, size = ctypes.c_void_p(), ctypes.c_size_t()
        stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        report = ctypes.string_at(text, size.value) if text.value else b""
        libc.free(text)
        return report


class Scales:
    """Weighs models: each is what the heap has grown by since it began to be loaded.

    A reading walks through all free chunks, and a first call waits for it. So the reading after one load is that before
    the next, unless models have been freed between them: then another is taken when there is nothing else to do.
    """

    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._rest: int | None = None
        """Bytes in use when nothing is loading; None when they are not known any more."""
        self._before = 0
        self._beside: int | None = None
        self._ahead = 0
        """Bytes in use already that belong to the model which is weighed next."""
        self._made: int | None = None
        """Bytes of what is set aside for a model, once they were weighed."""

    def begin(self, beside: int | None) -> None:
        """Begin with a model; ``beside`` bytes are held until its end, and were not before; None: nobody knows."""
        resting = self._rest
        before = self._heap.in_use() if resting is None or beside is None else resting + beside
        self._before, self._beside = before - self._ahead, beside
        self._rest, self._ahead = None, 0

    def end(self) -> int:
        """Return the bytes of the model, which is loaded."""
        after = self._heap.in_use()
        if self._beside is not None:
            self._rest = after - self._beside
        return after - self._before

    def pass_over(self) -> None:
        """Do not weigh the model that is about to be loaded: what it takes is known."""
        self._rest, self._ahead = None, 0

    def disturb(self) -> None:
        """Something was freed; how much it was is not certain, and errors would add up: another reading is due."""
        self._rest = None

    def come_to_rest(self) -> None:
        """Take the reading that is due; nothing must be arriving."""
        self._rest = self._heap.in_use()

    @property
    def at_rest(self) -> bool:
        """True while the bytes in use are known, without a reading."""
        return self._rest is not None

    def set_aside(self, make: Callable[[], bool]) -> None:
        """Have something made that the next model is to have: as many bytes each time.

        ``make`` returns False if it was there already. The first time, the scales must be at rest.
        """
        if not make():
            return
        if self._made is None:
            assert self._rest is not None
            self._made = self._heap.in_use() - self._rest
        if self._rest is not None:
            self._rest += self._made
        self._ahead += self._made

    @property
    def sets_aside(self) -> bool:
        """True once it is known how many bytes that takes."""
        return self._made is not None


class Slack:
    """What the allocator has free, about, and when the system is to have it back.

    Freeing alone leaves the process as large as it was. Returning what is free walks through the whole heap and takes
    up to milliseconds, and what was returned has to be fetched page by page for the next load.
    """

    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._held = self._most_held = 0
        """Bytes of the models, and the most that they were since what is free was returned."""
        self._parsed = 0
        """Bytes that the largest parse since then has left free."""

    def loaded(self, size: int) -> None:
        """A model of ``size`` bytes has come."""
        self._held += size
        self._most_held = max(self._held, self._most_held)

    def unloaded(self, size: int) -> None:
        """A model of ``size`` bytes has left."""
        self._held -= size

    def parsed(self, form: str, size: int) -> None:
        """A model was parsed from ``size`` bytes: what that took beside is free again."""
        self._parsed = max(self._parsed, _PARSED[form] * size)

    @property
    def is_due(self) -> bool:
        """True if it should be given back when there is nothing else to do."""
        tolerated = max(_TOLERATED, self._held * _TOLERATED_SHARE)
        return self._most_held - self._held + self._parsed >= tolerated

    @property
    def is_pressing(self) -> bool:
        """True if more models have left than those that come next are likely to take the place of."""
        return self._most_held - self._held >= max(_PRESSING, self._held * _PRESSING_SHARE)

    def give_back(self) -> None:
        """Return it to the system."""
        self._heap.trim()
        self._most_held, self._parsed = self._held, 0


def _handed_out(report: bytes, start: int) -> int:
    """Return the bytes in use by the totals that follow ``start``; the sizes of free chunks are most of the report."""
    totals = _TOTALS.search(report, start)
    assert totals is not None
    fast, rest, mapped, system = (int(size or 0) for size in totals.groups())
    return system - fast - rest + mapped


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info") or not hasattr(libc, "gnu_get_libc_version"):
        return None  # musl
    libc.open_memstream.restype = ctypes.c_void_p
    libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc
