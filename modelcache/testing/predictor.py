"""The contract of a predictor, as a suite that anybody can run on theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.worker.predictors import Predictor


def check_predictor(factory: Callable[[], tuple[type[Predictor], bytes]]) -> None:
    """Raise AssertionError if a predictor breaks the contract of :class:`Predictor`.

    ``factory()`` returns the class and the bytes of a model that it can load.
    """
    cls, data = factory()
    model = cls.load(memoryview(data), threads=1)
    _check_description(model)
    _check_shapes(model)
    _check_batches(model)
    _check_refusals(cls, model)


def _check_description(model: Predictor) -> None:
    assert isinstance(model.n_features, int), "n_features is a number"
    assert model.n_features > 0, "n_features is positive"
    assert isinstance(model.n_outputs, int), "n_outputs is a number"
    assert model.n_outputs > 0, "n_outputs is positive"
    names = model.feature_names
    if names is not None:
        assert isinstance(names, tuple), "feature_names is a tuple or None"
        assert len(names) == model.n_features, "feature_names has one name for each feature"
        assert all(isinstance(name, str) for name in names), "feature_names are text"


def _check_shapes(model: Predictor) -> None:
    for count in (1, 2, 65):
        answer = model.predict(_rows(model, count), "value")
        assert answer.dtype == np.float32, f"predictions are float32, not {answer.dtype}"
        wide = (count,) if answer.ndim == 1 else (count, model.n_outputs)
        assert answer.shape == wide, f"{count} rows gave shape {answer.shape}, not {wide}"
    missing = np.full((1, model.n_features), np.nan, np.float32)
    assert len(model.predict(missing, "value")) == 1, "a row of missing values has a prediction"


def _check_batches(model: Predictor) -> None:
    rows = _rows(model, 70)
    before = rows.copy()
    together = model.predict(rows, "value").copy()
    assert np.array_equal(rows, before), "predict must not change its rows"
    for index in (0, 1, 69):
        alone = model.predict(rows[index : index + 1], "value")
        assert np.array_equal(alone[0], together[index]), f"row {index} predicts differently alone and in a batch"


def _check_refusals(cls: type[Predictor], model: Predictor) -> None:
    for what, attempt in (
        ("an unknown output", lambda: model.predict(_rows(model, 1), "nonsense")),
        ("bytes that are no model", lambda: cls.load(memoryview(b"no model at all"), threads=1)),
    ):
        try:
            attempt()
        except Exception as error:  # noqa: BLE001 - any will do, if it has a message
            assert str(error), f"the error for {what} has no message"
        else:
            raise AssertionError(f"{what} has to raise an exception with a message")


def _rows(model: Predictor, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=(count, model.n_features)).astype(np.float32)
