"""Whether the store has a model, asked without a load."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from modelcache.errors import StoreError
from modelcache.names import split_suffix

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from modelcache import ModelRegistry


async def lists(registry: ModelRegistry, name: str) -> bool | None:
    """Say whether the store lists ``name``; None if it cannot list its models, or does not answer."""
    stem = split_suffix(name)[0]
    try:
        async with aclosing(cast("AsyncGenerator[str]", registry.names(stem))) as listing:
            async for found in listing:
                if found in (name, stem):
                    return True
    except StoreError:
        return None
    return False
