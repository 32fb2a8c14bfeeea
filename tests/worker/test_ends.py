"""What is read from the ends of a model is what XGBoost says of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xgboost as xgb

import zoo
from modelcache.worker.ends import Account, read_ends
from modelcache.worker.predictors import XGBoostPredictor

TREES = ("regression", "stopped", "binary", "multiclass", "softmax")


def told(booster: xgb.Booster) -> Account:
    """What XGBoost says."""
    learner = json.loads(booster.save_config())["learner"]
    gbtree = learner["gradient_booster"]
    return Account(gbtree["name"], learner["objective"]["name"], int(gbtree["gbtree_model_param"]["num_trees"]))


@pytest.mark.parametrize("kind", TREES)
def test_of_tree_models_the_ends_tell(kind: str) -> None:
    """Objective and number of trees, without XGBoost's help."""
    model = zoo.model(kind, trees=12)
    assert read_ends(memoryview(model.ubj)) == told(model.booster)


@pytest.mark.parametrize("kind", ["linear", "dart"])
def test_of_others_xgboost_is_asked(kind: str) -> None:
    """Dart has a gbtree inside, and must not be taken for one: it is predicted in another way (A5)."""
    model = zoo.model(kind)
    assert read_ends(memoryview(model.ubj)) is None
    loaded = XGBoostPredictor.load(memoryview(model.ubj), threads=1)
    assert loaded.booster == {"linear": "gblinear", "dart": "dart"}[kind]


@pytest.mark.parametrize("data", [b"", b"{", zoo.model().json, zoo.model().ubj[:300], zoo.model().ubj[-300:]])
def test_what_looks_otherwise_says_nothing(data: bytes) -> None:
    """JSON, and anything cut: then XGBoost is asked."""
    assert read_ends(memoryview(data)) is None


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "reg:quantileerror", "quantile_alpha": np.linspace(0.01, 0.99, 60)},
        {"objective": "count:poisson"},
        {"objective": "survival:aft"},
        {"objective": "rank:ndcg"},
        {"num_parallel_tree": 3},
        {"multi_strategy": "multi_output_tree", "num_target": 3},
    ],
    ids=["long lists behind the objective", "poisson", "aft", "ranking", "forest", "vector leaves"],
)
def test_models_of_all_sorts(options: dict[str, Any]) -> None:
    """What is told is right; where it is not understood, nothing is told."""
    rows = np.random.default_rng(0).normal(size=(80, 3))
    label = np.abs(rows) if "num_target" in options else np.abs(rows.sum(1)).round()
    matrix = xgb.DMatrix(rows, label)
    if options.get("objective") == "survival:aft":
        matrix.set_float_info("label_lower_bound", label)
        matrix.set_float_info("label_upper_bound", label + 1)
    if options.get("objective") == "rank:ndcg":
        matrix = xgb.DMatrix(rows, np.minimum(label, 3), qid=np.zeros(80))
    booster = xgb.train({k: v for k, v in options.items() if k != "num_target"}, matrix, 4)
    data = bytes(booster.save_raw("ubj"))
    assert read_ends(memoryview(data)) in (None, told(booster))
    loaded = XGBoostPredictor.load(memoryview(data), threads=1)
    assert Account(loaded.booster, loaded.objective, loaded.n_trees) == told(booster)


def test_names_and_attributes_cannot_pass_for_the_objective() -> None:
    """They come before the trees, and what is looked for comes after: a name may say what it likes."""
    model = zoo.model(trees=12)
    booster = model.booster.copy()
    tail = model.ubj[model.ubj.rindex(b"gbtree}") - 10 :].replace(b"reg:squarederror", b"reg:liar").decode("latin-1")
    booster.set_attr(note=tail)
    found = read_ends(memoryview(bytes(booster.save_raw("ubj"))))
    assert found is None or found == told(booster)
