"""A second engine for hot models: ONNX Runtime, which answers a few rows in a fifth of XGBoost's time or less.

A model is converted when it has been asked often, and only if the answers stay the same, bit for bit: for objectives
whose way from margins to values is known exactly, and after a comparison on rows that the model has been asked.
"""

from __future__ import annotations

import ctypes
import json
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from modelcache.pool import wire
from modelcache.worker import onnx, ubjson
from modelcache.worker.onnx import NotConvertibleError

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.worker.predictors import Matrix, XGBoostPredictor

_IDENTITY = frozenset({
    "binary:logitraw", "rank:map", "rank:ndcg", "rank:pairwise", "reg:absoluteerror", "reg:linear",
    "reg:pseudohubererror", "reg:quantileerror", "reg:squarederror", "reg:squaredlogerror",
})  # fmt: skip
_LOGISTIC = frozenset({"binary:logistic", "reg:logistic"})
_EXPONENTIAL = frozenset({"count:poisson", "reg:gamma", "reg:tweedie"})
OBJECTIVES = _IDENTITY | _LOGISTIC | _EXPONENTIAL
"""Those whose values can be computed from margins as XGBoost does."""

_ONE, _EPSILON, _MOST_NEGATED = np.float32(1), np.float32(1e-16), np.float32(88.7)
"""XGBoost's own constants: with them the sigmoid neither overflows nor becomes 0."""


class ConvertedPredictor:
    """A model in both engines: values of a few rows come from ONNX Runtime, everything else from XGBoost."""

    def __init__(self, xgboost: XGBoostPredictor, session: Any) -> None:
        self.xgboost = xgboost
        self.n_features, self.feature_names = xgboost.n_features, xgboost.feature_names
        self.n_outputs = xgboost.n_outputs
        self._run = session.run
        self._outputs = [onnx.OUTPUT]
        self._link = _link_of(xgboost.objective)

    def predict(self, rows: Matrix, output: str) -> Matrix:
        """Return what XGBoost returns, bit for bit."""
        if output != "value" or len(rows) > wire.FEW_ROWS:
            return self.xgboost.predict(rows, output)
        margins: Matrix = self._run(self._outputs, {onnx.INPUT: rows})[0]
        if self.n_outputs == 1:
            margins = margins.reshape(-1)
        return margins if self._link is None else self._link(margins)


def convert(xgboost: XGBoostPredictor, rows: Matrix) -> ConvertedPredictor:
    """Return ``xgboost`` with a second engine, whose answers to ``rows`` are the same.

    Raises NotConvertibleError, ImportError without onnxruntime, and what an unusual model makes the reader raise.
    """
    if xgboost.booster != "gbtree" or xgboost.objective not in OBJECTIVES:
        raise NotConvertibleError(f"{xgboost.booster} with {xgboost.objective} may differ in the last bit")
    learner = ubjson.read(xgboost.as_ubjson())["learner"]
    rounds = xgboost.best_iteration + 1 if xgboost.best_iteration is not None else None
    forest = onnx.Forest.of(learner, _base_margins(learner, xgboost.objective), rounds)
    converted = ConvertedPredictor(xgboost, _session(onnx.write(forest)))
    alone = [rows[index : index + 1] for index in range(len(rows))]
    for batch in (*alone, rows, *_edges(forest)):
        _compare(converted, batch)
    return converted


def _compare(converted: ConvertedPredictor, rows: Matrix) -> None:
    for start in range(0, len(rows), wire.FEW_ROWS):
        batch = np.ascontiguousarray(rows[start : start + wire.FEW_ROWS])
        ours, theirs = converted.predict(batch, "value"), converted.xgboost.predict(batch, "value")
        if ours.shape != theirs.shape or ours.tobytes() != theirs.tobytes():
            raise NotConvertibleError("ONNX Runtime answers rows of this model with other values")


def _edges(forest: onnx.Forest) -> tuple[Matrix, Matrix]:
    """Return a row for each way to be missing or infinite, and rows of thresholds, where < and <= differ."""
    special = np.array([[np.nan], [np.inf], [-np.inf], [0.0], [-0.0]], np.float32).repeat(forest.n_features, axis=1)
    thresholds = np.zeros((wire.FEW_ROWS, forest.n_features), np.float32)
    splits = np.flatnonzero(forest.left >= 0)
    for row, some in zip(thresholds, np.array_split(splits, wire.FEW_ROWS), strict=True):
        row[forest.features[some]] = forest.values[some]
    return special, thresholds


def _base_margins(learner: dict[str, Any], objective: str) -> Matrix:
    """Return the base score as margins, one for each output, by the same functions that XGBoost calls."""
    parameters = learner["learner_model_param"]
    outputs = max(1, int(parameters["num_class"]), int(parameters.get("num_target", "1")))
    scores = np.atleast_1d(np.array(json.loads(parameters["base_score"]), np.float32))
    if objective in _LOGISTIC:
        scores = -_each("logf", _ONE / scores - _ONE)
    elif objective in _EXPONENTIAL:
        scores = _each("logf", scores)
    return np.ascontiguousarray(np.broadcast_to(scores, (outputs,)))


def _link_of(objective: str) -> Callable[[Matrix], Matrix] | None:
    """Return what makes values of margins; None if they are the same."""
    if objective in _LOGISTIC:
        return lambda margins: _ONE / (_each("expf", np.minimum(-margins, _MOST_NEGATED)) + _ONE + _EPSILON)
    if objective in _EXPONENTIAL:
        return lambda margins: _each("expf", margins)
    return None


def _each(function: str, values: Matrix) -> Matrix:
    """Apply a function of the C library: NumPy's own rounds some values another way."""
    apply = _c_function(function)
    return np.array([apply(value) for value in values.ravel().tolist()], np.float32).reshape(values.shape)


@cache
def _c_function(name: str) -> Callable[[float], float]:
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    return function  # type: ignore[no-any-return]


def _session(model: bytes) -> Any:
    import onnxruntime  # noqa: PLC0415 - an optional dependency that takes 18 MB

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # of many small models, each would have its own
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # there is one node
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
