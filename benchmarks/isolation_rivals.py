"""Warm calls in a storm of cold loads: modelcache, and what one would write by hand.

``python benchmarks/isolation_rivals.py KEY FOLDER`` serves orders from standard input, as rivals.py does. In a storm
:data:`STORM` names that were never heard of are always being loaded, each by its first call; then it is unloaded.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import Question, closed_loop, cpu_seconds, figures, for_a_while, standard_input, tell
from models import ONE, cold_names, read_questions
from rivals import ModelCache, Processes, Rival, Threads, load_booster

if TYPE_CHECKING:
    from modelcache.stores.base import Artifact, NotModified

CLIENTS, STORM = 4, 8
"""Clients that call the warm models, and loads in flight beside them."""

AWAY = 0.05
"""Seconds that a fetch from a remote store takes."""


class Stormy(Rival):
    """A rival whose cold models come from a store that is ``away`` so many seconds."""

    away = 0.0

    async def predict_first(self, name: str, rows: Any) -> Any:
        """Answer the first call of a model."""
        await asyncio.sleep(self.away)
        return await self.predict(name, rows)

    async def unload(self, name: str) -> None:
        """Let a model leave."""
        raise NotImplementedError


class ThreadsInStorm(Threads, Stormy):
    """A dictionary of models, and threads for loads and calls."""

    label = "to_thread, dict"

    async def unload(self, name: str) -> None:
        """Let a model leave."""
        del self.boosters[name]


class ProcessesInStorm(Processes, Stormy):
    """A process pool, each process with a cache of its own, out of which each new model drives an old one."""

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, _predict, self.folder, name, rows)

    async def unload(self, name: str) -> None:
        """Leave that to the cache."""


def _predict(folder: Path, name: str, rows: Any) -> Any:
    return _cached_booster(folder, name).inplace_predict(rows)


@lru_cache(maxsize=32)
def _cached_booster(folder: Path, name: str) -> Any:
    return load_booster(folder, name)


class ModelCacheInStorm(ModelCache, Stormy):
    """``await registry.predict(name, rows)``, ``await registry.unload(name)``."""

    async def start(self) -> None:
        """Start the registry and its workers."""
        from modelcache import LocalStore, ModelRegistry  # noqa: PLC0415 - a rival imports what it needs

        rival = self

        class FarStore(LocalStore):
            """The folder, and as far away as the storm says."""

            async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
                await asyncio.sleep(rival.away)
                return await super().fetch(name, if_version=if_version)

        self._registry = ModelRegistry(FarStore(self.folder))
        await self._registry.start()

    async def predict_first(self, name: str, rows: Any) -> Any:
        """Answer the first call of a model."""
        return await self.predict(name, rows)

    async def unload(self, name: str) -> None:
        """Let a model leave; its bytes are free when this returns."""
        await self._registry.unload(name)


RIVALS: dict[str, type[Stormy]] = {
    "modelcache": ModelCacheInStorm,
    "to_thread": ThreadsInStorm,
    "process-pool": ProcessesInStorm,
}
"""By the key they have in results."""


class Storm:
    """First calls of one model after another, with questions whose answers are known."""

    def __init__(self, rival: Stormy, cold: list[Question]) -> None:
        self.loads = self.wrong = 0
        self._rival = rival
        self._cold = iter(cold)
        self._blows = True

    async def blow(self) -> None:
        """Load and unload until told to stop."""
        while self._blows:
            question = next(self._cold, None)
            if question is None:
                raise RuntimeError("The storm has loaded all names that there are: offer more.")
            answer = await self._rival.predict_first(question.name, question.rows)
            self.wrong += not self._rival.is_correct(answer, question.rows, question.expected)
            await self._rival.unload(question.name)
            self.loads += 1

    def stop(self) -> None:
        """Let each load under way be the last."""
        self._blows = False


class Serving:
    """Obeys orders with the questions of one rival."""

    def __init__(self, rival: Stormy, folder: Path) -> None:
        self._rival = rival
        self._warm = [
            Question(name, rival.prepare(rows), expected) for name, rows, expected in read_questions(folder, ONE)
        ]
        by_name = {question.name: question for question in self._warm}
        self._cold = [Question(new, by_name[name].rows, by_name[name].expected) for new, name in cold_names(folder)]

    async def ask(self, *, away: float | None, seconds: float, warm_up: float) -> dict[str, Any]:
        """Call the warm models, in a storm if it is said how far ``away`` its store is, and report."""
        storm = Storm(self._rival, self._cold)
        self._rival.away = away or 0.0
        blowing = [asyncio.create_task(storm.blow()) for _ in range(STORM if away is not None else 0)]
        await self._call(warm_up)
        before, loads = cpu_seconds(), storm.loads
        record = await self._call(seconds)
        used, loads = cpu_seconds() - before, storm.loads - loads
        storm.stop()
        await asyncio.gather(*blowing)
        found = figures(self._rival, record, used)
        self._cold = self._cold[storm.loads :]
        rare, longest = np.percentile(record.seconds, (99.9, 100)) * 1e6
        return {
            **found,
            "wrong": found["wrong"] + storm.wrong,
            "p999": round(float(rare), 2),
            "longest": round(float(longest), 2),
            "loads_per_second": round(loads / record.elapsed, 1),
            "cpu_share": round(used / record.elapsed, 3),
        }

    async def _call(self, seconds: float) -> Any:
        return await closed_loop(self._rival, for_a_while(self._warm, seconds), CLIENTS)


async def serve(rival: Stormy, folder: Path) -> None:
    """Start ``rival`` and run orders until standard input ends."""
    started = perf_counter()
    await rival.start()
    serving = Serving(rival, folder)
    orders = await standard_input()
    tell({"ready": perf_counter() - started})
    try:
        while line := await orders.readline():
            tell(await serving.ask(**json.loads(line)))
    finally:
        await rival.close()


if __name__ == "__main__":
    asyncio.run(serve(RIVALS[sys.argv[1]](Path(sys.argv[2])), Path(sys.argv[2])))
