"""The models of one worker, shared by its two threads."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from modelcache.worker.predictors import PredictorFaultError

if TYPE_CHECKING:
    from modelcache.worker.engines import ConvertedPredictor
    from modelcache.worker.predictors import Matrix, Predictor


class LoadedModel:
    """A model that the main thread predicts with and the loader thread may free between two predictions."""

    __slots__ = ("_lock", "_predictor", "most_rows", "size")

    def __init__(self, predictor: Predictor, size: int = 0) -> None:
        self.size = size
        """Heap it takes."""
        self.most_rows: dict[int, int] = {}
        """How many rows may be predicted at a stretch, by what is asked for, as far as that is known."""
        self._predictor: Predictor | ConvertedPredictor | None = predictor
        self._lock = Lock()

    def predict(self, rows: Matrix, output: str) -> Matrix:
        """Return the predictor's answer; PredictorFaultError once the model has been freed."""
        with self._lock:
            if self._predictor is None:
                raise PredictorFaultError("the model has been unloaded")
            return self._predictor.predict(rows, output)

    @property
    def predictor(self) -> Predictor | ConvertedPredictor | None:
        """What answers; None once the model has been freed."""
        return self._predictor

    def convert(self, converted: ConvertedPredictor, size: int) -> None:
        """Let the next prediction be answered by ``converted``, which takes ``size`` bytes more."""
        with self._lock:
            self._predictor = converted
        self.size += size

    def free(self) -> None:
        """Drop the model; waits for a prediction that is using it, and frees in the calling thread."""
        with self._lock:
            self._predictor = None


Models = dict[int, LoadedModel]
"""By the number the parent gave. Each operation on it is atomic, so that the threads need no lock around it."""
