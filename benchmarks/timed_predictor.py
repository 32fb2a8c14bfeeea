"""The predictor that budget.py has the workers use: XGBoost's, which notes when it begins and ends.

The readings are in a file that parent and worker have mapped, the last ``LOG_SIZE`` of them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from modelcache.worker.predictors import XGBoostPredictor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcache.worker.predictors import Matrix

LOG_SIZE = 3000


def log_path(pid: int) -> Path:
    """Return where the worker ``pid`` has its log."""
    return Path(tempfile.gettempdir(), f"modelcache-budget-{pid}.log")


def read_log(path: Path, count: int) -> NDArray[np.float64]:
    """Return the last ``count`` pairs of seconds, oldest first."""
    log = np.fromfile(path, np.float64).reshape(-1, 2)
    return log[np.argsort(log[:, 0])][-count:]


class TimedPredictor(XGBoostPredictor):
    """XGBoost's, with a stopwatch."""

    _log: NDArray[np.float64] | None = None
    _next = 0

    def predict(self, rows: Matrix, output: str) -> Matrix:
        """Predict, and note when."""
        started = perf_counter()
        answer = super().predict(rows, output)
        self._note(started, perf_counter())
        return answer

    @classmethod
    def _note(cls, started: float, ended: float) -> None:
        if TimedPredictor._log is None:
            path = log_path(os.getpid())
            TimedPredictor._log = np.memmap(path, np.float64, "w+", shape=(LOG_SIZE, 2))
        TimedPredictor._log[TimedPredictor._next] = started, ended
        TimedPredictor._next = (TimedPredictor._next + 1) % LOG_SIZE
