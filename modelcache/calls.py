"""A call: rows to the worker that holds the model, predictions back, within a deadline.

A call that would keep a worker busy for long travels in slices, two at a time: one is copied while the other is being
predicted, and calls of others that arrive meanwhile are answered between them. Large batches are not converted, nor
even copied, as a whole: each slice goes from the caller's array straight into memory shared with the worker.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from functools import partial
from math import isnan
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from anyio import to_thread

from modelcache.admission import admit
from modelcache.errors import InvalidInputError, ModelCacheError, PredictTimeoutError
from modelcache.inputs import (
    as_matrix,
    column_order,
    is_large,
    is_numeric_array,
    pack_row,
    read_large,
    write_rows,
)
from modelcache.pool.shared import SLOT_BYTES
from modelcache.pool.wire import OUTPUTS
from modelcache.records import Timings

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.pool.lost import Epitaph
    from modelcache.pool.requests import Sliced
    from modelcache.records import Output, Tier
    from modelcache.resident import Resident

    Matrix = NDArray[np.float32]
    Answer = asyncio.Future[tuple[Matrix, float]]

_OUTPUT_CODES = {output: code for code, output in enumerate(OUTPUTS)}

_VALUE = _OUTPUT_CODES["value"]

_SLICE_SECONDS = 0.001
"""How long one slice should keep a worker busy: others that come may wait so long."""
_SHORT_SLICE_SECONDS = 0.0004
"""The same while there are others: a slice costs 0.05 to 0.1 ms beside its rows."""
_ALONE_AFTER = 20
"""Slices in a row after which there are no others: who waits for an answer to ask the next is there again sooner."""
_FEW_ROWS = 64
"""XGBoost predicts in blocks of this many: fewer tell little about the cost of a row."""
_ROW_SECONDS_GUESSED = _SLICE_SECONDS / _FEW_ROWS
"""What a row is taken to cost before it is measured: predictions take a microsecond, contributions up to many
milliseconds."""
_SLICES_IN_FLIGHT = 2
"""One that runs, and one that waits so that the worker need not."""


class Call:
    """Rows on their way, and what became of them so far."""

    __slots__ = (
        "_matrix", "answered_by", "columns", "deadline", "hit", "large", "lost", "output", "packed", "queue_limit",
        "shape", "unread", "values",
    )  # fmt: skip

    def __init__(self, rows: Any, output: Output, timeout: float | None, queue_limit: int) -> None:
        self.unread: Any = None
        """Large rows that are yet to be read, by :meth:`read`; None if they are there."""
        self.packed = pack_row(rows)
        """The bytes of a row that came as a list: most calls need no array."""
        self.shape: tuple[int, int]
        """Rows and columns."""
        self.columns: tuple[str, ...] | None = None
        """Their names, if they have names."""
        if self.packed is not None:
            self.shape, self.large = (1, len(self.packed) // 4), False
        else:
            self._take(rows)
        try:
            self.output = _OUTPUT_CODES[output]
        except (KeyError, TypeError):
            raise InvalidInputError(f"output is {output!r}: it has to be one of {', '.join(OUTPUTS)}.") from None
        if timeout is not None and (not isinstance(timeout, int | float) or isnan(timeout)):
            raise InvalidInputError(f"timeout is {timeout!r}: it has to be a number of seconds, or None.")
        self.deadline = 0.0 if timeout is None else monotonic() + timeout
        self.queue_limit = queue_limit
        self.lost: Epitaph | None = None
        """The end of the last worker that was asked."""
        self.answered_by: Entry[Resident] | None = None
        """The model that has predicted for it as it was loaded."""
        self.hit: Callable[[Entry[Resident]], None] | None = None
        """What is to be told that it has found its model resident, once its rows are on their way."""

    def _take(self, rows: Any) -> None:
        self.large = is_large(rows)
        if not self.large:
            matrix, self.columns = as_matrix(rows)
            # The caller may change his own array before it is sent to a second worker.
            self.matrix = matrix.copy() if matrix is rows else matrix
        elif is_numeric_array(rows):
            self.matrix = rows
        else:
            self.unread = rows

    @property
    def matrix(self) -> NDArray[Any]:
        """float32 in row-major order; numbers of any kind, in the caller's own array, if it is large."""
        if self.packed is not None:
            return np.frombuffer(self.packed, np.float32).reshape(self.shape)
        return self._matrix

    @matrix.setter
    def matrix(self, rows: NDArray[Any]) -> None:
        self._matrix, self.shape = rows, rows.shape

    def note_hit(self, entry: Entry[Resident]) -> None:
        """Count the hit, if it is one and has not been counted: while the worker is busy, that costs no time."""
        hit, self.hit = self.hit, None
        if hit is not None:
            hit(entry.original or entry)

    async def read(self) -> None:
        """Convert what the event loop should not, in a thread, within the call's deadline."""
        try:
            async with asyncio.timeout_at(_loop_time(self.deadline)):
                self.matrix, self.columns = await to_thread.run_sync(read_large, self.unread, abandon_on_cancel=True)
        except TimeoutError as error:
            raise PredictTimeoutError(
                "The timeout passed while the rows were being converted: give it more time, or pass a float32 array.",
            ) from error
        self.unread = None

    @property
    def may_go_ahead(self) -> bool:
        """True if its row may travel with the artifact, in the place of one that the model would be tried on.

        It must have no names to be checked. More rows would keep the loader busy, and XGBoost keeps the largest answer
        of each model for the thread that asked, outside the measured bytes.
        """
        return self.output == _VALUE and self.columns is None and self.shape[0] == 1

    @property
    def expired(self) -> bool:
        """True if its time is over: nobody waits for it any more."""
        return bool(self.deadline) and self.deadline <= monotonic()

    def answer(self, values: Matrix, entry: Entry[Resident]) -> None:
        """Take what ``entry`` has predicted as it was loaded."""
        self.values, self.answered_by = values, entry


class Trace:
    """What ``invoke`` wants to know of a call."""

    __slots__ = ("asked", "entry", "started", "waited")

    def __init__(self) -> None:
        self.entry: Entry[Resident]
        self.started = perf_counter()
        self.waited: float | None = None
        """Seconds for the model to become resident; None for a hit."""
        self.asked = 0.0
        """When the worker that answered was asked, or had answered already as it loaded the model."""

    @property
    def tier(self) -> Tier:
        """Where the model was when the call came."""
        return "memory" if self.waited is None else self.entry.value.tier

    def timings(self) -> Timings:
        """Say where the time went; the answer has just come."""
        arrival, ended = self.entry.value.arrival, perf_counter()
        downloading, loading = (arrival.downloading, arrival.loading) if self.waited is not None else (0.0, 0.0)
        return Timings(
            waiting=max(0.0, (self.waited or 0.0) - downloading - loading),
            downloading=downloading,
            loading=loading,
            predicting=ended - self.asked,
            total=ended - self.started,
        )


async def ask(entry: Entry[Resident], call: Call) -> Matrix:
    """Return the predictions of a leased ``entry``."""
    place, (rows, width) = entry.value, call.shape
    facts, requests = place.facts, place.worker.requests
    order: list[int] | None = None
    if call.columns is not None or width != facts.n_features:
        order = column_order(
            width, call.columns,
            model=entry.key, n_features=facts.n_features, feature_names=facts.feature_names,
        )  # fmt: skip
    if requests.waiting >= call.queue_limit:
        admit(entry.key, place, requests, call.queue_limit)
    if rows > 1 and _takes_long(place, call):
        with requests.slices_of(place) as sliced:
            return await _ask_in_slices(entry, call, order, sliced)
    if requests.congested:
        await _writable(entry, call.deadline)
    number, answer = _send(call, place, order)
    if call.deadline:
        requests.deadlines.note(number, call.deadline, partial(_expire, entry, number, answer))
    call.note_hit(entry)
    try:
        values, seconds = await answer
    except BaseException as error:
        requests.cancel(number)
        if isinstance(error, ModelCacheError):
            error.model = entry.key
        raise
    finally:
        if call.deadline:
            requests.deadlines.forget(number)
    if rows >= _FEW_ROWS:
        place.rare = replace(place.rare, row_seconds={**place.rare.row_seconds, call.output: seconds / rows})
    return values


def _takes_long(place: Resident, call: Call) -> bool:
    seconds = place.rare.row_seconds.get(call.output, _ROW_SECONDS_GUESSED)
    return call.large or call.shape[0] * seconds > 2 * _SLICE_SECONDS


def _send(call: Call, place: Resident, order: list[int] | None) -> tuple[int, Answer]:
    if call.packed is not None:  # without names, hence in the model's own order
        return place.worker.requests.predict_packed(place, call.shape, call.packed, call.output, call.deadline)
    matrix = call.matrix if order is None else call.matrix.take(order, axis=1)
    return place.worker.requests.predict(place, matrix, call.output, call.deadline)


class _Slice(NamedTuple):
    """Rows ``start`` to ``stop`` of a call, on their way to a worker that holds the model."""

    start: int
    stop: int
    place: Resident
    number: int
    answer: Answer


async def _ask_in_slices(entry: Entry[Resident], call: Call, order: list[int] | None, sliced: Sliced) -> Matrix:
    rows, sent = call.shape[0], 0
    answers: Matrix | None = None
    waiting: deque[_Slice] = deque()
    try:
        while sent < rows or waiting:
            while sent < rows and len(waiting) < _SLICES_IN_FLIGHT:
                await _writable(entry, call.deadline, counted=False)
                waiting.append(_send_slice(entry, call, order, sent, sliced))
                sent = waiting[-1].stop
            values, seconds = await waiting[0].answer
            answered = waiting.popleft()
            _end(answered)
            place = answered.place
            place.rare = replace(place.rare, row_seconds={**place.rare.row_seconds, call.output: seconds / len(values)})
            if answers is None:
                sliced.begun = True
                answers = np.empty((rows, *values.shape[1:]), np.float32)
            answers[answered.start : answered.stop] = values
    except ModelCacheError as error:
        error.model = entry.key
        raise
    finally:
        for slice_ in waiting:
            _end(slice_)
    assert answers is not None
    return answers


def _send_slice(entry: Entry[Resident], call: Call, order: list[int] | None, start: int, sliced: Sliced) -> _Slice:
    place = entry.value
    part = call.matrix[start : start + _slice_rows(place, call)]
    number, answer = place.worker.requests.predict_written(
        place, part.shape, partial(write_rows, part, order), call.output, call.deadline, sliced=sliced
    )
    if call.deadline:
        place.worker.requests.deadlines.note(number, call.deadline, partial(_expire, entry, number, answer))
    return _Slice(start, start + len(part), place, number, answer)


def _end(slice_: _Slice) -> None:
    """Let go of a slice, answered or not."""
    requests = slice_.place.worker.requests
    requests.deadlines.forget(slice_.number)
    # Whatever has become of the future: a call that is cancelled has the one cancelled that it waits for.
    requests.cancel(slice_.number)
    if not slice_.answer.cancel() and not slice_.answer.cancelled():
        slice_.answer.exception()  # it may have failed unseen, behind the slice that failed the call


def _slice_rows(place: Resident, call: Call) -> int:
    most: int = SLOT_BYTES // (4 * call.shape[1])
    alone = place.worker.requests.slices_in_a_row >= _ALONE_AFTER
    seconds = _SLICE_SECONDS if alone else _SHORT_SLICE_SECONDS
    wanted = seconds / place.rare.row_seconds.get(call.output, _ROW_SECONDS_GUESSED)
    return max(1, min(most, int(wanted)))


def _expire(entry: Entry[Resident], number: int, answer: Answer) -> None:
    if answer.done():
        return
    worker = entry.value.worker
    wait = worker.requests.expected_wait()  # this call, which has waited in vain, among those that it goes by
    worker.requests.cancel(number)
    worker.suspect()
    answer.set_exception(_timed_out(entry, wait))


async def _writable(entry: Entry[Resident], deadline: float, *, counted: bool = True) -> None:
    """Wait until the worker has taken enough of what was sent before, and no longer than the call may take."""
    try:
        async with asyncio.timeout(deadline - monotonic() if deadline else None):
            await entry.value.worker.requests.writable(counted=counted)
    except TimeoutError as error:
        worker = entry.value.worker
        worker.suspect()
        raise _timed_out(entry, worker.requests.expected_wait()) from error


def _loop_time(deadline: float) -> float | None:
    """Return ``deadline``, which is monotonic and 0.0 for none, by the clock of the loop."""
    return asyncio.get_running_loop().time() + deadline - monotonic() if deadline else None


def _timed_out(entry: Entry[Resident], wait: float) -> PredictTimeoutError:
    others = entry.value.worker.requests.waiting
    return PredictTimeoutError(
        f"{entry.key} did not answer within the timeout; {others} more calls wait for its worker. "
        "Give it more time, or send fewer rows at once.",
        model=entry.key,
        retry_after=wait,
    )
