"""A worker that is told to give a model a second engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zoo
from lone_worker import LoneWorker
from modelcache.pool import wire

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def worker() -> Iterator[LoneWorker]:
    worker = LoneWorker()
    yield worker
    worker.close()


def few_bits(values: Any) -> bytes:
    return np.asarray(values, np.float32).tobytes()


def test_a_second_engine_answers_as_the_first(worker: LoneWorker) -> None:
    """CONVERT is answered when there is nothing else to do, and the model's answers stay the same, bit for bit."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    worker.load(1, zoo.model("binary").ubj)
    rows = zoo.rows(8)
    before = [worker.values(call, 1, row[None]) for call, row in enumerate(rows)]
    worker.command(wire.CONVERT, 1, 1 << 20, few_bits(rows[:4]))
    report = worker.report()
    assert (report.kind, report.model, report.facts) == (wire.CONVERTED, 1, {"refusal": None})
    assert 10_000 < report.number < 1 << 20
    after = [worker.values(call, 1, row[None]) for call, row in enumerate(rows)]
    assert few_bits(before) == few_bits(after)


@pytest.mark.parametrize(("kind", "why"), [("multiclass", "multi:softprob"), ("linear", "gblinear")])
def test_a_model_that_cannot_be_converted_stays_as_it_is(worker: LoneWorker, kind: str, why: str) -> None:
    """CONVERTED says why, takes no bytes, and the model answers on."""
    worker.load(1, zoo.model(kind).ubj)
    before = worker.values(1, 1, zoo.rows(1))
    worker.command(wire.CONVERT, 1, 1 << 20, few_bits(zoo.rows(1)))
    report = worker.report()
    assert (report.kind, report.number) == (wire.CONVERTED, 0)
    assert "onnxruntime" in report.facts["refusal"] or why in report.facts["refusal"]
    assert np.array_equal(worker.values(2, 1, zoo.rows(1)), before)


def test_a_second_engine_that_takes_more_than_allowed_is_dropped(worker: LoneWorker) -> None:
    """Rule L1: the bytes are claimed before, so no more than those may be taken."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    worker.load(1, zoo.model().ubj)
    worker.command(wire.CONVERT, 1, 1_000, few_bits(zoo.rows(1)))
    report = worker.report()
    assert report.number == 0
    assert "more than 1,000" in report.facts["refusal"]


def test_a_model_that_leaves_is_not_converted(worker: LoneWorker) -> None:
    """UNLOAD takes back what was ordered before: CONVERTED does not come."""
    worker.load(1, zoo.model().ubj)
    frames = [wire.ARTIFACT.pack(24, wire.CONVERT, 0, 0, 1, 1 << 20), bytes(24)]
    worker.artifacts.sendall(b"".join([*frames, wire.ARTIFACT.pack(0, wire.UNLOAD, 0, 0, 1, 0)]))
    assert worker.report().kind == wire.UNLOADED
    worker.command(wire.MEASURE, 0)
    assert worker.report().kind == wire.HEAP
