"""Calls whose time is over before their answer is there."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from modelcache.errors import PredictTimeoutError

if TYPE_CHECKING:
    from modelcache.cache.entry import Entry
    from modelcache.calls import Answer
    from modelcache.resident import Resident


def expire(entry: Entry[Resident], number: int, answer: Answer) -> None:
    """Let the request ``number`` fail, if it has not been answered."""
    if answer.done():
        return
    worker = entry.value.worker
    wait = worker.requests.expected_wait()  # this call, which has waited in vain, among those that it goes by
    worker.requests.cancel(number)
    worker.suspect()
    answer.set_exception(_timed_out(entry, wait))


async def writable(entry: Entry[Resident], deadline: float, *, counted: bool = True) -> None:
    """Wait until the worker has taken enough of what was sent before, and no longer than the call may take.

    Raises WorkerLostError if it has ended meanwhile, and nobody would be told that what is sent now is lost.
    """
    try:
        async with asyncio.timeout(deadline - monotonic() if deadline else None):
            await entry.value.worker.requests.writable(counted=counted)
    except TimeoutError as error:
        worker = entry.value.worker
        worker.suspect()
        raise _timed_out(entry, worker.requests.expected_wait()) from error
    entry.value.worker.check_not_gone()


def _timed_out(entry: Entry[Resident], wait: float) -> PredictTimeoutError:
    others = entry.value.worker.requests.waiting
    return PredictTimeoutError(
        f"{entry.key} did not answer within the timeout; {others} more calls wait for its worker. "
        "Give it more time, or send fewer rows at once.",
        model=entry.key,
        retry_after=wait,
    )
