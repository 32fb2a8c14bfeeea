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

_M_MMAP_THRESHOLD = -3
_LARGEST_ARENA_CHUNK = 32 << 20  # glibc's upper bound for the threshold on 64-bit systems

_FREE = re.compile(rb'<total type="(?:fast|rest)" count="\d+" size="(\d+)"/>')
_SYSTEM = re.compile(rb'<system type="current" size="(\d+)"/>')
_MAPPED = re.compile(rb'<total type="mmap" count="\d+" size="(\d+)"/>')


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
        mapped = sum(int(size) for size in _MAPPED.findall(report)[-1:])
        return mapped + sum(map(_handed_out, _totals(report)[1:]))  # the first arena is the main thread's

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


def _totals(report: bytes) -> list[bytes]:
    """Return what the report says of each arena as a whole; the sizes of its chunks, most of the text, are skipped."""
    return [rest.partition(b"</heap>")[0] for rest in report.split(b"</sizes>")[1:]]


def _handed_out(arena: bytes) -> int:
    system = _SYSTEM.search(arena)
    return (int(system[1]) if system else 0) - sum(map(int, _FREE.findall(arena)))


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
