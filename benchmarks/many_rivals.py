"""The rivals of many_models.py, each with a number of models resident: ``many_rivals.py KEY:COUNT FOLDER``."""
# ruff: noqa: PLC0415

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from harness import Question, closed_loop, for_a_while, measured, standard_input, tell
from models import NAMES, ONE, read_questions
from rivals import Direct, ModelCache, Rival, Threads, load_booster

SPREADS = ("ten", "uniform", "zipf")
"""Which models are asked: the same ten, all alike, or the n-th 1/n as often as the first."""

_ASKED = 20_000
"""Calls until the same sequence begins again."""

_LOADED_AT_ONCE = 500

_READINGS = 10
"""Of the memory, over which a line is laid: tables grow in steps, and so do the arenas of threads that read files."""


def names_of(count: int) -> list[str]:
    """Return the names of that many models, each of which is a copy of one of ten."""
    return [f"{NAMES[index % len(NAMES)]}_{index:05}" for index in range(count)]


class DirectMany(Direct):
    """The dict of boosters that a user would write, filled beforehand."""

    async def load(self, names: list[str]) -> None:
        """Make all resident."""
        self.boosters |= {name: load_booster(self.folder, name) for name in names}


class ThreadsMany(DirectMany, Threads):
    """The same, asked in threads."""

    label = Threads.label
    blocks = False
    predict = Threads.predict


class ModelCacheMany(ModelCache):
    """modelcache with room for all."""

    async def start(self) -> None:
        """Start the registry and its workers."""
        from modelcache import ModelRegistry

        self._registry = ModelRegistry(self.folder, memory_budget="8 GiB")
        await self._registry.start()

    async def load(self, names: list[str]) -> None:
        """Make all resident."""
        # In parts, and counted, not listed: a description of each model takes as much as what is kept of it.
        resident = self._registry.stats().models
        for start in range(0, len(names), _LOADED_AT_ONCE):
            await self._registry.preload(names[start : start + _LOADED_AT_ONCE])
        assert self._registry.stats().models == resident + len(names)


RIVALS: dict[str, type[DirectMany | ModelCacheMany]] = {
    "modelcache": ModelCacheMany,
    "to_thread": ThreadsMany,
    "direct": DirectMany,
}
"""By the key they have in commands and results."""


def _sequence(spread: str, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the indices of the models to be asked, one after another."""
    random = np.random.default_rng(count)
    if spread == "ten":
        return np.arange(len(NAMES))
    if spread == "uniform":
        return random.integers(0, count, _ASKED)
    weights = 1 / np.arange(1, count + 1)
    return random.choice(count, _ASKED, p=weights / weights.sum())


def _questions(rival: Rival, folder: Path, names: list[str], spread: str) -> list[Question]:
    """Return calls of the models of a spread, each with one of the rows that its original was asked."""
    asked: dict[str, list[tuple[Any, Any]]] = {}
    for name, rows, expected in read_questions(folder, ONE):
        asked.setdefault(name, []).append((rival.prepare(rows), expected))
    originals = [asked[name] for name in NAMES]
    return [
        Question(names[index], *originals[index % len(NAMES)][place % len(originals[0])])
        for place, index in enumerate(_sequence(spread, len(names)).tolist())
    ]


async def _load(rival: DirectMany | ModelCacheMany, names: list[str]) -> dict[str, float]:
    """Load everything, and report what that has taken; buffers and threads are there after the first half."""
    started = perf_counter()
    await rival.load(names[: len(names) // 2])
    seconds = perf_counter() - started
    models, grown = [len(names) // 2], [_resident_bytes()]
    step = max(1, len(names) // (2 * _READINGS))
    for start in range(len(names) // 2, len(names), step):
        part, started = names[start : start + step], perf_counter()
        await rival.load(part)
        seconds += perf_counter() - started
        models.append(start + len(part))
        grown.append(_resident_bytes())
    children = [child.memory_full_info() for child in psutil.Process().children(recursive=True)]
    return {
        "load_seconds": round(seconds, 2),
        "parent_bytes_per_model": round(float(np.polyfit(models, grown, 1)[0]), 1),
        "workers_pss_mb": round(sum(getattr(info, "pss", 0) for info in children) / 1e6, 1),
    }


def _resident_bytes() -> int:
    """Return what the process holds: what its allocator keeps for later, in arenas for 16 threads, is no model's."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


async def serve(rival: DirectMany | ModelCacheMany, folder: Path, count: int) -> None:
    """Start, load, and run orders until standard input ends."""
    await rival.start()
    names = names_of(count)
    kinds = {spread: _questions(rival, folder, names, spread) for spread in SPREADS}
    await rival.predict(NAMES[0], kinds["ten"][0].rows)  # what is done once is no model's
    orders = await standard_input()
    tell({"ready": 0.0})
    try:
        while line := await orders.readline():
            order = json.loads(line)
            tell(await _load(rival, names) if "load" in order else await _ask(rival, kinds[order["kind"]], order))
    finally:
        await rival.close()


async def _ask(rival: Rival, questions: list[Question], order: dict[str, Any]) -> dict[str, float]:
    await closed_loop(rival, for_a_while(questions, order["warm_up"]), order["concurrency"])
    return await measured(rival, for_a_while(questions, order["seconds"]), order["concurrency"])


if __name__ == "__main__":
    _key, _, _count = sys.argv[1].partition(":")
    asyncio.run(serve(RIVALS[_key](Path(sys.argv[2])), Path(sys.argv[2]), int(_count)))
