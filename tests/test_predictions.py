"""Rule A5: whatever the model and however the rows come, the answer is XGBoost's own, bit for bit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import scipy.sparse as sp
import xgboost as xgb

import zoo
from modelcache import FeatureMismatchError, InvalidInputError, MemoryStore
from modelcache.inputs import LARGE_CELLS

if TYPE_CHECKING:
    from conftest import MakeRegistry
    from modelcache import ModelRegistry
    from modelcache.records import Output

KINDS = ("regression", "stopped", "binary", "multiclass", "softmax", "linear", "dart")
OUTPUTS: dict[Output, dict[str, bool]] = {
    "value": {},
    "margin": {"output_margin": True},
    "leaf": {"pred_leaf": True},
    "contribs": {"pred_contribs": True},
}
NAMED = zoo.model(names=True)
MODEL = zoo.model()


def kind_of(kind: str) -> zoo.Model:
    """A model of its kind; the one with early stopping has trees behind its best."""
    return zoo.model(kind, trees=40 if kind == "stopped" else 8)


def expected(kind: str, rows: Any, **options: bool) -> np.ndarray[Any, Any]:
    model = kind_of(kind)
    iterations = (0, model.booster.best_iteration + 1) if kind == "stopped" else (0, 0)
    return model.expected(rows, iterations=iterations, **options)


@pytest.fixture
async def registry(make_registry: MakeRegistry) -> ModelRegistry:
    artifacts = {f"{kind}.ubj": kind_of(kind).ubj for kind in KINDS}
    forms = {"form.ubj": MODEL.ubj, "form.json": MODEL.json, "form.tar.gz": MODEL.targz}
    return await make_registry(MemoryStore(artifacts | forms | {"named.ubj": NAMED.ubj}))


def test_the_stopped_model_has_trees_behind_its_best() -> None:
    """Otherwise the tests of early stopping below would test nothing."""
    booster = kind_of("stopped").booster
    assert booster.best_iteration + 1 < booster.num_boosted_rounds()
    rows = zoo.rows(5)
    assert not np.array_equal(expected("stopped", rows), kind_of("stopped").expected(rows, iterations=(0, 0)))


async def test_alone_and_in_any_batch(registry: ModelRegistry, subtests: pytest.Subtests) -> None:
    """A row predicts the same alone, in one call with others, and in a batch that concurrent callers make."""
    rows = zoo.rows(100)
    sizes = [1, 2, 3, 7, 64, 23]
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [rows[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    for kind in KINDS:
        with subtests.test(kind=kind):
            answer = expected(kind, rows)
            assert np.array_equal(await registry.predict(kind, rows), answer)
            alone = [await registry.predict(kind, row) for row in rows[:10]]
            assert np.array_equal(np.concatenate(alone), answer[:10])
            together = await asyncio.gather(*(registry.predict(kind, part) for part in parts))
            assert np.array_equal(np.concatenate(together), answer)


async def test_missing_values(registry: ModelRegistry) -> None:
    """NaN and None are missing, in a single cell and in a whole row."""
    rows = np.full((2, zoo.N), np.nan, np.float32)
    rows[1, 0] = 0.5
    for kind in KINDS:
        answer = expected(kind, rows)
        assert np.array_equal(await registry.predict(kind, rows), answer)
        assert np.array_equal(await registry.predict(kind, [[None] * zoo.N, [0.5] + [None] * (zoo.N - 1)]), answer)


@pytest.mark.parametrize("output", OUTPUTS)
async def test_every_output(registry: ModelRegistry, output: Output) -> None:
    """Margins, leaves and contributions are XGBoost's own too, with best_iteration honoured."""
    rows = zoo.rows(70)
    for kind in KINDS:
        if (kind, output) == ("linear", "leaf"):
            continue
        answer = expected(kind, rows, **OUTPUTS[output])
        single, several = await asyncio.gather(
            registry.predict(kind, rows[0], output=output), registry.predict(kind, rows, output=output)
        )
        assert several.dtype == np.float32
        assert several.shape == answer.shape
        assert np.array_equal(several, answer)
        assert np.array_equal(single, answer[:1])


async def test_an_output_that_a_model_has_not(registry: ModelRegistry) -> None:
    """A linear model has no leaves, and says so; it goes on predicting."""
    with pytest.raises(InvalidInputError, match="The model refused these rows"):
        await registry.predict("linear", zoo.rows(1), output="leaf")
    assert np.array_equal(await registry.predict("linear", zoo.rows(1)), expected("linear", zoo.rows(1)))


async def test_every_form_of_an_artifact(registry: ModelRegistry) -> None:
    """UBJSON, JSON and a gzipped tar hold the same model."""
    rows = zoo.rows(20)
    for form in ("ubj", "json", "tar.gz"):
        assert np.array_equal(await registry.predict(f"form.{form}", rows), MODEL.expected(rows))
    assert [info.format for info in registry.loaded()] == ["ubj", "json", "ubj"]


async def test_shapes(registry: ModelRegistry) -> None:
    """One output gives (n,), k outputs give (n, k), and one row is a batch of one: always float32."""
    for kind, tail in (("regression", ()), ("binary", ()), ("softmax", ()), ("multiclass", (3,))):
        info = await registry.load(kind)
        assert info.n_outputs == int(np.prod(tail))
        for count in (1, 2, 65):
            answer = await registry.predict(kind, zoo.rows(count))
            assert answer.dtype == np.float32
            assert answer.shape == (count, *tail)
        assert (await registry.predict(kind, zoo.rows(1)[0])).shape == (1, *tail)


async def test_results_belong_to_the_caller(registry: ModelRegistry) -> None:
    """Answers of one batch can be written to, and share no memory with one another or with the next."""
    rows = zoo.rows(2)
    one, two = await asyncio.gather(*(registry.predict("multiclass", row) for row in rows))
    before = two.copy()
    one[:] = -1
    assert np.array_equal(two, before)
    assert np.array_equal(await registry.predict("multiclass", rows[0]), expected("multiclass", rows[:1]))
    assert not np.shares_memory(one, two)


@pytest.mark.parametrize("count", [3, LARGE_CELLS // zoo.N])
@pytest.mark.parametrize("name", ["regression", "named"])
async def test_the_array_may_change_while_the_call_is_under_way(registry: ModelRegistry, name: str, count: int) -> None:
    """The rows are those at the time of the call, cold and warm, sent at once or in slices, array or DataFrame.

    Up to 1 MiB of them: what is larger is not copied.
    """
    model = {"regression": kind_of("regression"), "named": NAMED}[name]
    for _ in ("cold", "warm"):
        rows = np.ascontiguousarray(zoo.rows(count))
        answer = model.expected(rows)
        passed: Any = rows if name == "regression" else pd.DataFrame(rows, columns=zoo.FEATURES, copy=False)
        call = asyncio.create_task(registry.predict(name, passed))
        await asyncio.sleep(0)
        rows[:] = 0
        assert np.array_equal(await call, answer)


async def test_a_large_call_travels_in_slices(registry: ModelRegistry) -> None:
    """P4: 300,000 rows come back as from one prediction, and one-row calls are answered meanwhile."""
    rows = zoo.rows(300_000)
    answer, row_answer = expected("multiclass", rows), expected("regression", rows[:1])
    await registry.load("multiclass")
    await registry.load("regression")
    large = asyncio.create_task(registry.predict("multiclass", rows))
    answered = 0
    while not large.done():
        assert np.array_equal(await registry.predict("regression", rows[:1]), row_answer)
        answered += 1
    assert np.array_equal(await large, answer)
    assert answered > 3
    assert np.array_equal(
        await registry.predict("regression", rows[:30_000], output="contribs"),
        expected("regression", rows[:30_000], pred_contribs=True),
    )


async def test_a_row_that_is_wider_than_a_frame(make_registry: MakeRegistry) -> None:
    """P4: a row is never split: one of 300,000 columns is a frame of its own."""
    rows = np.random.default_rng(0).random((8, 300_000), np.float32)
    options = {"nthread": 1, "max_depth": 1, "max_bin": 2}
    booster = xgb.train(options, xgb.DMatrix(rows, rows[:, -1]), 1)
    registry = await make_registry(MemoryStore({"wide.ubj": bytes(booster.save_raw("ubj"))}))
    assert np.array_equal(await registry.predict("wide", rows), booster.predict(xgb.DMatrix(rows)))


# Rows with names


def frames(rows: np.ndarray[Any, Any], names: list[str]) -> tuple[pd.DataFrame, pl.DataFrame, pa.Table]:
    columns = {name: rows[:, index] for index, name in enumerate(names)}
    return pd.DataFrame(columns), pl.DataFrame(columns), pa.table(columns)


async def test_named_columns_are_put_in_order(registry: ModelRegistry) -> None:
    """Columns go by name where both sides have names, whatever their order in the frame; else by position."""
    rows = zoo.rows(10)
    order = [3, 0, 5, 1, 4, 2]
    for shuffled in frames(rows[:, order], [zoo.FEATURES[index] for index in order]):
        assert np.array_equal(await registry.predict("named", shuffled), NAMED.expected(rows))
    assert np.array_equal(await registry.predict("named", rows), NAMED.expected(rows))
    for foreign in frames(rows, list("abcdef")):
        assert np.array_equal(await registry.predict("regression", foreign), expected("regression", rows))
        with pytest.raises(FeatureMismatchError) as caught:
            await registry.predict("named", foreign)
        assert caught.value.missing == zoo.FEATURES
        assert caught.value.unexpected == tuple("abcdef")


async def test_other_shapes_of_rows(registry: ModelRegistry) -> None:
    """Lists, one row, integers, float64 and sparse rows: as XGBoost would take them."""
    rows = np.random.default_rng(1).integers(-3, 3, size=(4, zoo.N))
    answer = expected("regression", rows)
    for passed in (rows, rows.tolist(), rows.astype(np.float64), [tuple(row) for row in rows.tolist()], list(rows)):
        assert np.array_equal(await registry.predict("regression", passed), answer)
    assert np.array_equal(await registry.predict("regression", rows[2].tolist()), answer[2:3])
    stored = np.where(rows == 0, np.nan, rows)
    sparse = await registry.predict("regression", sp.csr_matrix(rows))
    assert np.array_equal(sparse, expected("regression", stored)), "what is not stored is missing"
