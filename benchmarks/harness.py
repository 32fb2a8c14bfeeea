"""Rivals in processes of their own, driven over pipes: one order, one report, each a line of JSON.

The child measures (:func:`serve`, :func:`closed_loop`), the parent decides whose turn it is (:class:`Contender`).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import psutil

from models import ENVIRONMENT, ROWS, read_questions
from open_loop import cost_of_refusals, open_loop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rivals import Rival

HERE = Path(__file__).resolve().parent


@dataclass
class Question:
    """One call to be made."""

    name: str
    rows: Any
    expected: np.ndarray[Any, np.dtype[np.float32]]

    def times(self, count: int) -> Question:
        """Return a call with all of its rows ``count`` times over."""
        return Question(self.name, np.tile(self.rows, (count, 1)), np.tile(self.expected, count))


@dataclass
class Record:
    """What happened to the calls of one run."""

    seconds: list[float] = field(default_factory=list)
    asked: list[Question] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    elapsed: float = 0.0


async def closed_loop(rival: Rival, questions: Iterator[Question], concurrency: int, *, pause: float = 0.0) -> Record:
    """Let ``concurrency`` clients ask until there are no more questions, each one after another.

    All ask their first question in the same moment, and the next in the moment they have the last answer, or ``pause``
    seconds later: whatever else keeps them from doing so counts.
    Answers are kept and compared when the clock has stopped.
    """
    record = Record()
    # A rival that never suspends would serve one client until the end, and no other.
    polite = rival.blocks and concurrency > 1

    async def client() -> None:
        asked = started
        for question in questions:
            answer = await rival.predict(question.name, question.rows)
            now = perf_counter()
            record.seconds.append(now - asked)
            record.asked.append(question)
            record.answers.append(answer)
            asked = now
            if pause:
                await asyncio.sleep(pause)
                asked = perf_counter()
            elif polite:
                await asyncio.sleep(0)

    started = perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    record.elapsed = perf_counter() - started
    return record


def figures(rival: Rival, record: Record, cpu_seconds: float) -> dict[str, float]:
    """Return the report of a run, times in microseconds."""
    p50, p90, p99 = np.percentile(record.seconds, (50, 90, 99)) * 1e6
    calls = len(record.seconds)
    wrong = sum(
        not rival.is_correct(answer, question.rows, question.expected)
        for question, answer in zip(record.asked, record.answers, strict=True)
    )
    return {
        "p50": round(p50, 2),
        "p90": round(p90, 2),
        "p99": round(p99, 2),
        "calls_per_second": round(calls / record.elapsed, 1),
        "cpu_per_call": round(cpu_seconds / calls * 1e6, 2),
        "calls": calls,
        "wrong": wrong,
    }


async def measured(
    rival: Rival, questions: Iterator[Question], concurrency: int, *, pause: float = 0.0
) -> dict[str, float]:
    """Run, and report."""
    before = cpu_seconds()
    record = await closed_loop(rival, questions, concurrency, pause=pause)
    return figures(rival, record, cpu_seconds() - before)


def cpu_seconds() -> float:
    """Return the processor time of this process and its children; of the children in steps of 10 ms."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


async def serve(rival: Rival, folder: Path) -> None:
    """Start ``rival`` and run orders until standard input ends."""
    started = perf_counter()
    await rival.start()
    ready = perf_counter() - started
    kinds = {
        kind: [Question(name, rival.prepare(rows), expected) for name, rows, expected in read_questions(folder, kind)]
        for kind in ROWS
    }
    orders = await standard_input()
    tell({"ready": ready})
    try:
        while line := await orders.readline():
            tell(await _obey(rival, kinds, json.loads(line)))
    finally:
        await rival.close()


async def _obey(rival: Rival, kinds: dict[str, list[Question]], order: dict[str, Any]) -> dict[str, float]:
    if "forget" in order:
        await rival.forget()
        return {}
    if "refusals" in order:
        return await cost_of_refusals(rival, kinds[order["kind"]], order["refusals"])
    if "rate" in order:
        return await open_loop(
            rival, kinds[order["kind"]], order["rate"], seconds=order["seconds"], deadline=order["deadline"]
        )
    questions, concurrency = kinds[order["kind"]], order["concurrency"]
    if "names" in order:  # first calls
        by_name = {question.name: question for question in questions}
        first = [Question(new, by_name[name].rows, by_name[name].expected) for new, name in order["names"]]
        return await measured(rival, iter(first), concurrency, pause=order["pause"])
    await closed_loop(rival, for_a_while(questions, order["warm_up"]), concurrency)
    return await measured(rival, for_a_while(questions, order["seconds"]), concurrency)


def for_a_while(questions: list[Question], seconds: float) -> Iterator[Question]:
    """Yield ``questions`` again and again until so many seconds have passed; one, if the machine was that slow."""
    end = perf_counter() + seconds
    for question in cycle(questions):
        yield question
        if perf_counter() >= end:
            return


async def standard_input() -> asyncio.StreamReader:
    """Return what the parent writes."""
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def tell(report: dict[str, Any]) -> None:
    """Let the parent hear one report."""
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


class Contender:
    """A rival's process, seen from the parent: ``script`` is what it runs, ``environment`` what only it is to know."""

    def __init__(
        self, key: str, folder: Path, *, script: str = "rivals.py", environment: dict[str, str] | None = None
    ) -> None:
        self.key = key
        root = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        started = perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), key, str(folder)],
            env=os.environ | ENVIRONMENT | (environment or {}) | {"PYTHONPATH": root},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.ready_seconds: float = self._heard()["ready"]
        except BaseException:
            self.close()
            raise
        self.start_seconds = perf_counter() - started

    def ask(self, kind: str, concurrency: int, *, seconds: float, warm_up: float = 0.0) -> dict[str, float]:
        """Have the same questions asked again and again, after unmeasured ones, and return the report.

        The others have had the processor's caches meanwhile: that is not what is to be measured.
        """
        return self.order(kind=kind, concurrency=concurrency, seconds=seconds, warm_up=warm_up)

    def ask_first(
        self, kind: str, concurrency: int, names: list[tuple[str, str]], *, pause: float = 0.0
    ) -> dict[str, float]:
        """Have one question asked under each of ``names``, pairs of a new name and the model's own.

        Each client makes a ``pause``, in seconds, after each answer.
        """
        return self.order(kind=kind, concurrency=concurrency, names=names, pause=pause)

    def forget(self) -> None:
        """Have all models leave the memory."""
        self.order(forget=True)

    def order(self, **order: Any) -> dict[str, Any]:
        """Send an order, and return what is reported of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def memory(self) -> dict[str, float]:
        """Return the memory of the process and all its children, in MB; PSS counts shared pages once."""
        root = psutil.Process(self._process.pid)
        tree = [root, *root.children(recursive=True)]
        full = [process.memory_full_info() for process in tree]
        return {
            "processes": len(tree),
            "rss_mb": round(sum(info.rss for info in full) / 1e6, 1),
            "pss_mb": round(sum(getattr(info, "pss", 0) for info in full) / 1e6, 1),
        }

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The rival {self.key} ended with exit code {self._process.wait()}.")
        report: dict[str, Any] = json.loads(line)
        return report
