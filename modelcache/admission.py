"""Admission: who may wait for a worker when ``queue_limit`` calls wait for it already.

One model may fill the queue. When it is full, a call for a model with fewer calls in it takes the place of the newest
one of a model with more, so that a flood of calls for one model does not shut out those for others. This is longest
queue drop, approximated as in CHOKe (Pan, Prabhakar, Psounis, INFOCOM 2000): no table says which queue is the longest;
a call is compared with the newest few, and with the model that was the longest when this was asked last, since a
flood goes on asking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcache.errors import OverloadedError

if TYPE_CHECKING:
    from modelcache.pool.requests import Queue, RequestChannel

_COMPARED = 8
"""Newest calls whose models are looked at."""


def admit(key: str, queue: Queue, requests: RequestChannel, limit: int) -> None:
    """Return with room for a call of ``key``, whose calls wait in ``queue``, or raise OverloadedError."""
    if requests.waiting < limit:
        return
    victim = _longer(queue, requests)
    number = None if victim is None else requests.newest_of(victim)
    if victim is None or number is None:
        raise _refusal(key, requests, limit)
    requests.displace(number, _eviction(victim, requests, limit))


def check_not_in_vain(key: str, queue: Queue, requests: RequestChannel, limit: int) -> None:
    """Raise OverloadedError if :func:`admit` would: before rows are converted that are many, and displacing nobody."""
    if requests.waiting >= limit and _longer(queue, requests) is None:
        raise _refusal(key, requests, limit)


def _longer(queue: Queue, requests: RequestChannel) -> Queue | None:
    """Return a queue that is still no shorter than ``queue`` when a call has moved from there to here."""
    longest = max((queue, requests.longest, *requests.newest_queues(_COMPARED)), key=_length)
    requests.longest = longest
    return longest if longest.waiting >= queue.waiting + 2 else None


def _length(queue: Queue) -> int:
    return queue.waiting


def _refusal(key: str, requests: RequestChannel, limit: int) -> OverloadedError:
    wait = requests.expected_wait()
    return OverloadedError(
        f"{limit} calls wait for the worker of {key} already (queue_limit): try again in {wait:.3f} s, "
        "or send several rows in one call.",
        model=key,
        retry_after=wait,
    )


def _eviction(queue: Queue, requests: RequestChannel, limit: int) -> OverloadedError:
    wait = requests.expected_wait()
    return OverloadedError(
        f"{queue.waiting} of the {limit} calls that may wait for one worker (queue_limit) were for this model, and the "
        f"newest has made way for a call for another: try again in {wait:.3f} s, or send several rows in one call.",
        retry_after=wait,
    )
