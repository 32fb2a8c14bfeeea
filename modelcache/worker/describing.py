"""What a worker reports of a model that it has loaded."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from modelcache.worker.predictors import PredictorFaultError, described

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelcache.worker.formats import Unpacked
    from modelcache.worker.predictors import Predictor

T = TypeVar("T")

_KINDS_SHARED = 1024
"""What is the same for all models of a fleet is written once."""


def facts_of(predictor: Predictor, unpacked: Unpacked) -> bytes:
    """Return the facts of a LOADED frame; PredictorFaultError if the predictor does not tell them."""
    try:
        return _as_json(unpacked.format, unpacked.container, *_description(predictor))
    except Exception as error:
        raise PredictorFaultError(
            f"the predictor does not describe its model as it has to ({described(error)}): "
            "run modelcache.testing.check_predictor on it"
        ) from error


_NAMES = (
    "format", "container", "n_features", "feature_names", "n_outputs", "objective", "booster", "n_trees",
    "best_iteration",
)  # fmt: skip


@lru_cache(_KINDS_SHARED)
def _as_json(*facts: object) -> bytes:
    return json.dumps(dict(zip(_NAMES, facts, strict=True))).encode()


def _description(predictor: Predictor) -> Iterator[object]:
    yield int(predictor.n_features)
    names = predictor.feature_names
    yield None if names is None else tuple(map(str, names))
    yield int(predictor.n_outputs)
    yield _optional(predictor, "objective", str)
    yield _optional(predictor, "booster", str)
    yield _optional(predictor, "n_trees", int)
    yield _optional(predictor, "best_iteration", int)


def _optional(predictor: Predictor, name: str, kind: Callable[[Any], T]) -> T | None:
    """Return what the predictor says of itself as plain text or number: only these travel in a frame."""
    value = getattr(predictor, name, None)
    return None if value is None else kind(value)
