"""The request lane, parent side: calls in flight, each with a future of its own."""

from __future__ import annotations

from asyncio import InvalidStateError
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import islice
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from modelcache.errors import InvalidInputError, ModelCacheError
from modelcache.pool import replies, wire
from modelcache.pool.channel import Channel
from modelcache.pool.deadlines import Deadlines
from modelcache.pool.lost import WorkerLostError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from modelcache.errors import OverloadedError
    from modelcache.pool.lost import Epitaph
    from modelcache.pool.shared import Slots

    Matrix = NDArray[np.float32]

SHARED_FROM = 64 << 10
"""Bytes of rows from which a slot is cheaper than the socket."""

_NUMBERS = 1 << 32

_header = wire.REQUEST.pack
_one_float = Struct("f").unpack_from

_FLOAT32 = np.dtype(np.float32)
"""Made once: NumPy would look it up for each answer, which takes as long as reading that."""

_MOMENT = 0.01
"""Seconds: who waits for an answer to ask the next is there again sooner."""

_RECENT = 1.0
"""Seconds: the rate of answers is that of no more than the last few of these."""


class Queue(Protocol):
    """The calls for one model that have been sent to a worker and are not answered; slices of one count as one."""

    number: int
    """What the worker knows the model by."""
    waiting: int
    """How many they are; kept by the lane."""


class _Pings:
    """The queue of what is for no model."""

    def __init__(self) -> None:
        self.number = self.waiting = 0


class _Pending:
    """A request that is not answered; a plain class takes half the time of a NamedTuple."""

    __slots__ = ("future", "queue", "sent", "sliced")

    def __init__(self, future: asyncio.Future[Any], sent: float, queue: Queue, sliced: Sliced | None) -> None:
        self.future = future
        self.sent = sent
        self.queue = queue
        self.sliced = sliced
        """The call that it is a slice of; None if it is all of one."""

    @property
    def model(self) -> int:
        """What the worker knows the model by; 0 for a ping."""
        return self.queue.number


class Sliced:
    """A call that travels in slices, and counts as one; so does a sign of life, which counts as none."""

    __slots__ = ("begun", "queue", "waits")

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.waits = False
        """True while it is counted among those that wait for the worker."""
        self.begun = False
        """True once a slice of it is answered."""


class RequestChannel(Channel):
    """Sends rows, and resolves the future of each call when its predictions come back.

    ``observe(seconds)`` is told how long answered calls took from here to here. Large batches travel in ``slots``.
    """

    def __init__(self, lost: Callable[[], None], observe: Callable[[Sequence[float]], None], slots: Slots) -> None:
        super().__init__(wire.REPLY, lost)
        self.slots = slots
        self._observe = observe
        self._number = 0
        self.pending: dict[int, _Pending] = {}
        """Calls sent and not yet answered."""
        self.deadlines = Deadlines()
        """Of those that have one."""
        self._in_slices = 0
        """Calls under way in slices, each of which counts once however many of those wait."""
        self._parts = 0
        """How many of ``pending`` are slices, or no calls at all."""
        self.held_up = 0
        """Calls not yet sent, since the worker has not taken enough of what was sent before."""
        self.last_latency = 0.0
        self._read_at = 0.0
        self._latencies: list[float] = []
        """Of the calls that the last read has answered."""
        self._pings = Sliced(_Pings())
        self.longest: Queue = self._pings.queue
        """The longest queue that was seen when calls were compared last."""
        self._answered = 0
        self._busy_since = 0.0
        self._answered_before = 0.0
        """When it was idle last, or how far back the rate of answers goes; and what was answered by then."""
        self.slices_in_a_row = 0
        """Calls of :meth:`predict_written` since anything else was sent."""
        self._last_slice = 0
        self.slice_seconds: defaultdict[int, float] = defaultdict(float)
        """What slices have kept the worker busy for, by model, since somebody looked."""

    def predict(
        self, queue: Queue, rows: Matrix, output: int, deadline: float
    ) -> tuple[int, asyncio.Future[tuple[Matrix, float]]]:
        """Send ``rows``; the future gives the predictions and the seconds that the worker took for them."""
        if rows.nbytes >= SHARED_FROM:
            return self.predict_written(queue, rows.shape, partial(np.copyto, src=rows), output, deadline)
        return self.predict_packed(queue, rows.shape, rows.tobytes(), output, deadline)

    def predict_packed(
        self, queue: Queue, shape: tuple[int, ...], rows: bytes, output: int, deadline: float
    ) -> tuple[int, asyncio.Future[tuple[Matrix, float]]]:
        """Send ``rows``, the float32 of an array of ``shape``; the future is that of :meth:`predict`."""
        return self._send(queue, (0, shape), rows, output, deadline)

    def predict_written(
        self,
        queue: Queue,
        shape: tuple[int, int],
        write: Callable[[Matrix], None],
        output: int,
        deadline: float,
        *,
        sliced: Sliced | None = None,
    ) -> tuple[int, asyncio.Future[tuple[Matrix, float]]]:
        """Send the rows that ``write`` puts into an array of ``shape``; the future is that of :meth:`predict`.

        The array is a slot, or if none is free, or large enough, memory that is sent like other rows.
        """
        slot, payload = self.slots.take(shape), b""
        if slot:
            try:
                write(self.slots.at(slot, shape))
            except BaseException:
                self.slots.give_back(slot)
                raise
        else:
            rows = np.empty(shape, np.float32)
            write(rows)
            payload = rows.tobytes()
        number, future = self._send(queue, (slot, shape), payload, output, deadline, sliced=sliced)
        self.slices_in_a_row = self.slices_in_a_row + 1 if number == self._last_slice + 1 else 0
        self._last_slice = number
        return number, future

    def _send(
        self,
        queue: Queue,
        where: tuple[int, tuple[int, ...]],
        payload: bytes,
        output: int,
        deadline: float,
        *,
        sliced: Sliced | None = None,
    ) -> tuple[int, asyncio.Future[Any]]:
        """Send a request; ``where`` its rows are: the slot or 0, and their shape."""
        number = self._number = (self._number + 1) % _NUMBERS
        future: asyncio.Future[Any] = self._loop.create_future()
        now = monotonic()
        if not self.pending:
            self._busy_since, self._answered_before = now, self._answered
        self.pending[number] = _Pending(future, now, queue, sliced)
        if sliced is None:
            queue.waiting += 1
        else:
            self._parts += 1
        slot, (rows, columns) = where
        self.send(
            _header(len(payload), wire.PREDICT, output, slot, number, queue.number, rows, columns, deadline) + payload
        )
        return number, future

    def ping(self) -> asyncio.Future[Any]:
        """Ask the worker's main thread for a sign of life."""
        number = self._number = (self._number + 1) % _NUMBERS
        future: asyncio.Future[Any] = self._loop.create_future()
        self.pending[number] = _Pending(future, monotonic(), self._pings.queue, self._pings)
        self._parts += 1
        self.send(_header(0, wire.PING, 0, 0, number, 0, 0, 0, 0.0))
        return future

    @property
    def is_asked(self) -> bool:
        """True while calls are under way, and a moment longer: those who ask one after another are about to."""
        return bool(self.pending) or monotonic() - self._read_at < _MOMENT

    @property
    def waiting(self) -> int:
        """How many calls wait for the worker, sent or not; a sign of life that it is asked for is none."""
        return len(self.pending) - self._parts + self._in_slices + self.held_up

    async def writable(self, *, counted: bool = True) -> None:
        """Wait until the worker has taken enough of what was sent, ``counted`` among those who wait for it."""
        self.held_up += counted
        try:
            await super().writable()
        finally:
            self.held_up -= counted

    def cancel(self, number: int) -> None:
        """Forget a call; the worker skips it if it has not run."""
        pending = self.pending.pop(number, None)
        if pending is None:
            return
        self._note_end(pending)
        if not self.closed:
            self.send(_header(0, wire.CANCEL, 0, 0, number, 0, 0, 0, 0.0))

    def _note_end(self, pending: _Pending) -> None:
        if pending.sliced is None:
            pending.queue.waiting -= 1
        else:
            self._parts -= 1

    @contextmanager
    def slices_of(self, queue: Queue) -> Iterator[Sliced]:
        """Count what is sent in the block as slices of one call, which begins and ends with it."""
        sliced = Sliced(queue)
        self.begin_slices(sliced)
        try:
            yield sliced
        finally:
            self.end_slices(sliced)

    def begin_slices(self, sliced: Sliced) -> None:
        """The call waits for this worker, or does again; harmless when done twice."""
        if not sliced.waits:
            sliced.waits = True
            sliced.queue.waiting += 1
            self._in_slices += 1

    def end_slices(self, sliced: Sliced) -> None:
        """The call waits for this worker no more; harmless when done twice."""
        self._answered += sliced.waits
        self._note_end_of_slices(sliced)

    def _note_end_of_slices(self, sliced: Sliced) -> None:
        if sliced.waits:
            sliced.waits = False
            sliced.queue.waiting -= 1
            self._in_slices -= 1

    def displace(self, number: int, error: OverloadedError) -> None:
        """Let a call that waits fail with ``error``, all of it if this is a slice."""
        pending = self.pending[number]
        self.cancel(number)
        if pending.sliced is not None:
            self._note_end_of_slices(pending.sliced)
        pending.future.set_exception(error)

    def newest_of(self, queue: Queue) -> int | None:
        """Return the newest call in ``queue``, one of which no part is answered if there is any."""
        begun = None
        for number, call in reversed(self.pending.items()):
            sliced = call.sliced
            if call.queue is queue and not call.future.done() and (sliced is None or sliced.waits):
                if sliced is None or not sliced.begun:
                    return number
                begun = number if begun is None else begun
        return begun

    def newest_queues(self, count: int) -> list[Queue]:
        """Return the queues of the ``count`` newest calls."""
        return [call.queue for call in islice(reversed(self.pending.values()), count)]

    def models_waiting(self) -> set[int]:
        """Return the models that calls in flight are for."""
        return {pending.model for pending in self.pending.values()}

    def oldest(self) -> float | None:
        """Return when the oldest unanswered call was sent."""
        first = next(iter(self.pending.values()), None)
        return first.sent if first else None

    def expected_wait(self) -> float:
        """Return how many seconds a call sent now may take to be answered.

        By Little's law: the calls that wait, this one among them, by the rate of answers since the worker had nothing
        to do, or lately. But no less than the oldest has waited, since the worker may be at something long.
        """
        now, oldest = monotonic(), self.oldest()
        waited = 0.0 if oldest is None else now - oldest
        seconds, answered = now - self._busy_since, self._answered - self._answered_before
        if not answered or oldest is None:
            return max(self.last_latency, waited)
        if seconds > _RECENT:  # what is older counts half with each look
            self._busy_since = now - seconds / 2
            self._answered_before = self._answered - answered / 2
        return max((self.waiting + 1) * seconds / answered, waited)

    def fail_all(self, epitaph: Epitaph) -> None:
        """The worker is gone: wake everyone who waits for it."""
        self.deadlines.clear()
        pending, self.pending = self.pending, {}
        for call in pending.values():
            self._note_end(call)
            if not call.future.done():
                call.future.set_exception(WorkerLostError(epitaph))
                call.future.exception()  # nobody awaits a ping or the second of two slices: no log about that

    def buffer_updated(self, nbytes: int) -> None:
        """Resolve the answered calls; what their callers send next leaves in one write."""
        self._read_at = monotonic()
        super().buffer_updated(nbytes)
        if self._latencies:
            latencies, self._latencies = self._latencies, []
            self.last_latency = latencies[-1]
            self._observe(latencies)
            if len(latencies) > 1:
                # Their callers wake up in the next tick, before what is scheduled now.
                self.cork()

    def _take_frames(self, start: int = 0) -> int:
        if self._filled >= replies.MANY:
            numbers, values, seconds = replies.single_numbers(self._buffer[: self._filled])
            for answer in zip(numbers, values, seconds, strict=True):
                self._answer(*answer)
            start = len(numbers) * replies.SIZE
        return super()._take_frames(start)

    def frame_received(self, header: tuple[Any, ...], data: memoryview, start: int, end: int) -> None:
        """Resolve one call."""
        _, kind, dimensions, slot, number, rows, second, third, seconds = header
        if slot:
            self.slots.give_back(slot)  # what is in it is read before anybody can take it
            if kind == wire.SKIPPED:
                return  # cancelled, or its time is over: its timer is about to say so
        if number not in self.pending:
            return  # cancelled, or its time is over
        if kind == wire.RESULT:
            if dimensions == rows == 1:
                values = np.empty(1, _FLOAT32)
                (values[0],) = _one_float(data, start)
            else:
                # Through a bytearray, so that the caller's array is writable and keeps no larger buffer alive.
                values = np.frombuffer(bytearray(data[start:end]), _FLOAT32)
                if dimensions > 1:
                    values = values.reshape((rows, second, third)[:dimensions])
            self._answer(number, values, seconds)
        elif kind == wire.SHARED:
            self._answer(number, self.slots.at(slot, (rows, second, third)[:dimensions]).copy(), seconds)
        elif (pending := self._awaited(number)) is not None:
            _resolve_rarely(pending.future, kind, bytes(data[start:end]))

    def _answer(self, number: int, values: Matrix, seconds: float) -> None:
        pending = self._awaited(number)
        if pending is None:
            return
        self._latencies.append(self._read_at - pending.sent)
        try:  # noqa: SIM105 - costs nothing on the hot path; suppress() does
            pending.future.set_result((values, seconds))
        except InvalidStateError:
            pass  # Ctrl-C cancels the main task inside its signal handler, which runs between any two steps

    def _awaited(self, number: int) -> _Pending | None:
        """Take a call off the list; None if it was cancelled or its time is over."""
        pending = self.pending.pop(number, None)
        if pending is None:
            return None
        self._note_end(pending)
        if pending.future.done():
            return None
        self._answered += pending.sliced is None
        return pending


def _resolve_rarely(future: asyncio.Future[Any], kind: int, payload: bytes) -> None:
    if kind == wire.PONG:
        future.set_result(None)
        return
    message = payload.decode(errors="replace")
    if kind == wire.FAULT:
        future.set_exception(ModelCacheError(f"There are no predictions for these rows: {message}"))
    else:
        future.set_exception(InvalidInputError(f"The model refused these rows: {message}"))
