"""Calls that would keep a worker busy for long: they travel in slices, and are answered by all who have time.

Two slices are under way to a worker: one is copied while the other is being predicted, and calls of others that arrive
meanwhile are answered between them. Large batches are not converted, nor even copied, as a whole: each slice goes from
the caller's array straight into memory shared with the worker.

A model that is in several workers is asked in one of them, as for any call. The others take slices as long as no call
waits for them: whoever has done one is given the next, so that the slower, or the one that is interrupted, does less.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from modelcache.errors import ModelCacheError
from modelcache.inputs import write_rows
from modelcache.overdue import expire, writable
from modelcache.pacing import Pace
from modelcache.pool.requests import Sliced
from modelcache.pool.shared import SLOT_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.calls import Answer, Call
    from modelcache.pool.requests import RequestChannel
    from modelcache.resident import Resident

    Matrix = NDArray[np.float32]

_SLICE_SECONDS = 0.001
"""How long one slice should keep a worker busy: others that come may wait so long."""
_SHORT_SLICE_SECONDS = 0.0004
"""The same while there are others: a slice costs 0.05 to 0.1 ms beside its rows."""
_ALONE_AFTER = 20
"""Slices in a row after which there are no others: who waits for an answer to ask the next is there again sooner."""
_SLICES_IN_FLIGHT = 2
"""To each worker: one that runs, and one that waits so that the worker need not."""

_UNKNOWN = Pace()


def takes_long(place: Resident, call: Call) -> bool:
    """Say whether ``call`` is to be sent in slices."""
    rows = call.shape[0]
    if rows == 1 or call.large:
        return rows > 1
    pace = place.rare.paces.get(call.output, _UNKNOWN)
    return pace.seconds_for(rows) > 2 * _SLICE_SECONDS and pace.is_divisible(rows)


def pace_of(place: Resident, call: Call) -> Pace:
    """Return what is to be learnt of how long such calls take; most models are never asked for so many rows."""
    pace = place.rare.paces.get(call.output)
    if pace is None:
        pace = Pace()
        place.rare = replace(place.rare, paces={**place.rare.paces, call.output: pace})
    return pace


class _Seat:
    """A worker that holds the model, and how many slices it has been sent and has not answered."""

    __slots__ = ("entry", "in_flight", "sliced")

    def __init__(self, entry: Entry[Resident], sliced: Sliced) -> None:
        self.entry = entry
        self.sliced = sliced
        self.in_flight = 0

    @property
    def has_time(self) -> bool:
        """True while nobody waits for the worker; slices that it does for calls which wait elsewhere are no calls."""
        worker = self.entry.value.worker
        return worker.alive and not worker.requests.waiting and not worker.requests.congested


class _Slice(NamedTuple):
    """Rows ``start`` to ``stop`` of a call, on their way to ``seat``."""

    start: int
    stop: int
    seat: _Seat
    number: int
    answer: Answer


async def ask_in_slices(
    entry: Entry[Resident], call: Call, order: list[int] | None, helpers: Sequence[Entry[Resident]]
) -> Matrix:
    """Return the predictions of a leased ``entry``, part of them by those of its ``helpers`` that have time."""
    place = entry.value
    with place.worker.requests.slices_of(place) as sliced:
        others = [_Seat(helper, Sliced(helper.value, waits=False)) for helper in helpers]
        return await _SlicedCall(call, order, _Seat(entry, sliced), others).answer()


class _SlicedCall:
    """Gives out the rows of a call, and puts the predictions together."""

    def __init__(self, call: Call, order: list[int] | None, home: _Seat, others: list[_Seat]) -> None:
        self._call = call
        self._order = order
        """Of the columns; None if they are in the model's own."""
        self._pace = pace_of(home.entry.value, call)
        self._home = home
        self._others = others
        self._sent = 0
        """Rows that are on their way, or answered."""
        self._waiting: list[_Slice] = []
        self._answers: Matrix | None = None

    async def answer(self) -> Matrix:
        """Return the predictions; whatever happens, nothing of the call is under way after that."""
        try:
            while await self._send_more():
                await asyncio.wait([slice_.answer for slice_ in self._waiting], return_when=asyncio.FIRST_COMPLETED)
                for slice_ in [slice_ for slice_ in self._waiting if slice_.answer.done()]:
                    self._take(slice_, *slice_.answer.result())
        except ModelCacheError as error:
            error.model = self._home.entry.key
            raise
        finally:
            for slice_ in self._waiting:
                _end(slice_)
        assert self._answers is not None
        return self._answers

    async def _send_more(self) -> bool:
        """Give everybody with time something to do; False if all is answered."""
        while self._may_send_to(self._home):
            await writable(self._home.entry, self._call.deadline, counted=False)
            self._send_slice(self._home)
        for seat in self._others:
            while self._may_send_to(seat) and seat.has_time:
                self._send_slice(seat)
        return bool(self._waiting)

    def _may_send_to(self, seat: _Seat) -> bool:
        return self._sent < self._call.shape[0] and seat.in_flight < _SLICES_IN_FLIGHT

    def _send_slice(self, seat: _Seat) -> None:
        call, place, start = self._call, seat.entry.value, self._sent
        requests = place.worker.requests
        part = call.matrix[start : start + self._slice_rows(requests)]
        number, answer = requests.predict_written(
            place, part.shape, partial(write_rows, part, self._order), call.output, call.deadline, sliced=seat.sliced
        )
        if call.deadline:
            requests.deadlines.note(number, call.deadline, partial(expire, seat.entry, number, answer))
        self._sent = start + len(part)
        self._waiting.append(_Slice(start, self._sent, seat, number, answer))
        seat.in_flight += 1

    def _slice_rows(self, requests: RequestChannel) -> int:
        most: int = SLOT_BYTES // (4 * self._call.shape[1])
        alone = requests.slices_in_a_row >= _ALONE_AFTER
        return self._pace.rows_within(_SLICE_SECONDS if alone else _SHORT_SLICE_SECONDS, most)

    def _take(self, answered: _Slice, values: Matrix, seconds: float) -> None:
        self._waiting.remove(answered)
        _end(answered)
        seat, place = answered.seat, answered.seat.entry.value
        seat.in_flight -= 1
        place.worker.requests.slice_seconds[place.number] += seconds
        self._pace.note(len(values), seconds)
        if self._answers is None:
            self._home.sliced.begun = True
            self._answers = np.empty((self._call.shape[0], *values.shape[1:]), np.float32)
        self._answers[answered.start : answered.stop] = values


def _end(slice_: _Slice) -> None:
    """Let go of a slice, answered or not."""
    requests = slice_.seat.entry.value.worker.requests
    requests.deadlines.forget(slice_.number)
    requests.cancel(slice_.number)
    if not slice_.answer.cancel() and not slice_.answer.cancelled():
        slice_.answer.exception()  # it may have failed unseen, beside the slice that failed the call
