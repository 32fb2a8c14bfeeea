"""What a worker reports of a model that it has loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from modelcache.worker.predictors import PredictorFaultError, described

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.worker.formats import Unpacked
    from modelcache.worker.predictors import Predictor

T = TypeVar("T")


def facts_of(predictor: Predictor, unpacked: Unpacked) -> dict[str, Any]:
    """Return the facts of a LOADED frame; PredictorFaultError if the predictor does not tell them."""
    found = {"unpacked_bytes": len(unpacked.data), "format": unpacked.format, "container": unpacked.container}
    try:
        return found | _description(predictor)
    except Exception as error:
        raise PredictorFaultError(
            f"the predictor does not describe its model as it has to ({described(error)}): "
            "run modelcache.testing.check_predictor on it"
        ) from error


def _description(predictor: Predictor) -> dict[str, Any]:
    names = predictor.feature_names
    return {
        "n_features": int(predictor.n_features),
        "feature_names": None if names is None else list(map(str, names)),
        "n_outputs": int(predictor.n_outputs),
        "objective": _optional(predictor, "objective", str),
        "booster": _optional(predictor, "booster", str),
        "n_trees": _optional(predictor, "n_trees", int),
        "best_iteration": _optional(predictor, "best_iteration", int),
    }


def _optional(predictor: Predictor, name: str, kind: Callable[[Any], T]) -> T | None:
    """Return what the predictor says of itself as plain text or number: only these travel in a frame."""
    value = getattr(predictor, name, None)
    return None if value is None else kind(value)
