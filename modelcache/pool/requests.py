"""The request lane, parent side: calls in flight, each with a future of its own."""

from __future__ import annotations

from asyncio import InvalidStateError
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelcache.errors import InvalidInputError, ModelCacheError
from modelcache.pool import wire
from modelcache.pool.channel import Channel
from modelcache.pool.lost import WorkerLostError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from numpy.typing import NDArray

    from modelcache.pool.lost import Epitaph

_NUMBERS = 1 << 32


class _Pending(NamedTuple):
    future: asyncio.Future[Any]
    sent: float
    model: int


class RequestChannel(Channel):
    """Sends rows, and resolves the future of each call when its predictions come back.

    ``observe(seconds)`` is told how long each answered call took from here to here.
    """

    def __init__(self, lost: Callable[[], None], observe: Callable[[float], None]) -> None:
        super().__init__(wire.REPLY, lost)
        self._observe = observe
        self._number = 0
        self.pending: dict[int, _Pending] = {}
        """Calls sent and not yet answered."""
        self.held_up = 0
        """Calls not yet sent, since the worker has not taken enough of what was sent before."""
        self.last_latency = 0.0

    def predict(
        self, model: int, rows: NDArray[np.float32], output: int, deadline: float
    ) -> tuple[int, asyncio.Future[tuple[NDArray[np.float32], float]]]:
        """Send ``rows``; the future gives the predictions and the seconds that the worker took for them."""
        number = self._number = (self._number + 1) % _NUMBERS
        future: asyncio.Future[Any] = self._loop.create_future()
        self.pending[number] = _Pending(future, monotonic(), model)
        count, columns = rows.shape
        payload = rows.tobytes()
        self.send(
            wire.REQUEST.pack(len(payload), wire.PREDICT, output, 0, number, model, count, columns, deadline) + payload
        )
        return number, future

    def ping(self) -> asyncio.Future[Any]:
        """Ask the worker's main thread for a sign of life."""
        number = self._number = (self._number + 1) % _NUMBERS
        future: asyncio.Future[Any] = self._loop.create_future()
        self.pending[number] = _Pending(future, monotonic(), 0)
        self.send(wire.REQUEST.pack(0, wire.PING, 0, 0, number, 0, 0, 0, 0.0))
        return future

    @property
    def waiting(self) -> int:
        """How many calls wait for the worker, sent or not."""
        return len(self.pending) + self.held_up

    async def writable(self) -> None:
        """Wait until the worker has taken enough of what was sent, and be counted as long as that takes."""
        self.held_up += 1
        try:
            await super().writable()
        finally:
            self.held_up -= 1

    def cancel(self, number: int) -> None:
        """Forget a call; the worker skips it if it has not run."""
        if self.pending.pop(number, None) is not None and not self.closed:
            self.send(wire.REQUEST.pack(0, wire.CANCEL, 0, 0, number, 0, 0, 0, 0.0))

    def models_of_calls(self) -> list[int]:
        """Return the model of each call in flight."""
        return [pending.model for pending in self.pending.values()]

    def models_waiting(self) -> set[int]:
        """Return the models that calls in flight are for."""
        return {pending.model for pending in self.pending.values()}

    def oldest(self) -> float | None:
        """Return when the oldest unanswered call was sent."""
        first = next(iter(self.pending.values()), None)
        return first.sent if first else None

    def expected_wait(self) -> float:
        """Return how long a call sent now may take, going by the last answer and by who still waits for one."""
        oldest = self.oldest()
        waited = monotonic() - oldest if oldest is not None else 0.0
        return max(self.last_latency, waited)

    def fail_all(self, epitaph: Epitaph) -> None:
        """The worker is gone: wake everyone who waits for it."""
        pending, self.pending = self.pending, {}
        for call in pending.values():
            if not call.future.done():
                call.future.set_exception(WorkerLostError(epitaph))
                call.future.exception()  # nobody awaits a ping or the second of two slices: no log about that

    def data_received(self, data: bytes) -> None:
        """Resolve the answered calls; what their callers send next leaves in one write."""
        before = len(self.pending)
        super().data_received(data)
        if before - len(self.pending) > 1:
            # Their callers wake up in the next tick, before what is scheduled now.
            self.cork()

    def frame_received(self, header: tuple[Any, ...], data: bytes, start: int, end: int) -> None:
        """Resolve one call."""
        _, kind, dimensions, _, number, rows, second, third, seconds = header
        pending = self.pending.pop(number, None)
        if pending is None or pending.future.done():
            return  # cancelled or timed out meanwhile
        if kind != wire.RESULT:
            _resolve_rarely(pending.future, kind, data[start:end])
            return
        self.last_latency = monotonic() - pending.sent
        self._observe(self.last_latency)
        # Through a bytearray, so that the caller's array is writable and keeps no larger buffer alive.
        values = np.frombuffer(bytearray(data[start:end]), np.float32)
        if dimensions > 1:
            values = values.reshape((rows, second, third)[:dimensions])
        try:  # noqa: SIM105 - costs nothing on the hot path; suppress() does
            pending.future.set_result((values, seconds))
        except InvalidStateError:
            pass  # Ctrl-C cancels the main task inside its signal handler, which runs between any two steps


def _resolve_rarely(future: asyncio.Future[Any], kind: int, payload: bytes) -> None:
    if kind == wire.PONG:
        future.set_result(None)
        return
    message = payload.decode(errors="replace")
    if kind == wire.FAULT:
        future.set_exception(ModelCacheError(f"There are no predictions for these rows: {message}"))
    else:
        future.set_exception(InvalidInputError(f"The model refused these rows: {message}"))
