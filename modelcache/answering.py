"""How a call gets its answer: a lease, a worker, and if that ends, one more."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from modelcache.admission import check_not_in_vain
from modelcache.asking import ask
from modelcache.cache.entry import State
from modelcache.calls import Call, Trace
from modelcache.errors import LoadTimeoutError, OverloadedError, WorkerCrashedError
from modelcache.names import check_name
from modelcache.pool.lost import WorkerLostError
from modelcache.records import Invocation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy as np
    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.engines import Engines
    from modelcache.lease import Lease
    from modelcache.leasing import Leasing
    from modelcache.lifecycle import Lifecycle
    from modelcache.pool.lost import Epitaph
    from modelcache.quarantine import Quarantine
    from modelcache.records import ModelInfo, Output
    from modelcache.residency import Residency
    from modelcache.resident import Resident

    Matrix = NDArray[np.float32]


_WARY = 1000
"""Calls that are looked at before their rows are converted, after one that was refused."""


class Answering:
    """Answers calls; ``start`` makes sure that the workers are up, ``queue_limit`` is for each of them."""

    def __init__(
        self,
        state: Residency,
        leasing: Leasing,
        quarantine: Quarantine,
        life: Lifecycle,
        start: Callable[[], Awaitable[object]],
        *,
        queue_limit: int,
        engines: Engines | None = None,
    ) -> None:
        self._state = state
        self._engines = engines
        self._leasing = leasing
        self._quarantine = quarantine
        self._life = life
        self._start = start
        self._queue_limit = queue_limit
        self._wary = 0
        """Calls to be refused, if they will be, before their rows are converted."""

    async def predict(
        self, name: str, rows: Any, output: Output, timeout: float | None, trace: Trace | None = None
    ) -> Matrix:
        """Return predictions; ``trace`` takes note of what became of the call."""
        if self._wary and _may_be_many(rows):
            self._refuse_early(self._leasing.find(name))
        call = Call(rows, output, timeout, self._queue_limit)
        if call.unread is not None:
            await call.read()
        for _ in range(2):
            entry = self._leasing.take_resident(name, call) or await self._take_cold(name, call, trace)
            if trace is not None:
                trace.entry, trace.asked = entry, time.perf_counter()
            try:
                if call.answered_by is entry:
                    answer = call.values
                else:
                    answer = await (self._ask_one_of(entry, call) if entry.copies else ask(entry, call))
            except WorkerLostError as error:
                self._life.check()  # perhaps it was ended by close()
                call.lost = error.epitaph
            except OverloadedError:
                call.hit = None
                self._note_refusal()
                raise
            else:
                self._quarantine.acquit(entry)
                if self._engines is not None and not entry.copies:
                    self._engines.saw(entry, call)
                return answer
            finally:
                call.note_hit(entry)
                self._leasing.release(entry)
        raise _crashed_twice(name, call.lost)

    async def invoke(self, name: str, rows: Any, output: Output, timeout: float | None) -> Invocation:
        """Return predictions and what there is to know about them."""
        trace = Trace()
        predictions = await self.predict(name, rows, output, timeout, trace)
        timings = trace.timings()
        return Invocation(predictions, self._state.info(trace.entry), trace.tier, timings)

    async def predict_leased(self, lease: Lease, rows: Any, output: Output, timeout: float | None) -> Matrix:
        """Predict with the version that ``lease`` holds; :meth:`Lease.predict` is the way to call it."""
        self._life.check()
        if self._wary and _may_be_many(rows):
            self._refuse_early(lease.entry)
        call = Call(rows, output, timeout, self._queue_limit)
        if call.unread is not None:
            await call.read()
        for _ in range(2):
            lease.check_held()
            if lease.entry.state is State.GONE:  # its worker has ended
                await self._renew(lease, call.deadline)
                lease.check_held()
            try:
                if lease.entry.copies:
                    return await self._ask_one_of(lease.entry, call)
                answer = await ask(lease.entry, call)
            except WorkerLostError as error:
                self._life.check()
                call.lost = error.epitaph
            except OverloadedError:
                self._note_refusal()
                raise
            else:
                if self._engines is not None:
                    self._engines.saw(lease.entry, call)
                return answer
        raise _crashed_twice(lease.name, call.lost)

    def info(self, entry: Entry[Resident]) -> ModelInfo:
        """Describe the model of a lease; :attr:`Lease.model` is the way to call it."""
        return self._state.info(entry)

    async def _ask_one_of(self, entry: Entry[Resident], call: Call) -> Matrix:
        """Ask a model that is in several workers: one of them, or if that would take long, all that have time."""
        seat = self._leasing.seat(entry, self._queue_limit)
        try:
            answer = await ask(seat, call, self._leasing.helpers(seat))
        finally:
            self._leasing.release(seat)
        if self._engines is not None:
            self._engines.saw(seat, call)
        return answer

    def _note_refusal(self) -> None:
        self._state.counters.rejected += 1
        self._wary = _WARY

    def _refuse_early(self, entry: Entry[Resident] | None) -> None:
        """Refuse a call that will be refused anyhow, before its rows are converted."""
        self._wary -= 1
        if entry is None or entry.copies:  # which of them the call would go to is not decided yet
            return
        try:
            check_not_in_vain(entry.key, entry.value, entry.value.worker.requests, self._queue_limit)
        except OverloadedError:
            self._note_refusal()
            raise

    async def _take_cold(self, name: str, call: Call, trace: Trace | None) -> Entry[Resident]:
        started = time.perf_counter()
        check_name(name)
        if self._life.loop is not asyncio.get_running_loop():
            await self._started_by(call.deadline)
        entry = self._leasing.take_resident(name)
        if entry is None:
            entry = await self._leasing.take_cold(name, call.deadline, call)
            if trace is not None:
                trace.waited = time.perf_counter() - started
        return entry

    async def _started_by(self, deadline: float) -> None:
        try:
            async with asyncio.timeout(deadline - time.monotonic() if deadline else None):
                await self._start()
        except TimeoutError as error:
            raise LoadTimeoutError(
                "The timeout passed while the workers were starting: await registry.start() when your app starts."
            ) from error

    async def _renew(self, lease: Lease, deadline: float) -> None:
        """Let ``lease`` hold the model as loaded again, unless another of its calls was faster or it has ended."""
        held = lease.entry
        entry = await self._leasing.take(lease.name, deadline)
        if lease.held and lease.entry is held:
            lease.entry, entry = entry, held
        self._leasing.release(entry)


def _may_be_many(rows: Any) -> bool:
    """Return whether it may take long to convert ``rows``; one row takes less than to find out."""
    return not (type(rows) is list and len(rows) == 1)


def _crashed_twice(name: str, epitaph: Epitaph | None) -> WorkerCrashedError:
    assert epitaph is not None
    return WorkerCrashedError(
        f"Two workers ended while {name} was predicting: {epitaph}.",
        model=name, pid=epitaph.pid, signal=epitaph.signal, exit_code=epitaph.exit_code,
    )  # fmt: skip
