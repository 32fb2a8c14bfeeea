"""Orders to give a model a second engine: carried out by the loader thread, when it has nothing else to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from modelcache.worker import engines
from modelcache.worker.onnx import NotConvertibleError
from modelcache.worker.predictors import XGBoostPredictor, described
from modelcache.worker.threads import run_in_thread_of_its_own

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.worker.engines import ConvertedPredictor
    from modelcache.worker.heap import Heap
    from modelcache.worker.models import Models


class Conversions:
    """Those that wait; ``report(model, size, refusal)`` is told how each has ended."""

    def __init__(self, models: Models, heap: Heap, report: Callable[[int, int, str | None], None]) -> None:
        self._models = models
        self._heap = heap
        self._report = report
        self._waiting: dict[int, tuple[int, bytes]] = {}
        self._has_begun = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def order(self, model: int, allowed: int, rows: bytes) -> None:
        """Take an order; ``allowed`` is what the second engine may take."""
        self._waiting[model] = allowed, rows

    def forget(self, model: int) -> None:
        """The model leaves; harmless if nothing was ordered for it."""
        self._waiting.pop(model, None)

    @property
    def next(self) -> int:
        """The model that has waited longest."""
        return next(iter(self._waiting))

    def carry_out(self) -> int:
        """Convert the next model, and return the bytes that it takes more than before."""
        model = self.next
        allowed, rows = self._waiting.pop(model)
        size, refusal = 0, None
        try:
            size = self._convert(model, allowed, rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, the model stays as it is, and the parent hears why
            refusal = described(error)
        self._heap.trim()  # what a failure had taken is free only now
        self._report(model, size, refusal)
        return size

    def _convert(self, model: int, allowed: int, rows: bytes) -> int:
        loaded = self._models[model]
        xgboost = loaded.predictor
        if not isinstance(xgboost, XGBoostPredictor):
            raise NotConvertibleError("it is not a model of XGBoost's alone")
        self._begin()
        asked = np.frombuffer(rows, np.float32).reshape(-1, xgboost.n_features)
        before = self._heap.in_use()
        converted = run_in_thread_of_its_own(lambda: engines.convert(xgboost, asked))
        size = self._heap.in_use() - before if self._heap.exact else allowed
        if size > allowed:
            raise NotConvertibleError(f"its second engine takes {size:,} bytes, more than {allowed:,}")
        loaded.convert(converted, max(0, size))
        return max(0, size)

    def _begin(self) -> None:
        """Pay the library's one-time costs before the first model is weighed."""
        if not self._has_begun:
            run_in_thread_of_its_own(_convert_sample)
            self._has_begun = True


def _convert_sample() -> ConvertedPredictor:
    sample = XGBoostPredictor.load(memoryview(XGBoostPredictor.sample()), threads=1)
    return engines.convert(sample, np.zeros((1, sample.n_features), np.float32))
