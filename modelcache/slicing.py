"""Calls that would keep a worker busy for long: they travel in slices, and are answered by all who have time.

Two slices are under way to a worker: one is copied while the other is being predicted, and calls of others that arrive
meanwhile are answered between them. Large batches are not converted, nor even copied, as a whole: each slice goes from
the caller's array straight into memory shared with the worker.

A model that is in several workers is asked in one of them, as for any call. The others take slices as long as no call
waits for them: whoever has done one is given the next, so that the slower, or the one that is interrupted, does less.
What a helper has not answered in time while the home waits for something to do is done again there (backup tasks: Dean
and Ghemawat, MapReduce, 2004). Its copy is leased while it has a slice, and no longer: bytes that others wait for are
not withheld from them by call after call.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from modelcache.errors import ModelCacheError
from modelcache.inputs import write_rows
from modelcache.overdue import expire, writable
from modelcache.pacing import Pace
from modelcache.pool.requests import Sliced
from modelcache.pool.shared import SLOT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.calls import Answer, Call
    from modelcache.pool.requests import RequestChannel
    from modelcache.resident import Resident

    Matrix = NDArray[np.float32]

_SLICE_SECONDS = 0.001
"""How long one slice should keep a worker busy: others that come may wait so long."""
_SHORT_SLICE_SECONDS = 0.00025
"""The same while there are others: a slice costs 0.05 to 0.1 ms beside its rows."""
_ALONE_AFTER = 20
"""Slices in a row after which there are no others: who waits for an answer to ask the next is there again sooner."""
_SLICES_IN_FLIGHT = 2
"""To each worker: one that runs, and one that waits so that the worker need not."""
_LATE = 0.05
"""Seconds after which what a helper has been sent is given to another: it stands still, or does something long."""

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


class Helpers(Protocol):
    """The workers that could take part in a call: those that hold copies of its model."""

    def free(self) -> Iterable[Entry[Resident]]:
        """Return the copies in them, unless their bytes are waited for."""
        ...

    def lease(self, entry: Entry[Resident]) -> None:
        """Keep a copy where it is."""
        ...

    def release(self, entry: Entry[Resident]) -> None:
        """Let it go."""
        ...


class _Seat:
    """A worker that holds the model, and how many slices it has been sent and has not answered."""

    __slots__ = ("entry", "in_flight", "is_late", "sliced")

    def __init__(self, entry: Entry[Resident], sliced: Sliced) -> None:
        self.entry = entry
        self.sliced = sliced
        self.in_flight = 0
        self.is_late = False
        """It has been sent a slice that another has to do."""

    @property
    def requests(self) -> RequestChannel:
        """The lane to it."""
        return self.entry.value.worker.requests

    @property
    def has_time(self) -> bool:
        """True while nobody waits for the worker; slices that it does for calls which wait elsewhere are no calls."""
        worker, requests, oldest = self.entry.value.worker, self.requests, self.requests.oldest()
        stuck = self.is_late or worker.suspected or (oldest is not None and monotonic() - oldest > _LATE)
        return worker.alive and not stuck and not requests.waiting and not requests.congested


class _Slice(NamedTuple):
    """Rows ``start`` to ``stop`` of a call, on their way to ``seat``."""

    start: int
    stop: int
    seat: _Seat
    number: int
    answer: Answer


async def ask_in_slices(entry: Entry[Resident], call: Call, order: list[int] | None, helpers: Helpers | None) -> Matrix:
    """Return the predictions of a leased ``entry``, part of them by those of its ``helpers`` that have time."""
    place = entry.value
    with place.worker.requests.slices_of(place) as sliced:
        return await _SlicedCall(call, order, _Seat(entry, sliced), helpers).answer()


class _SlicedCall:
    """Gives out the rows of a call, and puts the predictions together."""

    def __init__(self, call: Call, order: list[int] | None, home: _Seat, helpers: Helpers | None) -> None:
        self._call = call
        self._order = order
        """Of the columns; None if they are in the model's own."""
        self._pace = pace_of(home.entry.value, call)
        self._home = home
        self._helpers = helpers
        self._seats: dict[Entry[Resident], _Seat] = {}
        """Of those that have helped."""
        self._unsent = [(0, call.shape[0])]
        """Rows from and to; what is last is next."""
        self._waiting: list[_Slice] = []
        self._answers: Matrix | None = None

    async def answer(self) -> Matrix:
        """Return the predictions; whatever happens, nothing of the call is under way after that."""
        try:
            while self._unsent or self._waiting:
                self._send_to_all()
                await self._wait()
                for slice_ in [slice_ for slice_ in self._waiting if slice_.answer.done()]:
                    self._take(slice_)
        except ModelCacheError as error:
            error.model = self._home.entry.key
            raise
        finally:
            for slice_ in tuple(self._waiting):
                self._end(slice_)
        assert self._answers is not None
        return self._answers

    def _send_to_all(self) -> None:
        """Give everybody with time something to do."""
        if self._unsent:
            self._home.entry.value.worker.check_not_gone()  # it had no part of this call to fail with it
        while self._may_send_to(self._home) and not self._home.requests.congested:
            self._send_slice(self._home)
        if self._helpers is not None and self._unsent:
            for entry in self._helpers.free():
                seat = self._seats.get(entry) or self._seats.setdefault(entry, _helper(entry))
                while self._may_send_to(seat) and seat.has_time:
                    self._send_slice(seat)
        if not self._unsent and not self._home.in_flight:
            self._home.requests.end_slices(self._home.sliced)  # it is not there any more that the call waits

    async def _wait(self) -> None:
        """Return when something is answered, or else is to be done."""
        if not self._waiting:
            await writable(self._home.entry, self._call.deadline, counted=False)
            return
        answers = [slice_.answer for slice_ in self._waiting]
        timeout = None if self._home.in_flight else _LATE  # only helpers have something to do
        done, _ = await asyncio.wait(answers, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done and not self._home.requests.congested:
            self._take_back()

    def _take_back(self) -> None:
        """Let others do what helpers were to do."""
        for slice_ in tuple(self._waiting):
            slice_.seat.is_late = True
            slice_.seat.entry.value.worker.suspect()
            self._end(slice_)
            self._unsent.append((slice_.start, slice_.stop))
        self._home.requests.begin_slices(self._home.sliced)

    def _may_send_to(self, seat: _Seat) -> bool:
        return bool(self._unsent) and seat.in_flight < _SLICES_IN_FLIGHT

    def _send_slice(self, seat: _Seat) -> None:
        call, place, requests = self._call, seat.entry.value, seat.requests
        start, end = self._unsent.pop()
        stop = min(end, start + self._slice_rows(requests))
        part = call.matrix[start:stop]
        number, answer = requests.predict_written(
            place, part.shape, partial(write_rows, part, self._order), call.output, call.deadline, sliced=seat.sliced
        )
        if stop < end:
            self._unsent.append((stop, end))
        if call.deadline:
            requests.deadlines.note(number, call.deadline, partial(expire, seat.entry, number, answer))
        if self._helpers is not None and seat is not self._home:
            self._helpers.lease(seat.entry)
        self._waiting.append(_Slice(start, stop, seat, number, answer))
        seat.in_flight += 1

    def _slice_rows(self, requests: RequestChannel) -> int:
        most: int = SLOT_BYTES // (4 * self._call.shape[1])
        alone = requests.slices_in_a_row >= _ALONE_AFTER
        return self._pace.rows_within(_SLICE_SECONDS if alone else _SHORT_SLICE_SECONDS, most)

    def _take(self, answered: _Slice) -> None:
        values, seconds = answered.answer.result()
        self._end(answered)
        place = answered.seat.entry.value
        answered.seat.requests.slice_seconds[place.number] += seconds
        self._pace.note(len(values), seconds)
        if self._answers is None:
            self._home.sliced.begun = True
            self._answers = np.empty((self._call.shape[0], *values.shape[1:]), np.float32)
        self._answers[answered.start : answered.stop] = values

    def _end(self, slice_: _Slice) -> None:
        """Let go of a slice, answered or not."""
        self._waiting.remove(slice_)
        seat, requests = slice_.seat, slice_.seat.requests
        requests.deadlines.forget(slice_.number)
        requests.cancel(slice_.number)
        if not slice_.answer.cancel() and not slice_.answer.cancelled():
            slice_.answer.exception()  # it may have failed unseen, beside the slice that failed the call
        seat.in_flight -= 1
        if self._helpers is not None and seat is not self._home:
            self._helpers.release(seat.entry)


def _helper(entry: Entry[Resident]) -> _Seat:
    """Return where slices are done for a call that waits elsewhere: it takes no place in the queue there."""
    return _Seat(entry, Sliced(entry.value))
