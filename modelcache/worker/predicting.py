"""The request lane: drain the socket, group what waits by model, predict once per group, answer in one write.

This is natural batching: a batch is whatever arrived while the worker was busy. Nothing is ever delayed in the hope of
a larger one. Between two groups the socket is drained again, so that a cancellation or a call for a model that is
already waiting is seen before the next prediction starts.
"""

from __future__ import annotations

from time import monotonic, perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from modelcache.pool import wire
from modelcache.pool.shared import SLOT_BYTES
from modelcache.worker.inbox import Inbox
from modelcache.worker.predictors import PredictorFaultError, StagedRows, described, interface_of, no_message

if TYPE_CHECKING:
    import socket

    from modelcache.pool.blackbox import BlackBox
    from modelcache.pool.shared import Arena
    from modelcache.worker.models import LoadedModel, Models
    from modelcache.worker.predictors import Matrix

_ANSWERS_HELD = 0.0001
"""Seconds of finished answers that may wait for the rest of the backlog before they are sent."""

_STRETCH_SECONDS = 0.005
"""How long the calls that wait for one model may keep those for others, and a sign of life, waiting."""

_ROWS_UNKNOWN = 64
"""Rows at a stretch of what has not been predicted yet: XGBoost predicts in blocks of this many."""

_SHORTEST = 1e-6
"""Seconds that a prediction takes at least: the clock may be too coarse to tell."""

_MOST_DIMENSIONS = 3
"""A frame has room for the shape of (rows, outputs, contributions)."""

_NUMBERS = "fiub"
"""Kinds of arrays that are taken: what is not float32 already is made so."""

_SHAPES_KEPT = 4096

_KIND, _SLOT, _DEADLINE = 1, 3, 8
"""Places in the header of a request."""


class _Call(NamedTuple):
    number: int
    rows: int
    deadline: float
    payload: bytes | memoryview


class _GroupKey(NamedTuple):
    model: int
    output: int
    columns: int
    slot: int
    """Where the rows are, if they did not come with the frame: such a call is a group by itself."""


class RequestLane:
    """Serve predictions from ``sock`` with ``models`` until the parent closes the other end.

    Rows that did not come with their frame are in ``arena``; ``box`` tells the parent when there is nothing to do.
    Between the calls of a lone caller it ``stays_awake`` for a moment.
    """

    def __init__(
        self, sock: socket.socket, models: Models, arena: Arena, box: BlackBox, *, stays_awake: bool = False
    ) -> None:
        self._inbox = Inbox(sock, wire.REQUEST)
        self._sock = sock
        self._models = models
        self._arena = arena
        self._box = box
        self._staging = _Staging(wire.PAYLOAD_LIMIT // 4)
        self._groups: dict[_GroupKey, list[_Call]] = {}
        self._cancelled: set[int] = set()
        self._answers: list[bytes] = []
        self._flushed = monotonic()
        self._was_slice = False
        self._stays_awake = stays_awake
        self._was_alone = False
        """The last request that came was the only one."""

    def run(self) -> None:
        """Serve until end of file."""
        while self._receive():
            frames = self._inbox.frames()
            self._was_alone = len(frames) == 1
            if self._was_alone and not self._groups and self._is_simple(frames[0][0]):
                self._predict_alone(*frames[0])
                continue
            for header, payload in frames:
                self._take(header, payload)
            if self._groups:
                self._predict_oldest_group()
            if not self._groups:
                self._cancelled.clear()
                self._flush()
            elif monotonic() - self._flushed > _ANSWERS_HELD:
                self._flush()

    @staticmethod
    def _is_simple(header: tuple[int, ...]) -> bool:
        """Say whether this is a call whose rows came with it, and which has no deadline."""
        return header[_KIND] == wire.PREDICT and not header[_SLOT] and not header[_DEADLINE]

    def _predict_alone(self, header: tuple[int, ...], payload: memoryview) -> None:
        """Answer the only call there is: what a lone caller waits for is the shortest way through here."""
        _, _, output, _, number, model, rows, columns, _ = header
        self._was_slice = False
        self._predict(_GroupKey(model, output, columns, 0), [_Call(number, rows, 0.0, payload)])
        self._flush()

    def _receive(self) -> bool:
        if self._groups:
            return self._inbox.fill(wait=False)
        self._box.rest()
        received = self._inbox.fill(wait=True, awake=self._stays_awake and self._was_alone)
        self._box.wake()
        return received

    def _take(self, header: tuple[int, ...], payload: memoryview) -> None:
        _, kind, output, slot, number, model, rows, columns, deadline = header
        if kind == wire.PREDICT:
            call = _Call(number, rows, deadline, bytes(payload))
            self._groups.setdefault(_GroupKey(model, output, columns, slot), []).append(call)
        elif kind == wire.CANCEL:
            self._cancelled.add(number)
        elif kind == wire.PING:
            self._answers.append(wire.REPLY.pack(0, wire.PONG, 0, 0, number, 0, 0, 0, 0.0))

    def _predict_oldest_group(self) -> None:
        key = self._next_group()
        calls = self._groups.pop(key)
        wanted = self._still_wanted(calls)
        batch, rest = _split(wanted, self._most_rows(key))
        if rest:
            self._groups[key] = rest
        if batch:
            self._predict(key, batch)
        elif key.slot:
            self._answers.append(wire.REPLY.pack(0, wire.SKIPPED, 0, key.slot, calls[0].number, 0, 0, 0, 0.0))

    def _next_group(self) -> _GroupKey:
        """Return the oldest group, but after a slice the oldest that is none: others wait for one slice, never two."""
        key = next(iter(self._groups))
        if key.slot and self._was_slice:
            key = next((other for other in self._groups if not other.slot), key)
        self._was_slice = bool(key.slot)
        if self._was_slice:
            self._flush()  # it takes longer than answers may be held
        return key

    def _most_rows(self, key: _GroupKey) -> int:
        """Return how many rows may be predicted at a stretch: as many as are staged, and keep others for no longer."""
        loaded = self._models.get(key.model)
        most = loaded.most_rows.get(key.output, _ROWS_UNKNOWN) if loaded else _ROWS_UNKNOWN
        return min(most, self._staging.capacity // key.columns)

    def _still_wanted(self, calls: list[_Call]) -> list[_Call]:
        """Drop what was cancelled or is past its deadline; its caller has gone and expects no answer."""
        now = monotonic() if any(call.deadline for call in calls) else 0.0
        return [
            call for call in calls if call.number not in self._cancelled and (not call.deadline or call.deadline > now)
        ]

    def _predict(self, key: _GroupKey, batch: list[_Call]) -> None:
        try:
            loaded = self._loaded(key.model)
            rows = self._rows(key, batch)
            started = perf_counter()
            values = loaded.predict(rows, wire.OUTPUTS[key.output])
            seconds = perf_counter() - started
            _check_result(values, len(rows))
            _learn(loaded.most_rows, key.output, len(rows), seconds)
            if key.slot:
                self._answer_in_slot(key.slot, batch[0], values, seconds)
            else:
                self._answer(batch, values, seconds)
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises is the answer of these calls
            self._refuse(key, batch, error)

    def _rows(self, key: _GroupKey, batch: list[_Call]) -> StagedRows:
        if key.slot:
            return _staged(self._arena.at(key.slot, (batch[0].rows, key.columns)))
        return self._staging.put([call.payload for call in batch], key.columns)

    def _loaded(self, model: int) -> LoadedModel:
        loaded = self._models.get(model)
        if loaded is None:
            raise PredictorFaultError("the model is not loaded in this worker")
        return loaded

    def _answer(self, batch: list[_Call], values: Matrix, seconds: float) -> None:
        data = np.ascontiguousarray(values, np.float32).tobytes()
        width = len(data) // len(values)
        tail = (*values.shape[1:], 0, 0)[:2]
        row_seconds = seconds / len(values)
        start = 0
        for call in batch:
            end, share = start + call.rows * width, call.rows * row_seconds
            header = wire.REPLY.pack(end - start, wire.RESULT, values.ndim, 0, call.number, call.rows, *tail, share)
            self._answers.append(header)
            self._answers.append(data[start:end])
            start = end

    def _answer_in_slot(self, slot: int, call: _Call, values: Matrix, seconds: float) -> None:
        """Put ``values`` in the place of the rows, or send them where they take more than the slot has."""
        tail = (*values.shape[1:], 0, 0)[:2]
        kind, data = wire.SHARED, b""
        if 4 * values.size <= SLOT_BYTES:
            np.copyto(self._arena.at(slot, values.shape), values, casting="unsafe")
        else:
            kind, data = wire.RESULT, np.ascontiguousarray(values, np.float32).tobytes()
        header = wire.REPLY.pack(len(data), kind, values.ndim, slot, call.number, call.rows, *tail, seconds)
        self._answers += (header, data)

    def _refuse(self, key: _GroupKey, batch: list[_Call], error: Exception) -> None:
        if len(batch) > 1:  # one bad member must not spoil the others
            for call in batch:
                self._predict(key, [call])
            return
        kind, reason = _blame(error)
        message = reason.encode(errors="replace")
        header = wire.REPLY.pack(len(message), kind, 0, key.slot, batch[0].number, 0, 0, 0, 0.0)
        self._answers += (header, message)

    def _flush(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, []
            self._sock.sendall(b"".join(answers))
        self._flushed = monotonic()


def _learn(most_rows: dict[int, int], output: int, rows: int, seconds: float) -> None:
    """Adapt how many rows may be predicted at a stretch to one that took ``seconds``.

    A prediction has a price of its own beside that of its rows (1.8 ms for 500 trees of depth 10, and 50 us a row): the
    cost of a row in a small batch says that few fit, and a limit that followed it would keep all batches small. So
    as long as what fits takes less than half a stretch, twice as much is tried.
    """
    most = most_rows.get(output)
    if most is None or seconds > 2 * _STRETCH_SECONDS:
        most_rows[output] = max(1, int(rows * _STRETCH_SECONDS / max(seconds, _SHORTEST)))
    elif 2 * rows > most and 2 * seconds < _STRETCH_SECONDS:
        most_rows[output] = 2 * most


def _blame(error: Exception) -> tuple[int, str]:
    """Say whether the rows are refused or the predictor is at fault, and why."""
    if isinstance(error, ValueError):
        return wire.ERROR, str(error) or no_message(error)
    if isinstance(error, PredictorFaultError):
        return wire.FAULT, str(error)
    return wire.FAULT, f"the predictor raised {described(error)} (rows that it cannot take are refused by ValueError)"


def _check_result(values: object, rows: int) -> None:
    """Refuse what cannot be dealt out to the calls of a batch."""
    if isinstance(values, np.ndarray) and values.dtype.kind in _NUMBERS:
        if 1 <= values.ndim <= _MOST_DIMENSIONS and len(values) == rows:
            return
        found = f"shape {values.shape}"
    else:
        found = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else type(values).__name__
    raise PredictorFaultError(
        f"the predictor returned {found} for {rows} rows: it has to return float32 of shape ({rows},) or ({rows}, k)"
    )


def _split(calls: list[_Call], most_rows: int) -> tuple[list[_Call], list[_Call]]:
    """Return as many of ``calls`` as fit into ``most_rows``, at least one, and the others."""
    rows = 0
    for index, call in enumerate(calls):
        rows += call.rows
        if rows > most_rows and index:
            return calls[:index], calls[index:]
    return calls, []


def _staged(rows: Matrix) -> StagedRows:
    view = rows.view(StagedRows)
    view.interface = interface_of(view)
    return view


class _Staging:
    """A buffer at a fixed address that batches are put together in, with one array per shape ever seen."""

    def __init__(self, capacity: int) -> None:
        self._resize(capacity)

    def put(self, payloads: list[bytes | memoryview], columns: int) -> StagedRows:
        """Return ``payloads`` as one matrix; it is overwritten by the next call."""
        data = payloads[0] if len(payloads) == 1 else b"".join(payloads)
        if len(data) > 4 * self.capacity:
            self._resize(len(data) // 4)
        self._bytes[: len(data)] = data
        shape = (len(data) // 4 // columns, columns)
        view = self._views.get(shape)
        return self._view(shape) if view is None else view

    def _view(self, shape: tuple[int, int]) -> StagedRows:
        if len(self._views) >= _SHAPES_KEPT:
            self._views.clear()
        view = self._views[shape] = _staged(self._floats[: shape[0] * shape[1]].reshape(shape))
        return view

    def _resize(self, capacity: int) -> None:
        self.capacity = capacity
        self._floats = np.empty(capacity, np.float32)
        self._bytes = self._floats.data.cast("B")
        self._views: dict[tuple[int, int], StagedRows] = {}
