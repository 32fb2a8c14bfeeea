"""Predictors from outside: their own formats, and imports from the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import plugin
import zoo
from modelcache import CorruptArtifactError, InvalidInputError, MemoryStore
from modelcache.testing import check_predictor

if TYPE_CHECKING:
    from conftest import MakeRegistry

ROWS = [[1.0, 10.0], [2.0, 20.0]]


def test_it_keeps_the_contract() -> None:
    """A predictor of another library passes the suite that is shipped."""
    check_predictor(lambda: (plugin.Scaled, plugin.artifact()))


@pytest.mark.parametrize("file", ["raw.ubj", "packed.tar.gz"])
async def test_it_reads_its_own_format(make_registry: MakeRegistry, file: str) -> None:
    """What is no XGBoost model goes to a predictor as it is, out of an archive too."""
    data = plugin.artifact() if file == "raw.ubj" else zoo.pack({"factors.npz": plugin.artifact()})
    registry = await make_registry(MemoryStore({file: data}), predictor="plugin:Scaled")
    assert np.array_equal(await registry.predict(file, ROWS), np.array([32.0, 64.0], np.float32))
    assert registry.loaded()[0].format == "other"


async def test_its_errors_reach_the_caller(make_registry: MakeRegistry) -> None:
    """A predictor may raise the package's errors, whose module a worker does not import otherwise."""
    registry = await make_registry(
        MemoryStore({"good.ubj": plugin.artifact(), "bad.ubj": b"no zip"}), predictor="plugin:Scaled"
    )
    with pytest.raises(CorruptArtifactError, match="no factors"):
        await registry.predict("bad", ROWS)
    with pytest.raises(InvalidInputError, match="there is no leaf"):
        await registry.predict("good", ROWS, output="leaf")


async def test_an_archive_of_two_files_is_refused(make_registry: MakeRegistry) -> None:
    """A1: which of two files is the model is not guessed for another predictor either."""
    data = zoo.pack({"one.npz": plugin.artifact(), "two.npz": plugin.artifact()})
    registry = await make_registry(MemoryStore({"m.tar.gz": data}), predictor="plugin:Scaled")
    with pytest.raises(Exception, match=r"one\.npz.*two\.npz"):
        await registry.predict("m", ROWS)
