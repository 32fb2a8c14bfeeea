"""Another kind of model: a linear one in pure NumPy, served by the same registry.

The workers import this module to find ``LinearModel``. That is why what runs is under ``__main__``.
"""

import asyncio
import json
from typing import Self

import numpy as np
from numpy.typing import NDArray

from modelcache import MemoryStore, ModelRegistry

Matrix = NDArray[np.float32]


class LinearModel:
    """``intercept + coefficients * row``; a missing value counts as zero."""

    feature_names: tuple[str, ...] | None
    n_outputs = 1

    def __init__(self, coefficients: dict[str, float], intercept: float) -> None:
        self.feature_names = tuple(coefficients)
        self.n_features = len(coefficients)
        self._weights = np.array(list(coefficients.values()))
        self._intercept = intercept

    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        del threads  # one is enough
        return cls(**json.loads(bytes(data)))

    def predict(self, rows: Matrix, output: str) -> Matrix:
        if output != "value":
            raise ValueError(f"a linear model has no {output}")
        # Not `rows @ weights`: BLAS rounds a row differently alone and in a batch.
        values: Matrix = np.nan_to_num(rows * self._weights).sum(axis=1) + self._intercept
        return values.astype(np.float32)


async def serve(artifact: bytes) -> None:
    store = MemoryStore({"taxi.json": artifact})
    async with ModelRegistry(store, predictor="custom_predictor:LinearModel", workers=1) as registry:
        info = await registry.load("taxi")
        print("taxi takes", ", ".join(info.feature_names or ()))
        print("fares:", await registry.predict("taxi", [[3.5, 10], [12.0, 31]]))


if __name__ == "__main__":
    from modelcache.testing import check_predictor

    artifact = json.dumps({"coefficients": {"km": 2.0, "minutes": 0.5}, "intercept": 4.0}).encode()
    check_predictor(lambda: (LinearModel, artifact))
    print("LinearModel keeps the contract of a predictor")
    asyncio.run(serve(artifact))
