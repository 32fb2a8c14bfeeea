"""Send damaged artifacts through a real registry with real workers: ``python tests/fuzz_artifacts.py --count 100000``.

Every input has to end in predictions or in a typed error, the registry has to count right and answer right after each
batch, and nothing may be left of it.

The mutations are our own (mutations.py), neither those of atheris nor hypothesis: nearly all of the code under test is
XGBoost's parser, which is not built for coverage feedback and runs in another process. What counts is inputs a second,
and that the structure survives the damage. An input is found again by its number (``--seed 3 --start 17 --count 1``).

Damaged models make XGBoost ask for gigabytes, and the machine pays: the address space is limited before anything else.
The limit is inherited by the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import resource
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

import oracle
import zoo
from modelcache import Artifact, ModelCacheError, ModelNotFoundError, ModelRegistry, NotModified, WorkerCrashedError
from mutations import mutant, sound_answers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

ROWS = zoo.rows(3)
GOOD = "good"
AT_ONCE = 4
CRASH = "WorkerCrashedError"
EXPECTED = zoo.model().expected(ROWS)
SOUND = sound_answers(ROWS)


class Mutants:
    """Serves the damaged artifact of a number, and one good model."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact of a number, in chunks of odd sizes."""
        if name == GOOD:
            return _artifact(".ubj", zoo.model().ubj)
        if not name.isdecimal():
            raise ModelNotFoundError("Names are numbers here.", model=name)
        made = mutant(self.seed, int(name))
        return _artifact(made.suffix, made.data)

    async def close(self) -> None:
        """Nothing to release."""


def _artifact(suffix: str, data: bytes) -> Artifact:
    async def chunks() -> AsyncIterator[bytes]:
        size = 1 + len(data) * 7 // 17
        for start in range(0, len(data), size):
            yield data[start : start + size]

    return Artifact(version="1", size=len(data), suffix=suffix, chunks=chunks())


class Tally:
    """What became of the inputs."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.by_damage: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.crashes: list[int] = []
        self.slow: list[tuple[int, float]] = []
        self.bystanders = 0

    def add(self, number: int, done: str, outcome: str, seconds: float) -> None:
        """Count one."""
        self.outcomes[outcome] += 1
        self.by_damage[f"{re.split('[,+]', done)[0]}: {outcome}"] += 1
        if outcome == CRASH:
            self.crashes.append(number)
        elif seconds > 2:
            self.slow.append((number, round(seconds, 1)))


async def _try(registry: ModelRegistry, seed: int, number: int, tally: Tally, *, again: bool = False) -> bool:
    """Predict with one damaged model: float32 of the right shape, or a typed error; anything else ends the run.

    Return False if it has to be tried again alone: its worker has ended, which another may have been the cause of.
    """
    started = time.perf_counter()
    try:
        answer = await registry.predict(str(number), ROWS, timeout=60)
        assert answer.dtype == np.float32 and answer.ndim in (1, 2) and len(answer) == len(ROWS), answer
        outcome = "predictions" if answer.tobytes() in SOUND else "other predictions"
        tally.bystanders += again
    except WorkerCrashedError:
        if not again:
            return False
        outcome = CRASH
    except ModelCacheError as error:
        outcome = CRASH if "has crashed two workers" in str(error) else type(error).__name__
        tally.bystanders += again and outcome != CRASH
        tally.messages[" ".join(str(error).split()[:12])[:90]] += 1
    tally.add(number, mutant(seed, number).done, outcome, time.perf_counter() - started)
    return True


async def _try_all(registry: ModelRegistry, seed: int, numbers: Iterable[int], tally: Tally) -> None:
    left, alone = iter(numbers), []

    async def work() -> None:
        for number in left:
            if not await _try(registry, seed, number, tally):
                alone.append(number)  # noqa: PERF401 - the iterator is shared by all who work

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())
    for number in alone:
        await _try(registry, seed, number, tally, again=True)


async def _run(seed: int, start: int, count: int, batch: int, tally: Tally) -> dict[str, Any]:
    """Try ``count`` inputs with one registry, and check it after each batch and in the end."""
    descriptors = oracle.open_descriptors()
    async with ModelRegistry(
        Mutants(seed), memory_budget="64 MiB", workers=2, load_timeout=20, failure_ttl=0
    ) as registry:
        for first in range(start, start + count, batch):
            numbers = range(first, min(first + batch, start + count))
            await _try_all(registry, seed, numbers, tally)
            assert np.array_equal(await registry.predict(GOOD, ROWS), EXPECTED)
            oracle.check(registry)
        for model in registry.loaded():
            await registry.unload(model.name)
        restarts = registry.stats().worker_restarts
        sizes = [_resident_bytes(child) for child in psutil.Process().children()]
    oracle.check_gone(registry)
    assert not psutil.Process().children(recursive=True), "a process is left"
    await asyncio.sleep(0)
    assert oracle.open_descriptors() <= descriptors, "a descriptor is left"
    return {"worker_restarts": restarts, "worker_rss_mb": sizes, "parent_rss_mb": _resident_bytes(psutil.Process())}


def _resident_bytes(process: psutil.Process) -> int:
    return int(process.memory_info().rss) >> 20


def main() -> None:
    """Run shards of inputs, each with a registry of its own; print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--shard", type=int, default=5_000, help="inputs for each registry")
    parser.add_argument("--batch", type=int, default=250, help="inputs between two checks")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="address space of each process")
    given = parser.parse_args()
    limit = int(given.gigabytes * (1 << 30))
    logging.disable()  # thousands of workers end, which is the point
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for start in range(given.start, given.start + given.count, given.shard):
        count = min(given.shard, given.start + given.count - start)
        tally, started = Tally(), time.perf_counter()
        facts = asyncio.run(_run(given.seed, start, count, given.batch, tally))
        line = {
            "seed": given.seed, "start": start, "count": count, "seconds": round(time.perf_counter() - started, 1),
            "outcomes": dict(tally.outcomes.most_common()), **facts, "bystanders": tally.bystanders,
            "crashes": tally.crashes, "slow": tally.slow,
            "by_damage": dict(tally.by_damage.most_common()), "messages": dict(tally.messages.most_common(60)),
        }  # fmt: skip
        print(json.dumps(line), flush=True)  # noqa: T201 - a script
        assert sum(tally.outcomes.values()) == count


if __name__ == "__main__":
    main()
