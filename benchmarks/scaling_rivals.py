"""Calls that keep a processor busy: modelcache with one worker and with two, and what one would write by hand.

``python benchmarks/scaling_rivals.py KEY FOLDER`` serves orders from standard input, as rivals.py does. ``heat`` asks
the hot model until a worker of its own is not all it has, the others ask and measure.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import psutil

from harness import Question, closed_loop, figures, for_a_while, standard_input, tell
from models import HOT, read_questions
from rivals import Direct, ModelCacheArray, Rival, Threads

CLIENTS = 16
_LOOK = 0.25
"""Seconds between two looks for a copy."""


class OneWorker(ModelCacheArray):
    """One process predicts, and the app's own only asks."""

    label = "modelcache, 1 worker"
    workers: ClassVar[int] = 1

    async def start(self) -> None:
        """Start the registry and its workers."""
        from modelcache import ModelRegistry

        self._registry = ModelRegistry(self.folder, workers=self.workers)
        await self._registry.start()

    def copies(self) -> tuple[int, int]:
        """Return how many copies there are of models in further workers, and the bytes that they take."""
        stats = self._registry.stats()
        return stats.copies, stats.bytes_resident - sum(info.size_bytes for info in self._registry.loaded())


class TwoWorkers(OneWorker):
    """Two do."""

    label = "modelcache, 2 workers"
    workers = 2


RIVALS: dict[str, type[Rival]] = {
    "modelcache-1": OneWorker,
    "modelcache-2": TwoWorkers,
    "to_thread": Threads,
    "direct": Direct,
}
"""By the key they have in results."""


class Serving:
    """Obeys orders with the questions of one rival."""

    def __init__(self, rival: Rival, folder: Path) -> None:
        self._rival = rival
        self._questions = [Question(name, rows, expected) for name, rows, expected in read_questions(folder, HOT)]

    async def heat(self, *, patience: float) -> dict[str, Any]:
        """Call the hot model until there is a copy of it, for ``patience`` seconds at most."""
        rival, started = self._rival, perf_counter()
        if isinstance(rival, TwoWorkers):
            end = started + patience
            while perf_counter() < end and not rival.copies()[0]:  # not after each call: it takes half as long as one
                await closed_loop(rival, for_a_while(self._of(1), _LOOK), CLIENTS)
        copies, size = rival.copies() if isinstance(rival, OneWorker) else (0, 0)
        return {"seconds": round(perf_counter() - started, 2), "copies": copies, "bytes": size}

    async def ask(self, *, models: int, clients: int, times: int, seconds: float, warm_up: float) -> dict[str, Any]:
        """Ask so many models, and report the calls, and the share of one processor that each process has used.

        A call has ``times`` the rows of a question.
        """
        questions = [question.times(times) for question in self._of(models)]
        await closed_loop(self._rival, for_a_while(questions, warm_up), clients)
        parent, workers = time.process_time(), _cpu_of_children()
        record = await closed_loop(self._rival, for_a_while(questions, seconds), clients)
        parent, workers = time.process_time() - parent, _cpu_of_children() - workers
        shares = {"parent_share": parent / record.elapsed, "workers_share": workers / record.elapsed}
        return {**figures(self._rival, record, parent + workers), **shares}

    def _of(self, models: int) -> list[Question]:
        names = list(dict.fromkeys(question.name for question in self._questions))[:models]
        return [question for question in self._questions if question.name in names]


def _cpu_of_children() -> float:
    """Return their processor time, which the system counts in steps of 10 ms."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in children)


async def serve(rival: Rival, folder: Path) -> None:
    """Start ``rival`` and run orders until standard input ends."""
    started = perf_counter()
    await rival.start()
    serving = Serving(rival, folder)
    orders = await standard_input()
    tell({"ready": perf_counter() - started})
    try:
        while line := await orders.readline():
            order = json.loads(line)
            tell(await getattr(serving, order.pop("do"))(**order))
    finally:
        await rival.close()


if __name__ == "__main__":
    asyncio.run(serve(RIVALS[sys.argv[1]](Path(sys.argv[2])), Path(sys.argv[2])))
