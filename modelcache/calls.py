"""A call: rows to the worker that holds the model, predictions back, within a deadline.

A call that would keep a worker busy for long travels in slices, two at a time: calls of others that arrive meanwhile
are answered between them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from modelcache.errors import OverloadedError, PredictTimeoutError
from modelcache.inputs import align
from modelcache.pool.wire import PAYLOAD_LIMIT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.pool.pool import Worker
    from modelcache.residency import Resident

    Matrix = NDArray[np.float32]
    Answer = asyncio.Future[tuple[Matrix, float]]

_SLICE_SECONDS = 0.005
"""How long one slice should keep a worker busy."""
_FEWEST_ROWS = 64
"""Rows of the smallest slice; XGBoost predicts in blocks of this many."""
_SLICES_IN_FLIGHT = 2
"""One that runs, and one that waits so that the worker need not."""


async def ask(
    entry: Entry[Resident],
    matrix: Matrix,
    columns: tuple[str, ...] | None,
    *,
    output: int,
    deadline: float,
    queue_limit: int,
) -> Matrix:
    """Return the predictions of a leased ``entry``; ``deadline`` is of the monotonic clock, 0.0 for none."""
    place = entry.value
    facts, requests = place.facts, place.worker.requests
    if columns is not None or matrix.shape[1] != facts.n_features:
        matrix = align(matrix, columns, model=entry.key, n_features=facts.n_features, feature_names=facts.feature_names)
    if requests.depth >= queue_limit:
        raise _overloaded(entry.key, place.worker, queue_limit)
    rows = len(matrix)
    if matrix.nbytes > PAYLOAD_LIMIT or rows * place.row_seconds > 2 * _SLICE_SECONDS:
        return await _ask_in_slices(entry, matrix, output, deadline)
    number, answer = requests.predict(place.number, matrix, output, deadline)
    if not deadline:
        return await _settled(place, number, answer, rows)
    timer = _set_timer(entry, number, answer, deadline)
    try:
        return await _settled(place, number, answer, rows)
    finally:
        timer.cancel()


async def _settled(place: Resident, number: int, answer: Answer, rows: int) -> Matrix:
    try:
        values, seconds = await answer
    except BaseException:
        place.worker.requests.cancel(number)
        raise
    if rows >= _FEWEST_ROWS:
        place.row_seconds = seconds / rows
    return values


async def _ask_in_slices(entry: Entry[Resident], matrix: Matrix, output: int, deadline: float) -> Matrix:
    place = entry.value
    requests = place.worker.requests
    sent, parts = 0, []
    waiting: deque[tuple[int, Answer, int]] = deque()
    timers: list[asyncio.TimerHandle] = []
    try:
        while sent < len(matrix) or waiting:
            while sent < len(matrix) and len(waiting) < _SLICES_IN_FLIGHT:
                await requests.writable()
                part = matrix[sent : sent + _slice_rows(place, matrix)]
                number, answer = requests.predict(place.number, part, output, deadline)
                waiting.append((number, answer, len(part)))
                sent += len(part)
                if deadline:
                    timers = [_set_timer(entry, number, answer, deadline), *timers[:1]]
            number, answer, rows = waiting[0]
            parts.append(await _settled(place, number, answer, rows))
            waiting.popleft()
    finally:
        for timer in timers:
            timer.cancel()
        for number, answer, _ in waiting:
            answer.cancel()
            requests.cancel(number)
    return np.concatenate(parts)


def _slice_rows(place: Resident, matrix: Matrix) -> int:
    most: int = max(1, PAYLOAD_LIMIT // (4 * matrix.shape[1]))
    wanted = _SLICE_SECONDS / place.row_seconds if place.row_seconds else 4 * _FEWEST_ROWS
    return min(most, max(_FEWEST_ROWS, int(wanted)))


def _set_timer(entry: Entry[Resident], number: int, answer: Answer, deadline: float) -> asyncio.TimerHandle:
    seconds = deadline - monotonic()
    loop = asyncio.get_running_loop()
    return loop.call_later(max(0.0, seconds), _expire, entry, number, answer)


def _expire(entry: Entry[Resident], number: int, answer: Answer) -> None:
    if answer.done():
        return
    worker = entry.value.worker
    worker.requests.cancel(number)
    worker.suspect()
    answer.set_exception(
        PredictTimeoutError(
            f"{entry.key} did not answer within the timeout: {worker.requests.depth} more calls wait for its worker. "
            "Give it more time, or send fewer rows at once.",
            model=entry.key,
            retry_after=worker.requests.last_latency,
        )
    )


def _overloaded(key: str, worker: Worker, limit: int) -> OverloadedError:
    wait = worker.requests.last_latency
    return OverloadedError(
        f"{limit} calls wait for the worker of {key} already (queue_limit): try again in {wait:.3f} s, "
        "or send several rows in one call.",
        model=key,
        retry_after=wait,
    )
