"""A model that is replaced while it is called: the process that serves and calls it.

``python benchmarks/swapping.py KEY FOLDER`` takes orders from standard input, as harness.py does: ``begin`` lets the
callers call, ``refresh`` tells the registry that there is a new version, ``end`` stops the callers and reports.
The bucket is written by the process that gives the orders: what that costs is no part of serving.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cold_models import BUCKET, read_versions
from harness import standard_input, tell

if TYPE_CHECKING:
    from modelcache import ModelRegistry

NAME = "Replaced.ubj"
CALLERS = 8


class Swapping:
    """Callers in a closed loop, and what they have seen."""

    def __init__(self, registry: ModelRegistry, folder: Path) -> None:
        self._registry = registry
        self._row, answers = read_versions(folder)
        self._versions = {answer: version for version, answer in enumerate(answers.tolist())}
        self._current = self._newest = 0
        """The version that the last refresh has returned, and the one that the last was asked for."""
        self._callers: list[asyncio.Task[None]] = []
        self._calling = False
        self._seconds: list[float] = []
        self._stale = self._failed = 0

    async def begin(self) -> None:
        """Let the callers call."""
        self._seconds, self._stale, self._failed = [], 0, 0
        self._calling = True
        self._callers = [asyncio.create_task(self._call()) for _ in range(CALLERS)]

    async def _call(self) -> None:
        while self._calling:
            current, asked = self._current, perf_counter()
            try:
                answer = await self._registry.predict(NAME, self._row)
            except Exception as error:  # noqa: BLE001 - that none is raised is what is measured
                print(f"A call failed: {error!r}", file=sys.stderr)
                self._failed += 1
                continue
            self._seconds.append(perf_counter() - asked)
            version = self._versions.get(float(answer[0]), -1)
            self._stale += not current <= version <= self._newest

    async def refresh(self) -> dict[str, Any]:
        """Have the next version served; returns the seconds that took."""
        self._newest += 1
        started = perf_counter()
        await self._registry.refresh(NAME)
        self._current = self._newest
        return {"seconds": perf_counter() - started}

    async def end(self) -> dict[str, Any]:
        """Stop the callers, and return the seconds of each call, and how many failed or had an answer of no version."""
        self._calling = False
        await asyncio.gather(*self._callers)
        return {"calls": self._seconds, "stale": self._stale, "failed": self._failed}


async def serve(folder: Path) -> None:
    """Load the model, and run orders until standard input ends."""
    from modelcache import ModelRegistry  # noqa: PLC0415 - the parent imports this module, too

    started = perf_counter()
    async with ModelRegistry(f"s3://{BUCKET}") as registry:
        await registry.load(NAME)
        swapping = Swapping(registry, folder)
        orders = await standard_input()
        tell({"ready": perf_counter() - started})
        while line := await orders.readline():
            tell(await getattr(swapping, json.loads(line)["do"])() or {})


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[2])))
