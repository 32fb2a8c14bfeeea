"""Rule P4: large batches travel by shared memory, in slices, and are as good as any: equal, cancellable, mortal."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import zoo
from conftest import settle
from halting import go_on, halt
from modelcache import InvalidInputError, MemoryStore, PredictTimeoutError, slicing
from modelcache.inputs import LARGE_CELLS, as_matrix
from modelcache.pacing import Pace
from modelcache.pool.requests import SHARED_FROM
from modelcache.pool.shared import SLOT_BYTES, SLOTS
from modelcache.resident import Rare

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeRegistry
    from modelcache import ModelRegistry
    from modelcache.pool.pool import Worker
    from modelcache.records import Output

MODEL, NAMED, CLASSES = zoo.model(), zoo.model(names=True), zoo.model("multiclass")
ROW = 4 * zoo.N
LARGE = zoo.rows(LARGE_CELLS // zoo.N + 1000)
OUTPUTS: dict[Output, dict[str, Any]] = {
    "value": {},
    "margin": {"output_margin": True},
    "leaf": {"pred_leaf": True},
    "contribs": {"pred_contribs": True},
}


@pytest.fixture
async def registry(make_registry: MakeRegistry) -> ModelRegistry:
    store = MemoryStore({"m.ubj": MODEL.ubj, "named.ubj": NAMED.ubj, "classes.ubj": CLASSES.ubj})
    registry = await make_registry(store)
    await registry.preload(["m", "named", "classes"])
    return registry


def worker_of(registry: ModelRegistry) -> Worker:
    (worker,) = registry._pool.workers
    return worker


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture
def slices_as_large_as_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is meanwhile."""
    monkeypatch.setattr(slicing, "_SLICE_SECONDS", 1e6)
    monkeypatch.setattr(slicing, "_SHORT_SLICE_SECONDS", 1e6)


BORDERS = {
    "shared": SHARED_FROM // ROW,
    "slot": SLOT_BYTES // ROW,
    "large": LARGE_CELLS // zoo.N,
    "slots": 3 * (SLOT_BYTES // ROW),
}


@pytest.mark.usefixtures("slices_as_large_as_slots")
@pytest.mark.parametrize("border", BORDERS)
async def test_rows_at_the_borders(registry: ModelRegistry, border: str) -> None:
    """One row fewer or more than what fits: no row is lost, doubled or moved."""
    for count in range(BORDERS[border] - 1, BORDERS[border] + 3):
        rows = zoo.rows(count, seed=count)
        assert np.array_equal(await registry.predict("m", rows), MODEL.expected(rows))


@pytest.mark.usefixtures("slices_as_large_as_slots")
async def test_all_outputs(registry: ModelRegistry, subtests: pytest.Subtests) -> None:
    """Also those that take more bytes than the rows, and more than their slot: contributions, leaves."""
    for name, model in {"m": MODEL, "classes": CLASSES}.items():
        for output, options in OUTPUTS.items():
            with subtests.test(name=name, output=output):
                answer = await registry.predict(name, LARGE, output=output)
                assert np.array_equal(answer, model.expected(LARGE, **options))


@pytest.mark.parametrize("output", ["value", "contribs"])
async def test_slices_of_any_size(registry: ModelRegistry, output: Output) -> None:
    """Slices are cut by what a row takes, which differs from one to the next."""
    rows = LARGE if output == "value" else LARGE[:8000]
    assert np.array_equal(await registry.predict("m", rows, output=output), MODEL.expected(rows, **OUTPUTS[output]))


async def test_what_calls_take_is_learnt(registry: ModelRegistry) -> None:
    """From calls of many rows only: of models that are asked for few, nothing more is kept."""
    place = registry._state.ledger.table["m"].value
    for count in (1, 63):
        await registry.predict("m", zoo.rows(count))
    assert not place.rare.paces
    await registry.predict("m", zoo.rows(64))
    (pace,) = place.rare.paces.values()
    assert pace._measured == 1
    await registry.predict("m", LARGE)
    assert pace._measured > 2


@pytest.mark.parametrize(("half", "slices"), [(0.0029, False), (0.0015, True)])
async def test_what_gains_nothing_is_not_cut(registry: ModelRegistry, half: float, *, slices: bool) -> None:
    """A call whose rows cost little beside the prediction goes whole, and can be predicted together with others."""
    place, pace = registry._state.ledger.table["m"].value, Pace()
    pace.note(50, half)
    pace.note(100, 0.003)
    place.rare = Rare(paces={0: pace})
    before = place.worker.latency.count
    assert np.array_equal(await registry.predict("m", zoo.rows(100)), MODEL.expected(zoo.rows(100)))
    assert (place.worker.latency.count - before > 1) is slices


def _as_integers(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    whole: np.ndarray[Any, Any] = np.nan_to_num(rows * 1000).astype(np.int64)
    return whole + (1 << 60) + 1


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "float64": lambda rows: rows.astype(np.float64) * 1.1,
    "too large for float32": lambda rows: np.where(rows > 2, 1e300, rows.astype(np.float64)),
    "float16": lambda rows: rows.astype(np.float16),
    "int64": _as_integers,
    "int8": lambda rows: np.nan_to_num(rows * 10).astype(np.int8),
    "bool": lambda rows: rows > 0,
    "big endian": lambda rows: rows.astype(">f8"),
    "Fortran order": np.asfortranarray,
    "every other row": lambda rows: np.repeat(rows, 2, axis=0)[::2],
    "every other column": lambda rows: np.repeat(rows, 2, axis=1)[:, ::2],
    "backwards": lambda rows: rows[::-1, ::-1],
    "masked": lambda rows: np.ma.masked_greater(rows, 1),
    "arrays of rows": list,
    "lists": lambda rows: rows.tolist(),
    "whole numbers in lists": lambda rows: _as_integers(rows).tolist(),
    "tuple of tuples": lambda rows: tuple(map(tuple, rows.tolist())),
}


async def test_all_layouts(registry: ModelRegistry, subtests: pytest.Subtests) -> None:
    """Numbers of any kind and order in memory are rounded as they are in a small call."""
    for layout, lay_out in LAYOUTS.items():
        with subtests.test(layout=layout):
            rows = lay_out(LARGE)
            matrix, _ = as_matrix(rows)
            expected = MODEL.booster.inplace_predict(matrix)  # a DMatrix would refuse infinite values
            assert np.array_equal(await registry.predict("m", rows), expected)


FRAMES: dict[str, Callable[[dict[str, Any]], Any]] = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "arrow": pa.table}


async def test_columns_by_name(registry: ModelRegistry, subtests: pytest.Subtests) -> None:
    """Columns in another order than the model's are put in order slice by slice."""
    columns = {zoo.FEATURES[index]: LARGE[:, index] for index in [3, 0, 5, 1, 4, 2]}
    for frame, make in FRAMES.items():
        with subtests.test(frame=frame):
            assert np.array_equal(await registry.predict("named", make(columns)), NAMED.expected(LARGE))
    foreign = FRAMES[frame](dict(zip("abcdef", LARGE.T, strict=True)))
    with pytest.raises(InvalidInputError, match="unexpected: 'a'"):
        await registry.predict("named", foreign)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: [*rows, [1.0]], rf"Row {len(LARGE)} has 1 values, row \d+ has {zoo.N}"),
        (lambda rows: [*rows, ["text"] * zoo.N], rf"rows\[{len(LARGE)}, 0\] holds a str"),
        (lambda rows: [*rows, 7.0], f"Row {len(LARGE)} is a single value"),
    ],
    ids=["short", "text", "no row"],
)
async def test_what_is_wrong_with_a_long_list_is_said_of_the_whole(
    registry: ModelRegistry, spoil: Callable[[Any], Any], message: str
) -> None:
    """The message names the row as the caller counts it, though it was read in pieces."""
    with pytest.raises(InvalidInputError, match=message):
        await registry.predict("m", spoil(LARGE.tolist()))


async def test_a_long_list_is_read_while_the_loop_goes_on(registry: ModelRegistry) -> None:
    """Reading a list holds the GIL: it is let go of after each piece."""
    turns = 0
    rows = LARGE.tolist()
    call = asyncio.create_task(registry.predict("m", rows))
    await settle(3)
    while not worker_of(registry).requests.pending and not call.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 10
    assert np.array_equal(await call, MODEL.expected(LARGE))


async def test_a_call_ends_in_time_while_its_rows_are_read(registry: ModelRegistry) -> None:
    """Rule P3: the deadline is that of the whole call."""
    with pytest.raises(PredictTimeoutError, match="being converted"):
        await registry.predict("m", LARGE.tolist(), timeout=0)


# Slots


@pytest.mark.parametrize("ends", ["cancelled", "timed out"])
async def test_slots_of_calls_that_nobody_waits_for_come_back(registry: ModelRegistry, ends: str) -> None:
    """The worker answers late: its slots are not lent meanwhile, and all come back when it does."""
    worker = worker_of(registry)
    halt(worker.pid)
    late = [asyncio.create_task(registry.predict("m", LARGE, timeout=0.05)) for _ in range(3)]
    await until(lambda: len(worker.requests.slots.free) == SLOTS - 6)
    free = sorted(worker.requests.slots.free)
    if ends == "cancelled":
        for call in late:
            call.cancel()
    results = await asyncio.gather(*late, return_exceptions=True)
    assert {type(result) for result in results} <= {asyncio.CancelledError, PredictTimeoutError}
    assert sorted(worker.requests.slots.free) == free
    others = [asyncio.create_task(registry.predict("m", LARGE)) for _ in range(3)]
    await settle()
    go_on(worker.pid)
    for answer in await asyncio.gather(*others):
        assert np.array_equal(answer, MODEL.expected(LARGE))
    await until(lambda: len(worker.requests.slots.free) == SLOTS)


async def test_more_large_calls_than_slots(registry: ModelRegistry) -> None:
    """What finds no slot travels in frames, and each caller has the answer to his own rows."""
    every = [zoo.rows(50_000, seed=seed) for seed in range(SLOTS)]
    answers = await asyncio.gather(*(registry.predict("m", rows) for rows in every))
    for rows, answer in zip(every, answers, strict=True):
        assert np.array_equal(answer, MODEL.expected(rows))


async def test_a_killed_worker_takes_its_slots_with_it(registry: ModelRegistry) -> None:
    """Rule P1: the whole call is made again, with the slots of the next worker."""
    first = worker_of(registry)
    call = asyncio.create_task(registry.predict("m", LARGE))
    await until(lambda: len(first.requests.slots.free) < SLOTS)
    os.kill(first.pid, signal.SIGKILL)
    assert np.array_equal(await call, MODEL.expected(LARGE))
    assert first.requests.slots.free == []
    assert worker_of(registry) is not first


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_the_memory_is_unmapped_when_the_registry_closes(registry: ModelRegistry) -> None:
    """Nothing of it is left, neither mapped nor open."""
    await registry.predict("m", LARGE)
    assert mappings() == 1
    await registry.close()
    gc.collect()
    assert mappings() == 0


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:modelcache")


async def test_the_answer_is_the_callers_own(registry: ModelRegistry) -> None:
    """It may be written to, and the next call does not change it."""
    answer = await registry.predict("m", LARGE)
    expected = answer.copy()
    await registry.predict("m", LARGE[::-1])
    assert np.array_equal(answer, expected)
    answer += 1
