"""Rows to the worker that holds the model, predictions back, within a deadline."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from modelcache.admission import admit
from modelcache.errors import ModelCacheError
from modelcache.inputs import column_order
from modelcache.overdue import expire, writable
from modelcache.slicing import ask_in_slices, pace_of, takes_long

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.calls import Answer, Call
    from modelcache.resident import Resident
    from modelcache.slicing import Helpers

    Matrix = NDArray[np.float32]


_MANY_ROWS = 64
"""From which on it is worth the time to learn what a call took."""


async def ask(entry: Entry[Resident], call: Call, helpers: Helpers | None = None) -> Matrix:
    """Return the predictions of a leased ``entry``; ``helpers`` are for a call that takes long."""
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
    if takes_long(place, call):
        return await ask_in_slices(entry, call, order, helpers)
    if requests.congested:
        await writable(entry, call.deadline)
    number, answer = _send(call, place, order)
    if call.deadline:
        requests.deadlines.note(number, call.deadline, partial(expire, entry, number, answer))
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
    if rows >= _MANY_ROWS:
        pace_of(place, call).note(rows, seconds)
    return values


def _send(call: Call, place: Resident, order: list[int] | None) -> tuple[int, Answer]:
    if call.packed is not None:  # without names, hence in the model's own order
        return place.worker.requests.predict_packed(place, call.shape, call.packed, call.output, call.deadline)
    matrix = call.matrix if order is None else call.matrix.take(order, axis=1)
    return place.worker.requests.predict(place, matrix, call.output, call.deadline)
