"""``engine="auto"``: which models get a second engine, and what it costs.

A model earns it by calls of few rows, which are what the second engine is faster at. Its bytes are claimed before the
worker is told, and only free ones: no model is evicted to make another one faster.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from modelcache.cache.entry import State
from modelcache.cache.recent import Recent
from modelcache.inputs import column_order
from modelcache.pool.wire import FEW_ROWS, OUTPUTS

if TYPE_CHECKING:
    import asyncio

    import numpy as np
    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.calls import Call
    from modelcache.pool.artifacts import Converted
    from modelcache.pool.pool import Worker
    from modelcache.records import Engine
    from modelcache.residency import Residency
    from modelcache.resident import Resident

EARNED = 128
"""Calls after which a conversion pays, or is tried again if there were no bytes for it: it takes as long as 50 to 150
calls are shorter."""

_KEPT = 16
"""The last of those calls, whose rows both engines are compared on."""
_LARGEST_KEPT = 1 << 10
"""Bytes of rows from which a call is not kept: nobody reserves memory for them. Edge cases are compared in any case."""

_FEARED = 1000

_PER_BYTE, _BESIDE = 2, 256 << 10
"""Bytes claimed: the models seen took 1.3 to 1.6 times what XGBoost does, small ones more."""

_VALUE = OUTPUTS.index("value")


class Engines:
    """Counts the calls of each model, and orders its conversion when it has earned that."""

    def __init__(self, state: Residency) -> None:
        self._state = state
        self._feared: Recent[tuple[str, str], bool] = Recent(_FEARED)
        """Names and versions over whose conversion a worker has ended."""

    def lost(self, worker: Worker) -> bool:
        """A worker has crashed: return whether over a conversion, which is not tried again."""
        entry = worker.held.get(worker.converting)
        if entry is not None:
            self._feared.note((entry.key, entry.value.version), True)
        return entry is not None

    def saw(self, entry: Entry[Resident], call: Call) -> None:
        """Take note of a call that ``entry`` has answered."""
        if call.output != _VALUE or call.shape[0] > FEW_ROWS or call.large:
            return
        place = entry.value
        place.small_calls += 1
        if EARNED - _KEPT < place.small_calls <= EARNED:
            if call.matrix.nbytes <= _LARGEST_KEPT:
                kept = (*place.rare.rows_kept, _as_sent(entry, call).tobytes())
                place.rare = replace(place.rare, rows_kept=kept)
            if place.small_calls == EARNED:
                self._order(entry)

    def _order(self, entry: Entry[Resident]) -> None:
        place, allowed = entry.value, _PER_BYTE * entry.size + _BESIDE
        rows = b"".join(place.rare.rows_kept)
        place.rare = replace(place.rare, rows_kept=())
        if self._feared.get((entry.key, place.version)):
            place.rare = replace(place.rare, stays="a worker ended when it was converted")
            return
        if place.worker.alive and entry.state is State.READY and self._state.ledger.enlarge(entry, allowed):
            place.rare = replace(place.rare, engine_bytes=allowed)
            place.worker.charged += allowed
            report = place.worker.process.artifacts.convert(place.number, allowed, rows)
            report.add_done_callback(partial(self._settle, entry, allowed))
        else:
            place.small_calls = 0

    def _settle(self, entry: Entry[Resident], allowed: int, report: asyncio.Future[Converted]) -> None:
        """Give back what was claimed beyond what it takes; without a report, all has gone with the model."""
        if report.cancelled() or entry.state is State.GONE:
            return
        place, result = entry.value, report.result()
        engine: Engine = "onnx" if result.refusal is None else "predictor"
        place.rare = replace(place.rare, engine=engine, engine_bytes=result.size, stays=result.refusal)
        place.worker.charged -= allowed - result.size
        self._state.retire(self._state.ledger.shrink(entry, allowed - result.size))


def _as_sent(entry: Entry[Resident], call: Call) -> NDArray[np.float32]:
    facts = entry.value.facts
    order = column_order(
        call.shape[1], call.columns,
        model=entry.key, n_features=facts.n_features, feature_names=facts.feature_names,
    )  # fmt: skip
    return call.matrix if order is None else call.matrix.take(order, axis=1)
