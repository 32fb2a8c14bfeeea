"""Artifacts go from the store to a worker as they come: the parent holds a few chunks, however large they are."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import psutil

import odd
from modelcache import Artifact, NotModified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from conftest import MakeRegistry

MIB = 1 << 20
LARGE = 500 * MIB


class Large:
    """A store of one artifact, which it makes as it is asked for, and weighs this process meanwhile."""

    def __init__(self) -> None:
        self.most = 0

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        return Artifact(version="1", size=LARGE, suffix=".ubj", chunks=self.chunks())

    async def chunks(self) -> AsyncIterator[bytes]:
        script = odd.artifact()
        yield script + b" " * (MIB - len(script))
        for _ in range(LARGE // MIB - 1):
            await asyncio.to_thread(self.weigh)
            yield b" " * MIB

    def weigh(self) -> None:
        self.most = max(self.most, psutil.Process().memory_info().rss)

    async def close(self) -> None:
        pass


async def test_the_parent_never_holds_a_whole_artifact(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """Half a gigabyte passes through, to the worker and to its copy on the disk, and 32 MiB are not exceeded."""
    store = Large()
    registry = await make_registry(store, predictor=odd.ODD, memory_budget="2 GiB", disk_cache=tmp_path)
    before = psutil.Process().memory_info().rss
    answer = await registry.predict("m", [[odd.PREDICT, 2.0]])
    await asyncio.to_thread(store.weigh)
    assert np.array_equal(answer, np.array([4], np.float32))
    assert store.most - before < 32 * MIB
