"""A version that was loaded before is loaded again for what it was measured to take, not for an upper bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

import zoo
from modelcache import MemoryStore, ModelEvicted

if TYPE_CHECKING:
    from conftest import MakeRegistry


async def test_a_reload_evicts_one_model_of_its_size(make_registry: MakeRegistry) -> None:
    """L2: among models of one size, the reload of an evicted one makes one other leave, not two."""
    names = [f"m{number}" for number in range(6)]
    model = zoo.model(trees=60)
    registry = await make_registry(MemoryStore({f"{name}.ubj": model.ubj for name in names}), policy="lru")
    sizes = [(await registry.load(name)).size_bytes for name in names]
    registry.resize(int(max(sizes) * 3.2))
    evicted: list[str] = []
    registry.subscribe(lambda event: evicted.append(event.name) if isinstance(event, ModelEvicted) else None)
    for name in names * 2:
        before = len(evicted)
        await registry.load(name)
        assert len(evicted) - before <= 1
    assert evicted
