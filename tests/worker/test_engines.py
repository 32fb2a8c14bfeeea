"""The second engine against XGBoost: the same values, bit for bit, or no conversion."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import xgboost as xgb

import zoo
from modelcache.pool.wire import FEW_ROWS
from modelcache.worker import engines, onnx, ubjson
from modelcache.worker.engines import convert
from modelcache.worker.onnx import NotConvertibleError
from modelcache.worker.predictors import XGBoostPredictor

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

RANDOM = np.random.default_rng(3)
FEATURES = RANDOM.normal(size=(600, zoo.N)).astype(np.float32)
TARGET = FEATURES @ RANDOM.normal(size=zoo.N)
FEATURES[RANDOM.random(FEATURES.shape) < 0.1] = np.nan
POSITIVE = np.abs(TARGET) + 0.1
THREE = {"objective": "reg:quantileerror", "quantile_alpha": [0.1, 0.5, 0.9]}
RECIPES: dict[str, tuple[dict[str, Any], Any]] = {
    **{name: ({"objective": name}, POSITIVE) for name in (
        "reg:squarederror", "reg:squaredlogerror", "reg:pseudohubererror", "reg:absoluteerror", "reg:gamma",
        "reg:tweedie", "count:poisson",
    )},
    **{name: ({"objective": name}, TARGET > 0) for name in ("binary:logistic", "reg:logistic", "binary:logitraw")},
    "rank:pairwise": ({"objective": "rank:pairwise"}, np.digitize(TARGET, [0, 1])),
    "another base score": ({"objective": "binary:logistic", "base_score": 0.3}, TARGET > 0),
    "quantiles": (THREE, TARGET),
    "two targets": ({}, np.stack([TARGET, POSITIVE], axis=1)),
    "a forest in each round": ({"num_parallel_tree": 3, "subsample": 0.5}, TARGET),
    "lone leaves": ({"gamma": 1e9}, TARGET),
    "wide leaves": ({"grow_policy": "lossguide", "max_depth": 0, "max_leaves": 200}, TARGET),
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({"booster": "gblinear"}, TARGET),
    "dart": ({"booster": "dart", "rate_drop": 0.3}, TARGET),
    "classes": ({"objective": "multi:softprob", "num_class": 3}, np.digitize(TARGET, [0, 1])),
    "vector leaves": ({"multi_strategy": "multi_output_tree"}, np.stack([TARGET, POSITIVE], axis=1)),
}


@cache
def trained(recipe: str) -> XGBoostPredictor:
    params, label = (RECIPES | REFUSED)[recipe]
    matrix = xgb.DMatrix(FEATURES, label)
    if recipe.startswith("rank"):
        matrix.set_group([60] * 10)
    return loaded(xgb.train({"nthread": 1, "verbosity": 0, "max_depth": 5, **params}, matrix, 20))


def loaded(booster: xgb.Booster) -> XGBoostPredictor:
    return XGBoostPredictor.load(memoryview(booster.save_raw("ubj")), threads=1)


def difficult_rows(predictor: XGBoostPredictor, count: int = 3_000) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return random rows with missing and infinite cells, negative zeros, and a quarter of thresholds."""
    random = np.random.default_rng(7)
    rows = random.normal(size=(count, zoo.N)).astype(np.float32)
    forest = onnx.Forest.of(ubjson.read(predictor.as_ubjson())["learner"], np.zeros(1, np.float32), None)
    for column in range(zoo.N):
        thresholds = forest.values[(forest.left >= 0) & (forest.features == column)]
        if len(thresholds):
            rows[random.random(count) < 0.25, column] = random.choice(thresholds)
    for value in (np.nan, np.inf, -np.inf, -0.0):
        rows[random.random(rows.shape) < 0.03] = value
    return rows


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_are_xgboosts_bit_for_bit(recipe: str) -> None:
    """Alone and in any batch, with missing and infinite cells, and values that equal thresholds."""
    xgboost = trained(recipe)
    rows = difficult_rows(xgboost)
    converted = convert(xgboost, rows[:20])
    for size in (1, 7, FEW_ROWS, FEW_ROWS + 1):
        for start in range(0, len(rows) - size, 10 * size):
            batch = rows[start : start + size]
            ours, theirs = converted.predict(batch, "value"), xgboost.predict(batch, "value")
            assert (ours.shape, ours.dtype, ours.tobytes()) == (theirs.shape, theirs.dtype, theirs.tobytes())


@pytest.mark.parametrize("recipe", REFUSED)
def test_models_that_might_differ_stay_with_xgboost(recipe: str) -> None:
    """Other boosters, objectives with another way to their values, and leaves that are no numbers are refused."""
    with pytest.raises(NotConvertibleError):
        convert(trained(recipe), FEATURES[:1])


def test_categorical_splits_stay_with_xgboost() -> None:
    """They are no thresholds."""
    categories = np.nan_to_num(np.abs(FEATURES * 5)).astype(int)
    matrix = xgb.DMatrix(categories, TARGET, feature_types=["c"] * zoo.N, enable_categorical=True)
    with pytest.raises(NotConvertibleError, match="categorical"):
        convert(loaded(xgb.train({"nthread": 1, "max_cat_to_onehot": 1}, matrix, 3)), categories[:1])


def _chain(depth: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the left and right children of a tree whose every split has a leaf and the next split."""
    left, right = np.full(2 * depth + 1, -1), np.full(2 * depth + 1, -1)
    left[:-1:2], right[:-1:2] = np.arange(1, 2 * depth, 2), np.arange(2, 2 * depth + 1, 2)
    return left, right


def test_trees_that_are_chains_stay_with_xgboost() -> None:
    """ONNX Runtime builds trees by recursion, and its stack has an end."""
    onnx._check_depth(np.array([0]), *_chain(499))
    with pytest.raises(NotConvertibleError, match="a depth over 500"):
        onnx._check_depth(np.array([0]), *_chain(501))


def test_the_best_iteration_is_honoured() -> None:
    """A model trained with early stopping is converted up to there."""
    xgboost = XGBoostPredictor.load(memoryview(zoo.model("stopped", trees=30).ubj), threads=1)
    rows = zoo.rows(FEW_ROWS)
    assert xgboost.best_iteration is not None
    assert convert(xgboost, rows).predict(rows, "value").tobytes() == xgboost.predict(rows, "value").tobytes()


@pytest.mark.parametrize("output", ["margin", "leaf", "contribs"])
def test_other_outputs_are_xgboosts(output: str) -> None:
    """Only values come from the second engine."""
    xgboost, rows = trained("binary:logistic"), zoo.rows(3)
    assert np.array_equal(convert(xgboost, rows).predict(rows, output), xgboost.predict(rows, output))


def test_an_engine_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference in the last bit of one row is enough."""
    monkeypatch.setattr(engines, "_base_margins", lambda *_: np.array([np.nextafter(np.float32(0.5), 1)], np.float32))
    with pytest.raises(NotConvertibleError, match="other values"):
        convert(XGBoostPredictor.load(memoryview(zoo.model().ubj), threads=1), zoo.rows(5))


def test_numbers_are_packed_into_as_many_bytes_as_they_need() -> None:
    """Seven bits a byte: the array at once is what they are one by one."""
    numbers = np.array([0, 1, 127, 128, 300, 1 << 14, (1 << 21) - 1, 1 << 28, (1 << 32) - 1])
    assert onnx._packed(numbers) == b"".join(map(onnx._varint, numbers.tolist()))


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"{U\x01aTU\x01bZ}", {"a": True, "b": None}),
        (b"[FSU\x02hid\x3f\x80\x00\x00]", [False, "hi", 1.0]),
        (b"[#U\x02U\x05i\xff", [5, -1]),
    ],
)
def test_ubjson_of_every_kind_is_read(data: bytes, value: Any) -> None:
    """Objects, arrays with and without a count, texts, numbers and constants."""
    assert ubjson.read(data) == value


def test_typed_arrays_are_read_as_arrays() -> None:
    """Of big-endian numbers, empty ones too."""
    found = ubjson.read(b"[[$l#U\x02\x00\x00\x00\x01\x00\x00\x00\x02[$d#U\x00]")
    assert [array.tolist() for array in found] == [[1, 2], []]
