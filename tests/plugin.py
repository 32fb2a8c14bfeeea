"""A predictor as somebody else would write one: its own format, and names imported from the package."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, Self

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


class Scripted:
    """Does, says and answers what the expressions in its artifact evaluate to."""

    feature_names: tuple[str, ...] | None = None

    def __init__(self, script: dict[str, str]) -> None:
        self._script = script
        self.n_features = eval(script.get("n_features", "2"))
        self.n_outputs = 1
        self.n_trees = eval(script.get("n_trees", "None"))

    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        """Read the script."""
        script = json.loads(bytes(data))
        eval(script.get("load", "None"))
        return cls(script)

    def predict(self, rows: Matrix, output: str) -> Any:
        """Answer."""
        return eval(self._script["predict"], {"rows": rows, "np": np, "fail": fail})


def scripted(**script: str) -> bytes:
    """Return an artifact for :class:`Scripted`."""
    return json.dumps(script).encode()


def fail(error: Exception) -> None:
    """Raise it, in an expression."""
    raise error


class Numpyish(Scaled):
    """Says of itself what NumPy gave it."""

    def __init__(self, factors: Matrix) -> None:
        super().__init__(factors)
        facts = {
            "n_features": np.int64(len(factors)),
            "feature_names": np.array(["a", "b"]),
            "n_outputs": np.int32(1),
            "n_trees": np.int64(7),
            "best_iteration": np.int16(3),
            "objective": np.str_("sums"),
            "booster": np.str_("none"),
        }
        vars(self).update(facts)


class Unnamed(Scaled):
    """Has a list of names with nothing in it."""

    def __init__(self, factors: Matrix) -> None:
        super().__init__(factors)
        vars(self).update(feature_names=np.array([]))
