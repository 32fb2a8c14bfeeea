"""Where the time of a warm one-row call goes, item by item.

    python benchmarks/budget.py            half a minute; writes benchmarks/results/budget.{json,md,png}
    python benchmarks/budget.py --quick    seconds; shows that it works

One client asks ten small models in turn, one worker answers. The clock is read where the call passes from one hand to
the next: in the caller, where the parent writes to the worker, around XGBoost in the worker, where the parent has read
the answer, and in the caller again. Reading it costs a microsecond a call, which is in the figures. In the same rounds:
the same call without any clock, an echo between two processes, XGBoost called directly, and the processor time that
parent and worker take for a call. All processes of a host share the clock.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

import report
from command import make_parser, parse, publish
from models import ENVIRONMENT, NAMES, ONE, as_lists, make_fleet, read_questions
from plots import plot_budget
from rivals import Direct, Echo
from timed_predictor import LOG_SIZE, log_path, read_log

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from modelcache import ModelRegistry

ITEMS = (
    "parent: the call, until its rows are written",
    "until XGBoost begins: the worker wakes up, reads, stages the row",
    "XGBoost's C call, and copying its answer",
    "until the parent reads: the worker answers, the parent wakes up",
    "parent: until the caller goes on",
)
YARDSTICKS = {
    "whole": "the same call without the clocks",
    "echo": "64 bytes to another process and back",
    "direct": "inplace_predict in this process",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    calls: int
    """Of each rival in a round."""


FULL = Plan(rounds=9, calls=LOG_SIZE)
QUICK = Plan(rounds=2, calls=100)


def main() -> None:
    """Measure, report, write."""
    options = parse(make_parser(__doc__), FULL, QUICK)
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="modelcache-budget-") as folder:
        make_fleet(Path(folder))
        results = asyncio.run(measure(Path(folder), rounds=options.plan.rounds, calls=options.plan.calls))
    table = make_table(results)
    publish(
        "budget", results, [table], (),
        page=_page(results, table), plot=plot_budget, folder=options.output,
    )  # fmt: skip


async def measure(folder: Path, *, rounds: int, calls: int) -> dict[str, Any]:
    """Return the medians of each round."""
    from modelcache import ModelRegistry  # noqa: PLC0415 - after the environment is set

    questions = [(name, as_lists(rows)) for name, rows, _ in read_questions(folder, ONE)][: len(NAMES)]
    arrays = [rows for _, rows, _ in read_questions(folder, ONE)]
    echo, direct = Echo(folder), Direct(folder)
    await echo.start()
    results = report.environment("modelcache", "xgboost-cpu", "numpy") | {"benchmark": "budget"}
    seen: dict[str, list[float]] = {}
    try:
        async with (
            ModelRegistry(folder, workers=1, predictor="timed_predictor:TimedPredictor") as timed,
            ModelRegistry(folder, workers=1) as plain,
        ):
            stopwatch = Stopwatch(timed)
            actions: dict[str, Callable[[int], Awaitable[object]]] = {
                "whole": lambda index: plain.predict(*questions[index % len(questions)]),
                "echo": lambda _: echo.predict("", b"x" * 64),
                "direct": lambda index: direct.predict(NAMES[index % len(NAMES)], arrays[index % len(NAMES)]),
            }
            for number in range(rounds + 1):  # the first loads, and is not kept
                found = await stopwatch.items(questions, calls) | {
                    key: await _median(action, calls) for key, action in actions.items()
                }
                found |= await _processor_time(plain, actions["whole"], calls)
                for key, microseconds in found.items() if number else ():
                    seen.setdefault(key, []).append(microseconds)
    finally:
        await echo.close()
    return results | {"settings": {"rounds": rounds, "calls": calls}, "microseconds": {
        key: report.summary(values) for key, values in seen.items()
    }}  # fmt: skip


async def _median(action: Callable[[int], Awaitable[object]], calls: int) -> float:
    seconds = []
    for index in range(calls):
        started = perf_counter()
        await action(index)
        seconds.append(perf_counter() - started)
    return float(np.median(seconds)) * 1e6


async def _processor_time(
    registry: ModelRegistry, action: Callable[[int], Awaitable[object]], calls: int
) -> dict[str, float]:
    """Return the processor time per call of this process and of the worker."""
    process = registry._pool.workers[0].process  # noqa: SLF001 - no one else can say
    mine, workers = time.process_time(), process.cpu_seconds()
    for index in range(calls):
        await action(index)
    return {
        "parent_cpu": (time.process_time() - mine) / calls * 1e6,
        "worker_cpu": (process.cpu_seconds() - workers) / calls * 1e6,
    }


class Stopwatch:
    """Reads the clock in the parent of ``registry`` where a call passes; the worker's readings are in its log."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        requests: Any = registry._pool.workers[0].requests  # noqa: SLF001 - what is measured is inside
        self._pid = registry._pool.workers[0].pid  # noqa: SLF001
        self._written = self._read = 0.0
        write, received = requests._write, requests.buffer_updated  # noqa: SLF001

        def timed_write(data: bytes) -> None:
            write(data)
            self._written = perf_counter()

        def timed_received(nbytes: int) -> None:
            self._read = perf_counter()
            received(nbytes)

        requests._write, requests.buffer_updated = timed_write, timed_received  # noqa: SLF001

    async def items(self, questions: list[tuple[str, Any]], calls: int) -> dict[str, float]:
        """Make ``calls`` calls, and return the median of each item in microseconds."""
        marks = []
        for index in range(calls):
            started = perf_counter()
            await self._registry.predict(*questions[index % len(questions)])
            marks.append((started, self._written, self._read, perf_counter()))
        worker = read_log(log_path(self._pid), calls)
        started_at, written, read, ended = np.array(marks).T
        # On a busy machine, who is woken up by a write may be at work before the writer reads the clock.
        passed = np.maximum.accumulate(np.column_stack([started_at, written, worker, read, ended]), axis=1)
        return dict(zip(ITEMS, np.median(np.diff(passed), axis=0) * 1e6, strict=True))


def make_table(results: dict[str, Any]) -> report.Table:
    """Return the items, what they come to, and what they are to be compared with."""
    seen = results["microseconds"]
    total = sum(seen[item]["median"] for item in ITEMS)
    rows = [(item, *_figures(seen[item])) for item in ITEMS]
    rows.append(("all of these", report.short(total), "", ""))
    rows += [(label, *_figures(seen[key])) for key, label in YARDSTICKS.items()]
    rows.append(("processor time of the parent, for a call", *_figures(seen["parent_cpu"])))
    rows.append(("processor time of the worker, for a call", *_figures(seen["worker_cpu"])))
    return report.Table("A warm call of one row, one client", ("", "µs", "least", "most"), rows)


def _figures(seen: dict[str, Any]) -> tuple[str, ...]:
    return tuple(report.short(seen[figure]) for figure in ("median", "min", "max"))


def _page(results: dict[str, Any], table: report.Table) -> str:
    settings = results["settings"]
    notes = (
        f"Medians of {settings['rounds']} rounds, each of {settings['calls']:,} calls; least and most of the rounds. "
        "What to make of them is in docs/performance.md."
    )
    return (
        "\n\n".join(["## Budget of a call", report.describe(results), "![plot](budget.png)", table.markdown(), notes])
        + "\n"
    )


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    main()
