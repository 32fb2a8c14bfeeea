"""Threads that give back to the allocator what they have freed."""

from __future__ import annotations

from os import sched_yield
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def run_in_thread_of_its_own(task: Callable[[], T]) -> T:
    """Run ``task`` so that what it frees is free in the allocator's books too.

    glibc keeps some of the chunks that a thread frees in a cache of that thread, where they count as in use, and the
    next load takes them from there unseen: a small model then seems to take half of what it does. The cache is given
    back when the thread has ended, which is a moment after Python has left it.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(task())
        except Exception as error:  # noqa: BLE001 - raised again where it was asked for
            errors.append(error)

    thread = Thread(target=run)
    thread.start()
    entry = Path("/proc/self/task", str(thread.native_id))
    thread.join()
    while entry.exists():
        sched_yield()
    for error in errors:
        raise error
    return results[0]
