"""The registry as its users call it, with real workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import zoo
from modelcache import MemoryStore

if TYPE_CHECKING:
    from conftest import MakeRegistry


async def test_a_first_call_loads_and_answers(make_registry: MakeRegistry) -> None:
    """A cold model is loaded by its first call, and the answer is XGBoost's own."""
    model = zoo.model()
    registry = await make_registry(MemoryStore({"Chicago_IL.tar.gz": model.targz}))
    rows = zoo.rows(3)
    assert np.array_equal(await registry.predict("Chicago_IL", rows), model.expected(rows))
    assert [info.name for info in registry.loaded()] == ["Chicago_IL"]
