"""A bound on the memory that one load may take: a single flipped bit makes XGBoost's parser ask for gigabytes.

The kernel's RLIMIT_DATA counts what a process has mapped for writing, touched or not. A request beyond it fails at
once, as ``std::bad_alloc``, which XGBoost reports like any other error, instead of exhausting the machine page by page
until the out-of-memory killer ends a process of its choice.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if sys.platform == "linux":
    import resource

if TYPE_CHECKING:
    from collections.abc import Iterator

_PER_BYTE = 40
"""At the peak of their parse, JSON models were seen to take up to 15 times their bytes, UBJSON up to 4; a list of
nothing but one-digit numbers takes 33."""

_BESIDE = 256 << 20
"""What else may be needed meanwhile: by the trial prediction, 8 bytes for each feature, and by the main thread."""

_STACK = 8 << 20
"""Of a thread: XGBoost starts ``nthread`` of them for each thread that calls it, when it first computes something."""


def most_bytes(unpacked: int, threads: int) -> int:
    """Return the bytes that a process may grow by while it loads a sound model of ``unpacked`` bytes."""
    return _PER_BYTE * unpacked + _BESIDE + 2 * threads * _STACK


@contextlib.contextmanager
def growing_by(most: int) -> Iterator[None]:
    """Let this process grow by ``most`` bytes at most, where the kernel keeps such a bound: Linux."""
    before = _lower(most)
    try:
        yield
    finally:
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _lower(most: int) -> tuple[int, int] | None:
    """Lower the soft limit, and return what to restore; None if nothing was changed."""
    if sys.platform != "linux":
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a sandbox that forbids it
        wanted = _data_bytes() + most
        if soft == resource.RLIM_INFINITY or wanted < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
            return soft, hard
    return None


def _data_bytes() -> int:
    """Return what the kernel counts."""
    if not _opened:  # once: opening it takes longer than all else here
        _opened.append(os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC))
    return int(os.pread(_opened[0], 200, 0).split()[5]) * resource.getpagesize()


_opened: list[int] = []
