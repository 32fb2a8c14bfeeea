"""A predictor as somebody else would write one: its own format, and names imported from the package."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Self

import numpy as np

from modelcache import InvalidInputError, ModelCacheError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

FACTORS = np.array([2.0, 3.0], np.float32)


def artifact() -> bytes:
    """Return the predictor's artifact: what ``numpy.savez`` writes, which is a zip."""
    raw = io.BytesIO()
    np.savez(raw, factors=FACTORS)
    return raw.getvalue()


class Scaled:
    """Multiplies each column and adds them up."""

    feature_names: tuple[str, ...] | None = None
    n_outputs = 1

    def __init__(self, factors: Matrix) -> None:
        self.n_features = len(factors)
        self._factors = factors

    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        """Read the factors."""
        try:
            return cls(np.load(io.BytesIO(data))["factors"])
        except ValueError as error:
            raise ModelCacheError(f"no factors: {error}") from error

    def predict(self, rows: Matrix, output: str) -> Matrix:
        """Return the sums."""
        if output != "value":
            raise InvalidInputError(f"there is no {output}")
        values: Matrix = (rows * self._factors).sum(axis=1)
        return values


HEAVY_BYTES = 8 << 20


class Heavy(Scaled):
    """Takes far more memory than its artifact has bytes."""

    def __init__(self, factors: Matrix) -> None:
        super().__init__(factors)
        self._ballast = [bytearray(1 << 20) for _ in range(HEAVY_BYTES >> 20)]
