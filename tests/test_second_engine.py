"""``engine="auto"``: hot models get a second engine, and nobody can tell by the answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

import modelcache.registry
import zoo
from modelcache import MemoryStore, MissingDependencyError, ModelRegistry
from modelcache.engines import EARNED

if TYPE_CHECKING:
    from conftest import MakeRegistry
    from modelcache.cache.entry import Entry

needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="the extra onnx is not installed")


async def ask(registry: ModelRegistry, name: str = "A", calls: int = EARNED, rows: Any = None) -> None:
    for call in range(calls):
        await registry.predict(name, zoo.rows(1, seed=call) if rows is None else rows)


def entry_of(registry: ModelRegistry, name: str = "A") -> Entry[Any]:
    return registry._state.ledger.table[name]


async def settled(registry: ModelRegistry, name: str = "A") -> None:
    """Wait until the order that was given for a model has been answered, or taken back."""
    place = entry_of(registry, name).value
    for converting in tuple(place.worker.process.artifacts._converting.values()):
        await asyncio.wait((converting,))
    await asyncio.sleep(0)


@needs_onnx
async def test_a_hot_model_gets_a_second_engine(make_registry: MakeRegistry) -> None:
    """Its bytes are charged as measured, ModelInfo and explain() tell, and its answers stay the same bit for bit."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model("binary").ubj}), engine="auto")
    before = await registry.predict("A", zoo.rows(40))
    size = registry.loaded()[0].size_bytes
    await ask(registry)
    await settled(registry)
    (info,) = registry.loaded()
    assert info.engine == "onnx", registry.explain("A")
    assert size + 10_000 < info.size_bytes < 3 * size + (256 << 10)
    assert registry.stats().bytes_resident == registry.stats().workers[0].charged_bytes == info.size_bytes
    assert "ONNX Runtime" in registry.explain("A")
    alone = [await registry.predict("A", row) for row in zoo.rows(40)]
    assert np.concatenate(alone).tobytes() == before.tobytes()


@needs_onnx
async def test_a_model_that_would_answer_otherwise_stays_as_it_is(make_registry: MakeRegistry) -> None:
    """What was claimed for it is given back, and explain() says why."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model("multiclass").ubj}), engine="auto")
    size = (await registry.load("A")).size_bytes
    await ask(registry)
    assert entry_of(registry).size > size, "claimed before the worker is told"
    await settled(registry)
    (info,) = registry.loaded()
    assert (info.engine, info.size_bytes) == ("predictor", size)
    assert "no second engine" in registry.explain("A")


@needs_onnx
async def test_no_model_is_evicted_for_a_second_engine(make_registry: MakeRegistry) -> None:
    """Where bytes are not free, the model stays as it is, and is looked at again after as many calls."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model().ubj}), engine="auto")
    size = (await registry.load("A")).size_bytes
    registry.resize(2 * size)
    await ask(registry)
    assert entry_of(registry).size == size
    registry.resize("64 MiB")
    await ask(registry)
    await settled(registry)
    assert registry.loaded()[0].engine == "onnx"


@needs_onnx
async def test_calls_of_many_rows_earn_nothing(make_registry: MakeRegistry) -> None:
    """XGBoost is the faster one for them."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model().ubj}), engine="auto")
    await ask(registry, rows=zoo.rows(17))
    assert entry_of(registry).value.small_calls == 0


@needs_onnx
async def test_rows_with_names_are_compared_in_the_models_order(make_registry: MakeRegistry) -> None:
    """The rows that the worker gets are those that it was asked."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model(names=True).ubj}), engine="auto")
    frame = pd.DataFrame(zoo.rows(1), columns=list(zoo.FEATURES))[list(reversed(zoo.FEATURES))]
    await ask(registry, calls=EARNED - 1, rows=frame)
    assert entry_of(registry).value.rare.rows_kept[-1] == zoo.rows(1).tobytes()


@needs_onnx
async def test_a_model_may_leave_while_it_is_to_be_converted(make_registry: MakeRegistry) -> None:
    """All that was charged for it is free then."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model().ubj}), engine="auto")
    await ask(registry)
    await registry.unload("A")
    stats = registry.stats()
    assert (stats.bytes_resident, stats.bytes_unloading, stats.workers[0].charged_bytes) == (0, 0, 0)


@needs_onnx
async def test_a_worker_may_end_while_it_is_to_convert(make_registry: MakeRegistry) -> None:
    """Rule P1: the model comes back lazily, with one engine."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model().ubj}), engine="auto")
    await ask(registry)
    registry._pool.workers[0].process.kill()
    await registry.predict("A", zoo.rows(1))
    assert registry.loaded()[0].engine == "predictor"


async def test_without_auto_nothing_is_converted(make_registry: MakeRegistry) -> None:
    """The default is one engine, and calls are not counted for another."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model().ubj}))
    await ask(registry)
    assert registry.loaded()[0].engine == "predictor"
    assert entry_of(registry).value.small_calls == 0


@pytest.mark.parametrize("options", [{"engine": "fast"}, {"engine": "auto", "predictor": "odd:Odd"}])
def test_an_engine_that_cannot_be_is_refused_at_once(options: dict[str, Any]) -> None:
    """An unknown name, and auto beside a predictor of one's own."""
    with pytest.raises(ValueError, match="engine"):
        ModelRegistry(MemoryStore(), **options)


def test_auto_without_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not silently as if it had not been asked for."""
    monkeypatch.setattr(modelcache.registry, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"modelcache\[onnx\]"):
        ModelRegistry(MemoryStore(), engine="auto")


@needs_onnx
async def test_a_conversion_that_ends_its_worker_is_not_tried_again(make_registry: MakeRegistry) -> None:
    """A3: the conversion is to blame and not the calls, and the model serves on with XGBoost."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model().ubj}), engine="auto")
    await registry.load("A")
    worker = registry._pool.workers[0]
    worker._lanes.box.converting = entry_of(registry).value.number
    os.kill(worker.pid, signal.SIGSEGV)
    while not worker.gone:
        await asyncio.sleep(0)
    await ask(registry)
    await settled(registry)
    (info,) = registry.loaded()
    assert info.engine == "predictor"
    assert "a worker ended when it was converted" in registry.explain("A")
    assert not registry._loader.quarantine._crashes


@needs_onnx
async def test_a_reload_claims_what_the_model_takes_without_its_engine(make_registry: MakeRegistry) -> None:
    """L2: a model that had a second engine comes back where there is room for it alone."""
    registry = await make_registry(MemoryStore({"A.ubj": zoo.model(trees=100).ubj}), engine="auto")
    size = (await registry.load("A")).size_bytes
    await ask(registry)
    await settled(registry)
    assert registry.loaded()[0].size_bytes > 2 * size
    await registry.unload("A")
    registry.resize(int(1.2 * size))
    assert (await registry.load("A")).size_bytes < 1.2 * size


@needs_onnx
async def test_margins_that_xgboost_clamps(make_registry: MakeRegistry) -> None:
    """A5: beyond 88.7 the sigmoid stays what it is there."""
    booster = zoo.model("binary", trees=10).booster
    document = json.loads(booster.save_raw("json"))
    for tree in document["learner"]["gradient_booster"]["model"]["trees"]:
        leaves = [child < 0 for child in tree["left_children"]]
        tree["split_conditions"] = [
            1000 * value if is_leaf else value for value, is_leaf in zip(tree["split_conditions"], leaves, strict=True)
        ]
    registry = await make_registry(MemoryStore({"A.json": json.dumps(document).encode()}), engine="auto")
    before = [await registry.predict("A", row) for row in zoo.rows(40)]
    assert min(float(value[0]) for value in before) < 1e-37
    await ask(registry, rows=zoo.rows(1))
    await settled(registry)
    assert registry.loaded()[0].engine == "onnx", registry.explain("A")
    after = [await registry.predict("A", row) for row in zoo.rows(40)]
    assert np.concatenate(after).tobytes() == np.concatenate(before).tobytes()
