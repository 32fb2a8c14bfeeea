"""The XGBoost predictor against XGBoost itself: every booster, objective and output, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest
import xgboost as xgb

import odd
import zoo
from modelcache.pool import wire
from modelcache.testing import check_predictor
from modelcache.worker.predictors import (
    PredictorFaultError,
    XGBoostMissingError,
    XGBoostPredictor,
    interface_of,
    resolve,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.worker.predictors import Predictor

COUNT, COLUMNS = 300, 6
RANDOM = np.random.default_rng(11)
FEATURES = RANDOM.normal(size=(COUNT, COLUMNS)).astype(np.float32)
TARGET = FEATURES @ RANDOM.normal(size=COLUMNS)
FEATURES[RANDOM.random(FEATURES.shape) < 0.1] = np.nan
POSITIVE = np.abs(TARGET) + 0.1
YES_NO = (TARGET > 0).astype(int)
CLASSES = YES_NO + (TARGET > 1)
NOISE = RANDOM.normal(size=60)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    params: dict[str, Any]
    label: Any = None
    rounds: int = 6
    info: dict[str, Any] = field(default_factory=dict)
    stop_on: Any = None


MULTICLASS = {"objective": "multi:softprob", "num_class": 3}
RECIPES = {
    **{name: Recipe({"objective": name}, POSITIVE) for name in (
        "reg:squarederror", "reg:squaredlogerror", "reg:pseudohubererror", "reg:absoluteerror", "reg:gamma",
        "reg:tweedie", "count:poisson", "survival:cox",
    )},
    **{name: Recipe({"objective": name}, YES_NO) for name in (
        "reg:logistic", "binary:logistic", "binary:logitraw", "binary:hinge",
    )},
    **{name: Recipe({"objective": name}, YES_NO, info={"group": [100, 200]}) for name in (
        "rank:pairwise", "rank:ndcg", "rank:map",
    )},
    "survival:aft": Recipe(
        {"objective": "survival:aft"}, info={"label_lower_bound": POSITIVE, "label_upper_bound": POSITIVE + 1}
    ),
    "quantiles": Recipe({"objective": "reg:quantileerror", "quantile_alpha": [0.1, 0.5, 0.9]}, TARGET),
    "softprob": Recipe(MULTICLASS, CLASSES),
    "softmax": Recipe({"objective": "multi:softmax", "num_class": 3}, CLASSES),
    "two targets": Recipe({}, np.stack([TARGET, -TARGET], 1)),
    "vector leaves": Recipe({"multi_strategy": "multi_output_tree"}, np.stack([TARGET, -TARGET], 1)),
    "dart": Recipe({"booster": "dart", "rate_drop": 0.5}, TARGET),
    "dart of classes": Recipe({"booster": "dart", "rate_drop": 0.5} | MULTICLASS, CLASSES),
    "linear": Recipe({"booster": "gblinear"}, TARGET),
    "linear of classes": Recipe({"booster": "gblinear"} | MULTICLASS, CLASSES),
    "forest": Recipe({"num_parallel_tree": 4, "subsample": 0.5}, TARGET),
    "forest of classes": Recipe({"num_parallel_tree": 2} | MULTICLASS, CLASSES),
    "no trees": Recipe({}, TARGET, rounds=0),
    "base score": Recipe({"base_score": 5.0}, TARGET),
    "exact": Recipe({"tree_method": "exact"}, TARGET),
    "stopped": Recipe({}, TARGET, 30, stop_on=NOISE),
    "stopped dart": Recipe({"booster": "dart"}, TARGET, 30, stop_on=NOISE),
    "stopped forest": Recipe({"num_parallel_tree": 3}, TARGET, 30, stop_on=NOISE),
    "stopped linear": Recipe({"booster": "gblinear"}, TARGET, 30, stop_on=NOISE),
    "stopped classes": Recipe(MULTICLASS, CLASSES, 30, stop_on=RANDOM.integers(0, 3, 60)),
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "value": {},
    "margin": {"output_margin": True},
    "leaf": {"pred_leaf": True},
    "contribs": {"pred_contribs": True},
}


@cache
def trained(name: str) -> xgb.Booster:
    """Train a model, once."""
    recipe = RECIPES[name]
    matrix = xgb.DMatrix(FEATURES, recipe.label)
    if recipe.info:
        matrix.set_info(**recipe.info)
    extra: dict[str, Any] = {}
    if recipe.stop_on is not None:
        extra = {"evals": [(xgb.DMatrix(FEATURES[:60], recipe.stop_on), "v")], "early_stopping_rounds": 2}
    params = {"nthread": 1, "verbosity": 0, "max_depth": 3, "seed": 1, **recipe.params}
    return xgb.train(params, matrix, recipe.rounds, verbose_eval=False, **extra)


def load(booster: xgb.Booster, form: str = "ubj") -> XGBoostPredictor:
    return XGBoostPredictor.load(memoryview(bytes(booster.save_raw(form))), threads=1)


def outcome(predict: Callable[[], Any]) -> np.ndarray[Any, Any] | str:
    """Return what is predicted, or why it is not."""
    try:
        return np.asarray(predict(), np.float32)
    except (xgb.core.XGBoostError, ValueError) as error:
        return str(error)


NOISE_OF_ERRORS = ("Stack trace", "[bt]", ".so", "/workspace", ".cc:")


# Predictions


@pytest.mark.parametrize("output", wire.OUTPUTS)
@pytest.mark.parametrize("name", RECIPES)
def test_predictions_are_xgboosts_own_bit_for_bit(name: str, output: str) -> None:
    """Rule A5: also where the answer is that there is none, and with the trees up to the best iteration."""
    booster = trained(name)
    model, rows = load(booster), FEATURES[:70]
    rounds = booster.best_iteration + 1 if name.startswith("stopped") and name != "stopped linear" else 0
    expected = outcome(lambda: booster.predict(xgb.DMatrix(rows), iteration_range=(0, rounds), **OPTIONS[output]))
    answer = outcome(lambda: model.predict(rows, output))
    if isinstance(expected, str) or isinstance(answer, str):
        assert isinstance(expected, str) and isinstance(answer, str), (expected, answer)
        assert answer
        assert not any(noise in answer for noise in NOISE_OF_ERRORS)
    elif name == "no trees" and output == "leaf":
        assert answer.shape == (70, 0), "XGBoost loses the number of rows here"
    else:
        assert np.array_equal(answer, expected)


@pytest.mark.parametrize("name", ["softprob", "linear", "dart", "stopped", "vector leaves"])
def test_json_and_ubjson_make_the_same_model(name: str) -> None:
    """Only loading differs between the forms."""
    booster, rows = trained(name), FEATURES[:20]
    one, two = load(booster, "ubj"), load(booster, "json")
    assert np.array_equal(one.predict(rows, "value"), two.predict(rows, "value"))
    assert (one.n_outputs, one.n_trees, one.best_iteration) == (two.n_outputs, two.n_trees, two.best_iteration)


@pytest.mark.parametrize("output", wire.OUTPUTS)
def test_categories_are_told_apart(output: str) -> None:
    """Categorical features come as their codes."""
    rows = FEATURES.copy()
    rows[:, 0] = RANDOM.integers(0, 5, COUNT)
    kinds = ["c"] + ["float"] * (COLUMNS - 1)
    matrix = xgb.DMatrix(rows, TARGET + rows[:, 0] % 2, feature_types=kinds, enable_categorical=True)
    booster = xgb.train({"nthread": 1, "max_depth": 3}, matrix, 6)
    assert np.array_equal(load(booster).predict(rows, output), booster.predict(matrix, **OPTIONS[output]))


def test_missing_values_take_the_branches_they_were_trained_to() -> None:
    """NaN is missing in every path through the library."""
    rows = np.full((3, COLUMNS), np.nan, np.float32)
    for name in ("reg:squarederror", "linear", "dart"):
        expected = trained(name).predict(xgb.DMatrix(rows))
        assert np.array_equal(load(trained(name)).predict(rows, "value"), expected)


def test_answers_of_one_model_do_not_share_memory() -> None:
    """XGBoost reuses the buffer it answers in; what a caller has must not change."""
    model = load(trained("softprob"))
    first = model.predict(FEATURES[:5], "value")
    kept = first.copy()
    model.predict(FEATURES[5:10], "value")
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("output", wire.OUTPUTS)
@pytest.mark.parametrize("name", ["reg:squarederror", "softprob", "linear", "dart", "vector leaves", "stopped"])
def test_a_batch_that_is_cut_into_pieces_is_xgboosts_own_bit_for_bit(name: str, output: str) -> None:
    """Rule A5: large batches are predicted in pieces, the last of which is a short one."""
    model, rows = load(trained(name)), np.tile(FEATURES, (40, 1))[:-7]
    in_pieces = outcome(lambda: model.predict(rows, output))
    assert len(rows) > 2 * model._rows_at_once[output]
    model._rows_at_once = {}
    assert np.array_equal(in_pieces, outcome(lambda: model.predict(rows, output)))


def test_models_of_one_kind_share_what_is_the_same_for_all() -> None:
    """Ten thousand of them do not have ten thousand copies of the same settings."""
    one, other = load(trained("softprob")), load(trained("softprob"))
    assert one._configs is other._configs
    assert one._dense is other._dense
    assert one._rows_at_once is other._rows_at_once


def test_early_stopping_counts_the_trees_up_to_the_best_iteration() -> None:
    """Rule A5: it predicts as the booster does that is cut after its best iteration, not as the whole one."""
    booster, rows = trained("stopped"), xgb.DMatrix(FEATURES)
    model = load(booster)
    assert model.best_iteration == booster.best_iteration < booster.num_boosted_rounds() - 1
    answer = model.predict(FEATURES, "value")
    assert np.array_equal(answer, booster[: booster.best_iteration + 1].predict(rows))
    assert not np.array_equal(answer, booster.predict(rows))


# What a model says of itself


@pytest.mark.parametrize(
    ("name", "outputs", "trees", "booster", "objective"),
    [
        ("reg:squarederror", 1, 6, "gbtree", "reg:squarederror"),
        ("softprob", 3, 18, "gbtree", "multi:softprob"),
        ("softmax", 1, 18, "gbtree", "multi:softmax"),
        ("quantiles", 3, 18, "gbtree", "reg:quantileerror"),
        ("two targets", 2, 12, "gbtree", "reg:squarederror"),
        ("vector leaves", 2, 6, "gbtree", "reg:squarederror"),
        ("dart", 1, 6, "dart", "reg:squarederror"),
        ("linear of classes", 3, 0, "gblinear", "multi:softprob"),
        ("forest of classes", 3, 36, "gbtree", "multi:softprob"),
        ("no trees", 1, 0, "gbtree", "reg:squarederror"),
    ],
)
def test_a_model_describes_itself(name: str, outputs: int, trees: int, booster: str, objective: str) -> None:
    """ModelInfo rests on it."""
    model = load(trained(name))
    assert (model.n_outputs, model.n_trees, model.booster, model.objective) == (outputs, trees, booster, objective)
    assert (model.n_features, model.feature_names, model.best_iteration) == (COLUMNS, None, None)


def test_feature_names_are_kept_in_order() -> None:
    """Any text is a name."""
    names = ["b", "a", "größe", "with space", "面积", "z"]
    matrix = xgb.DMatrix(FEATURES, TARGET, feature_names=names)
    assert load(xgb.train({"nthread": 1}, matrix, 2)).feature_names == tuple(names)


# The contract


@pytest.mark.parametrize("name", ["reg:squarederror", "softprob", "dart", "linear", "stopped", "two targets"])
def test_the_xgboost_predictor_keeps_the_contract(name: str) -> None:
    """The suite that is shipped to people who write their own."""
    check_predictor(lambda: (XGBoostPredictor, bytes(trained(name).save_raw("ubj"))))


class Sum:
    """A predictor as small as they come."""

    n_features = 3
    feature_names: tuple[str, ...] | None = ("a", "b", "c")
    n_outputs = 1

    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        del threads
        if bytes(data) != b"sum":
            raise ValueError("not a sum")
        return cls()

    def predict(self, rows: np.ndarray[Any, np.dtype[np.float32]], output: str) -> np.ndarray[Any, Any]:
        if output != "value":
            raise ValueError("a sum has a value only")
        return np.asarray(rows.sum(axis=1), np.float32)


class Doubles(Sum):
    def predict(self, rows: np.ndarray[Any, np.dtype[np.float32]], output: str) -> np.ndarray[Any, Any]:
        return np.asarray(super().predict(rows, output), float)


class Columns(Sum):
    def predict(self, rows: np.ndarray[Any, np.dtype[np.float32]], output: str) -> np.ndarray[Any, Any]:
        return super().predict(rows, output).reshape(1, -1)


class Vandal(Sum):
    def predict(self, rows: np.ndarray[Any, np.dtype[np.float32]], output: str) -> np.ndarray[Any, Any]:
        answer = super().predict(rows, output)
        rows += 1
        return answer


class Averaged(Sum):
    def predict(self, rows: np.ndarray[Any, np.dtype[np.float32]], output: str) -> np.ndarray[Any, Any]:
        answer = super().predict(rows, output)
        return np.asarray(answer - answer.mean(), np.float32)


class Anything(Sum):
    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        return cls()


class Silent(Sum):
    def predict(self, rows: np.ndarray[Any, np.dtype[np.float32]], output: str) -> np.ndarray[Any, Any]:
        if output != "value":
            raise ValueError
        return super().predict(rows, output)


class Misnamed(Sum):
    feature_names = ("a", "b")


class Featureless(Sum):
    n_features = 0


def test_a_small_predictor_keeps_the_contract() -> None:
    """Four members are all it takes."""
    check_predictor(lambda: (Sum, b"sum"))


@pytest.mark.parametrize(
    ("broken", "clause"),
    [
        (Doubles, "predictions are float32, not float64"),
        (Columns, "2 rows gave shape"),
        (Vandal, "must not change its rows"),
        (Averaged, "differently alone and in a batch"),
        (Anything, "bytes that are no model has to raise"),
        (Silent, "an unknown output has no message"),
        (Misnamed, "one name for each feature"),
        (Featureless, "n_features is positive"),
    ],
)
def test_the_contract_finds_what_is_broken(broken: type[Predictor], clause: str) -> None:
    """Each clause of the suite can fail, and says which it is."""
    with pytest.raises(AssertionError, match=clause):
        check_predictor(lambda: (broken, b"sum"))


# Errors


# No model that is cut short among them: XGBoost reads on behind its last byte, and what lies there decides whether it
# refuses, allocates gigabytes or crashes, and the test run with it. Workers refuse such bytes before they parse them.
@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"no model",
        b'{"learner":{},"version":[3,0,0]}',
        zoo.model().ubj.replace(b"gbtree", b"gbtrex"),
        zoo.model().json.replace(b'"split_indices"', b'"split_indexes"'),
    ],
    ids=["nothing in it", "text", "no learner in it", "unknown booster", "trees without splits"],
)
def test_bytes_that_are_no_model_are_refused_with_a_reason(data: bytes) -> None:
    """The reason is XGBoost's, without clock, source line and stack trace."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        XGBoostPredictor.load(memoryview(data), threads=1)
    message = str(caught.value)
    assert not any(noise in message for noise in NOISE_OF_ERRORS)
    assert not message.startswith("[")


def test_a_model_that_cannot_be_loaded_leaves_no_memory_behind() -> None:
    """A booster that was made for nothing is freed: ten thousand of them would show."""
    broken = memoryview(b'{"learner":{},"version":[3,0,0]}')
    heap = resident_bytes()
    for _ in range(3000):
        with pytest.raises(ValueError, match=r"\w"):
            XGBoostPredictor.load(broken, threads=1)
    assert resident_bytes() - heap < 8 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_without_xgboost_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the two packages is a dependency: the message says how to get one."""
    monkeypatch.setattr("modelcache.worker.predictors._loaded", [])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(XGBoostMissingError, match=r"pip install 'modelcache\[cpu\]'"):
        XGBoostPredictor.sample()


@pytest.mark.parametrize(
    ("path", "kind", "cause"),
    [
        ("no.such:Thing", ImportError, "No module named 'no'"),
        ("odd.Odd", ImportError, "No module named 'odd.Odd'"),
        ("odd:Nothing", PredictorFaultError, "AttributeError: module 'odd' has no attribute 'Nothing'"),
        ("odd", PredictorFaultError, "AttributeError: module 'odd' has no attribute ''"),
        (":Odd", PredictorFaultError, "ValueError: Empty module name"),
        ("", PredictorFaultError, "ValueError: Empty module name"),
        ("odd:ODD", PredictorFaultError, "TypeError: it has no method load"),
        ("json:JSONDecoder", PredictorFaultError, "TypeError: it has no method load"),
        ("pickle:Unpickler", PredictorFaultError, "TypeError: it has no method predict"),
    ],
)
def test_a_predictor_that_cannot_be_found_is_named(path: str, kind: type[Exception], cause: str) -> None:
    """With the form that a name has to have; only what is not installed is an ImportError."""
    with pytest.raises(kind, match=r"package\.module:Class") as caught:
        resolve(path)
    assert repr(path) in str(caught.value)
    assert cause in str(caught.value)


def test_a_predictor_is_found_by_its_path() -> None:
    """A class of any module that can be imported."""
    assert resolve(odd.ODD) is odd.Odd


def test_the_library_is_found_without_importing_xgboost() -> None:
    """A worker that only predicts never pays for the Python layer."""
    program = (
        "import sys; from modelcache.worker.predictors import XGBoostPredictor; XGBoostPredictor.sample(); "
        "print(sorted({'xgboost', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_the_array_interface_is_numpys_own() -> None:
    """What is written once per shape is what NumPy would say of the same rows."""
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    theirs = rows.__array_interface__
    written = eval(interface_of(rows), {"true": True})  # JSON but for the words
    assert tuple(written["data"]) == (theirs["data"][0], True)
    assert (tuple(written["shape"]), written["typestr"]) == (theirs["shape"], theirs["typestr"])
