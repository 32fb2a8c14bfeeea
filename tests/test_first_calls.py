"""The row of a first call travels with the artifact, and is answered by whoever has just loaded it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

import zoo
from conftest import settle
from halting import go_on, halt
from modelcache import FeatureMismatchError, InvalidInputError, LoadTimeoutError, MemoryStore
from modelcache.testing import GatedStore

if TYPE_CHECKING:
    from conftest import MakeRegistry
    from modelcache import ModelRegistry
    from modelcache.records import Output

MODEL = zoo.model()
NAMED = zoo.model(names=True)
ROWS = zoo.rows(3)
ROW = ROWS[:1]


@pytest.fixture
async def registry(make_registry: MakeRegistry) -> ModelRegistry:
    artifacts = {"m.ubj": MODEL.ubj, "m.tar.gz": MODEL.targz, "m.json": MODEL.json, "named.ubj": NAMED.ubj}
    return await make_registry(MemoryStore(artifacts), workers=1)


def asked(registry: ModelRegistry) -> int:
    """How many calls have been sent to a model that was there."""
    return registry.stats().workers[0].predict_latency.count


@pytest.mark.parametrize("name", ["m.ubj", "m.tar.gz", "m.json"])
async def test_one_answer_for_artifact_and_rows(registry: ModelRegistry, name: str) -> None:
    """A5: it is that of any later call, bit for bit, and the worker was spoken to only once."""
    first = await registry.predict(name, ROW)
    assert asked(registry) == 0
    assert np.array_equal(first, MODEL.expected(ROW))
    first[:] = 0  # it is the caller's own
    assert np.array_equal(await registry.predict(name, ROW), MODEL.expected(ROW))
    assert asked(registry) == 1


async def test_a_first_call_says_where_its_time_went(registry: ModelRegistry) -> None:
    """``invoke`` tells the same as it would otherwise; the prediction is part of the load."""
    seen = await registry.invoke("m.ubj", ROW)
    assert seen.tier == "store"
    assert seen.model.name == "m.ubj"
    assert 0 < seen.timings.loading < seen.timings.total
    assert 0 <= seen.timings.predicting < seen.timings.total
    assert asked(registry) == 0


@pytest.mark.parametrize(
    ("rows", "output"),
    [(ROW, "margin"), (ROW, "contribs"), (ROWS, "value"), (pd.DataFrame(ROW), "value")],
    ids=["margin", "contribs", "several rows", "frame without names"],
)
async def test_other_calls_wait_until_it_is_there(registry: ModelRegistry, rows: Any, output: Output) -> None:
    """What could keep the loader busy, or has to be checked against the model, is sent when that has landed."""
    first = await registry.predict("m.ubj", rows, output=output)
    assert asked(registry) == (0 if isinstance(rows, pd.DataFrame) else 1)
    assert np.array_equal(first, await registry.predict("m.ubj", rows, output=output))


async def test_names_are_checked_before_rows_are_sent(registry: ModelRegistry) -> None:
    """Columns come in any order: their names say which is which, and only the model knows its own."""
    frame = pd.DataFrame(ROW, columns=zoo.FEATURES)
    first = await registry.predict("named.ubj", frame[list(reversed(zoo.FEATURES))])
    assert np.array_equal(first, NAMED.expected(ROW))
    assert asked(registry) == 1


@pytest.mark.parametrize("columns", [1, 5, 7])
async def test_a_first_call_with_wrong_columns(registry: ModelRegistry, columns: int) -> None:
    """It is told so like any other, and the model is resident."""
    with pytest.raises(FeatureMismatchError, match="takes 6 columns"):
        await registry.predict("m.ubj", np.zeros((1, columns), np.float32))
    assert [info.name for info in registry.loaded()] == ["m.ubj"]
    with pytest.raises(InvalidInputError):
        await registry.predict("m.tar.gz", [["text"]])


async def test_each_of_many_first_callers_has_his_own_answer(make_registry: MakeRegistry) -> None:
    """F1, F4: one load; the rows of one caller travel with it, those of the others follow."""
    store = GatedStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    rows = zoo.rows(20)
    calls = [asyncio.create_task(registry.predict("m", row)) for row in rows]
    await store.fetched(1)
    store.open("m")
    answers = np.concatenate(await asyncio.gather(*calls))
    assert np.array_equal(answers, MODEL.expected(rows))
    assert registry.stats().loads == 1


async def test_a_first_caller_who_leaves_takes_nobodys_answer(make_registry: MakeRegistry) -> None:
    """F3: his rows may have been sent; the others are answered, and nothing is held for him."""
    store = GatedStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    first = asyncio.create_task(registry.predict("m", ROWS[:1]))
    await store.fetched(1)
    second = asyncio.create_task(registry.predict("m", ROWS[1:]))
    await asyncio.sleep(0)
    first.cancel()
    store.open("m")
    assert np.array_equal(await second, MODEL.expected(ROWS[1:]))
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_row_whose_time_is_over_does_not_travel(make_registry: MakeRegistry) -> None:
    """P3: the next caller's row takes its place, and where there is none, the model is tried on a row of its own."""
    store = GatedStore({"m.ubj": MODEL.ubj, "n.ubj": MODEL.ubj})
    registry = await make_registry(store)
    for name in ("m", "n"):
        with pytest.raises(LoadTimeoutError):
            await registry.predict(name, ROWS[:1], timeout=0.001)
    second = asyncio.create_task(registry.predict("m", ROWS[1:2]))
    await store.fetched(2)
    store.open("m")
    store.open("n")
    assert np.array_equal(await second, MODEL.expected(ROWS[1:2]))
    assert asked(registry) == 0
    assert np.array_equal(await registry.predict("n", ROWS[2:]), MODEL.expected(ROWS[2:]))


async def test_an_answer_is_of_the_row_that_was_sent(make_registry: MakeRegistry) -> None:
    """P3: the first caller's time is over while the worker loads, the second gets the answer to his own row."""
    store = GatedStore({"m.ubj": MODEL.ubj})
    registry = await make_registry(store)
    worker = registry._pool.workers[0]
    first = asyncio.create_task(registry.predict("m", ROWS[:1], timeout=0.2))
    await store.fetched(1)
    halt(worker.pid)
    store.open("m")
    with pytest.raises(LoadTimeoutError):
        await first
    second = asyncio.create_task(registry.predict("m", ROWS[1:2]))
    await settle()
    go_on(worker.pid)
    assert np.array_equal(await second, MODEL.expected(ROWS[1:2]))
    assert asked(registry) == 1
