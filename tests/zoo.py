"""Models of all kinds, trained once, and the artifacts made of them."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import xgboost as xgb

FEATURES = ("f_a", "f_b", "f_c", "f_d", "f_e", "f_f")
N = len(FEATURES)


@dataclass(frozen=True)
class Model:
    """A trained booster with its serialised forms."""

    booster: xgb.Booster
    ubj: bytes
    json: bytes

    @property
    def targz(self) -> bytes:
        """As SageMaker packs it: a gzipped tar with the member ``xgboost-model``."""
        return pack({"xgboost-model": self.ubj})

    def expected(self, rows: Any, *, iterations: tuple[int, int] = (0, 0), **options: Any) -> np.ndarray[Any, Any]:
        """XGBoost's own answer, through a DMatrix."""
        matrix = xgb.DMatrix(np.atleast_2d(np.asarray(rows, np.float32)), feature_names=self.booster.feature_names)
        return np.asarray(self.booster.predict(matrix, iteration_range=iterations, **options))


def pack(members: dict[str, bytes]) -> bytes:
    """Return a gzipped tar of ``members``."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(raw.getvalue(), 1, mtime=0)


def rows(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Random rows, some cells of them missing."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(count, N)).astype(np.float32)
    values[random.random(values.shape) < 0.05] = np.nan
    return values


@cache
def model(kind: str = "regression", trees: int = 5, seed: int = 0, *, names: bool = False) -> Model:
    """Return a model: regression, binary, multiclass, softmax, stopped, linear, dart, or constant."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(400, N))
    target = features @ random.normal(size=N) + random.normal(size=400) * 0.1
    labels, options = _task(kind, target)
    matrix = xgb.DMatrix(features, labels, feature_names=list(FEATURES) if names else None)
    extra: dict[str, Any] = {}
    if kind == "stopped":
        extra = {"evals": [(xgb.DMatrix(features[:50], random.normal(size=50)), "v")], "early_stopping_rounds": 3}
    depth = {} if kind == "linear" else {"max_depth": 4}
    booster = xgb.train({"nthread": 1, **depth, **options}, matrix, trees, verbose_eval=False, **extra)
    return Model(booster, bytes(booster.save_raw("ubj")), bytes(booster.save_raw("json")))


def wide(columns: int) -> bytes:
    """Return a model of many columns with names of 21 characters, as UBJSON."""
    random = np.random.default_rng(0)
    features = random.normal(size=(50, columns))
    names = [f"customer_feature_{column:04}" for column in range(columns)]
    matrix = xgb.DMatrix(features, features[:, 0], feature_names=names)
    return bytes(xgb.train({"nthread": 1, "max_depth": 2}, matrix, 3).save_raw("ubj"))


def _task(kind: str, target: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    classes = (target > 0).astype(int) + (target > 1)
    tasks: dict[str, tuple[np.ndarray[Any, Any], dict[str, Any]]] = {
        "regression": (target, {}),
        "stopped": (target, {}),
        "binary": ((target > 0).astype(int), {"objective": "binary:logistic"}),
        "multiclass": (classes, {"objective": "multi:softprob", "num_class": 3}),
        "softmax": (classes, {"objective": "multi:softmax", "num_class": 3}),
        "linear": (target, {"booster": "gblinear"}),
        "dart": (target, {"booster": "dart", "rate_drop": 0.3}),
    }
    return tasks[kind]


def fleet(count: int, trees: int = 5) -> dict[str, bytes]:
    """Return ``count`` artifacts of different models, by file name ``m000.ubj`` and so on."""
    return {f"m{index:03}.ubj": model(trees=trees, seed=index % 7).ubj for index in range(count)}
