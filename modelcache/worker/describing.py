"""What a worker reports of a model that it has loaded."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from modelcache.worker.predictors import PredictorFaultError, described

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.worker.formats import Unpacked
    from modelcache.worker.predictors import Predictor

T = TypeVar("T")

_KINDS_SHARED, _NAMES_SHARED = 1024, 100
"""What is the same for all models of a fleet is written once, unless it is much to keep, as they have many columns."""


def facts_of(predictor: Predictor, unpacked: Unpacked) -> bytes:
    """Return the facts of a LOADED frame; PredictorFaultError if the predictor does not tell them."""
    try:
        columns, names, *rest = _description(predictor)
        write = _shared_json if names is None or len(names) <= _NAMES_SHARED else _as_json
        return write(unpacked.format, unpacked.container, columns, names, *rest)
    except Exception as error:
        raise PredictorFaultError(
            f"the predictor does not describe its model as it has to ({described(error)}): "
            "run modelcache.testing.check_predictor on it"
        ) from error


_NAMES = (
    "format", "container", "n_features", "feature_names", "n_outputs", "objective", "booster", "n_trees",
    "best_iteration",
)  # fmt: skip


def _as_json(*facts: object) -> bytes:
    return json.dumps(dict(zip(_NAMES, facts, strict=True))).encode()


_shared_json = lru_cache(_KINDS_SHARED)(_as_json)


def _description(predictor: Predictor) -> tuple[Any, ...]:
    names = predictor.feature_names
    return (
        int(predictor.n_features),
        None if names is None else tuple(map(str, names)),
        int(predictor.n_outputs),
        _optional(predictor, "objective", str),
        _optional(predictor, "booster", str),
        _optional(predictor, "n_trees", int),
        _optional(predictor, "best_iteration", int),
    )


def _optional(predictor: Predictor, name: str, kind: Callable[[Any], T]) -> T | None:
    """Return what the predictor says of itself as plain text or number: only these travel in a frame."""
    value = getattr(predictor, name, None)
    return None if value is None else kind(value)
