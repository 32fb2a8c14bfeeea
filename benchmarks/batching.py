"""Batches of all sizes: the process of one rival, which serves and calls.

``python benchmarks/batching.py KEY FOLDER`` takes orders from standard input, as harness.py does: ``rows`` and
``columns`` of the calls to be made, by how many clients at once, for how many seconds. With ``beside`` it is another
client's calls of one row that are measured, first alone and then while calls of so many rows are made.
"""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import repeat, takewhile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from batch_models import COLUMNS, read_batch
from harness import Question, closed_loop, figures, for_a_while, measured, standard_input, tell
from rivals import RIVALS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rivals import Rival


class Batching:
    """A rival, and the questions that it can be asked."""

    def __init__(self, rival: Rival, folder: Path) -> None:
        self._rival = rival
        self._batches = {columns: read_batch(folder, columns) for columns in COLUMNS}

    def _question(self, columns: int, rows: int) -> Question:
        matrix, answers = self._batches[columns]
        return Question(str(columns), self._rival.prepare(matrix[:rows]), answers[:rows])

    async def obey(self, order: dict[str, Any]) -> dict[str, float]:
        """Make the calls that are ordered, and report."""
        question, seconds = self._question(order["columns"], order["rows"]), order["seconds"]
        if "beside" in order:
            return await self._isolation(question, self._question(order["columns"], order["beside"]), seconds)
        await closed_loop(self._rival, for_a_while([question], seconds / 4), order["concurrency"])
        return await measured(self._rival, for_a_while([question], seconds), order["concurrency"])

    async def _isolation(self, small: Question, large: Question, seconds: float) -> dict[str, float]:
        await closed_loop(self._rival, for_a_while([small], seconds / 4), 1)
        alone = await closed_loop(self._rival, for_a_while([small], seconds), 1)
        others = asyncio.create_task(closed_loop(self._rival, for_a_while([large], seconds), 1))
        beside = await closed_loop(self._rival, _while_true(small, lambda: not others.done()), 1)
        both = await others
        report = figures(self._rival, beside, 0.0)
        quiet = float(np.percentile(alone.seconds, 99)) * 1e6
        report["wrong"] += sum(figures(self._rival, record, 0.0)["wrong"] for record in (alone, both))
        return report | {"quiet_p99": round(quiet, 2), "large_p50": round(float(np.median(both.seconds)) * 1e6, 2)}


def _while_true(question: Question, condition: Callable[[], bool]) -> Iterator[Question]:
    yield question
    yield from takewhile(lambda _: condition(), repeat(question))


async def serve(rival: Rival, folder: Path) -> None:
    """Start ``rival`` and run orders until standard input ends."""
    started = perf_counter()
    await rival.start()
    batching = Batching(rival, folder)
    orders = await standard_input()
    tell({"ready": perf_counter() - started})
    try:
        while line := await orders.readline():
            tell(await batching.obey(json.loads(line)))
    finally:
        await rival.close()


if __name__ == "__main__":
    asyncio.run(serve(RIVALS[sys.argv[1]](Path(sys.argv[2])), Path(sys.argv[2])))
