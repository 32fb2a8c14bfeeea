"""What the parent keeps of each model: the names that a process knows may be very many."""

from __future__ import annotations

import gc
import tracemalloc
from typing import TYPE_CHECKING

import pytest

import zoo
from conftest import settle
from modelcache import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeRegistry
    from modelcache import ModelRegistry

pytestmark = pytest.mark.anyio

NAMES = [f"tenant/m{index:04}" for index in range(520)]
WARM_UP, COUNTED = NAMES[:20], NAMES[20:]
ROWS = zoo.rows(1)

AIM = 1024
"""Bytes beyond the name."""


@pytest.fixture
def traced() -> Iterator[None]:
    yield
    tracemalloc.stop()


async def registry_of(make_registry: MakeRegistry) -> ModelRegistry:
    """A registry whose first loads are over, and with them all that is done once."""
    artifact = zoo.model(names=True).ubj
    registry = await make_registry(MemoryStore({f"{name}.ubj": artifact for name in NAMES}))
    for name in WARM_UP:
        await registry.predict(name, ROWS)
    gc.collect()
    tracemalloc.start()
    return registry


async def call_each_twice(registry: ModelRegistry) -> None:
    for _ in range(2):
        for name in COUNTED:
            await registry.predict(name, ROWS)


def bytes_per_model() -> float:
    gc.collect()
    return tracemalloc.get_traced_memory()[0] / len(COUNTED)


@pytest.mark.usefixtures("traced")
async def test_a_resident_model_takes_under_a_kibibyte_of_the_parent(make_registry: MakeRegistry) -> None:
    """Its entry, its place in the tables and its rank; what is the same for all models is there once."""
    registry = await registry_of(make_registry)
    await call_each_twice(registry)
    assert len(registry.loaded()) == len(NAMES)
    assert bytes_per_model() < AIM


@pytest.mark.usefixtures("traced")
async def test_an_evicted_model_takes_under_a_kibibyte_of_the_parent(make_registry: MakeRegistry) -> None:
    """What explain() tells of it, and what its next load is to know."""
    registry = await registry_of(make_registry)
    await call_each_twice(registry)
    registry.resize((await registry.load(NAMES[0])).size_bytes)
    while registry.stats().bytes_unloading:
        await settle()
    assert len(registry.loaded()) == 1
    assert "it was evicted" in registry.explain(COUNTED[-1])
    assert bytes_per_model() < AIM
