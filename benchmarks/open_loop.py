"""Calls that come when they come, whether earlier ones are answered or not; and calls that are refused.

Latency counts from the moment a call was meant to be made, as in wrk2: a client that is late because the one before it
took long counts that, too (no coordinated omission).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import Question
    from rivals import Rival

_REFUSED_PER_ROUND = 200


@dataclass
class Outcome:
    """What became of the calls of one run."""

    seconds: list[float] = field(default_factory=list)
    """Of those that were answered, from the moment they were meant to be made."""
    answered: list[tuple[Question, Any]] = field(default_factory=list)
    in_time: int = 0
    last_in_time: float = 0.0
    refused: int = 0
    elapsed: float = 0.0
    """Until the last answer."""


async def open_loop(
    rival: Rival, questions: Sequence[Question], rate: float, *, seconds: float, deadline: float
) -> dict[str, float]:
    """Make ``rate`` calls per second for ``seconds``, and report; times in microseconds, goodput in calls/s.

    The goodput is of calls answered within ``deadline`` seconds of the moment they were meant for, over the time until
    the last of those. asyncio's timers have steps of a millisecond: calls start that late at most, and it counts.
    """
    outcome = Outcome()
    tasks: list[asyncio.Task[None]] = []
    total = max(1, int(rate * seconds))
    asked = iter(cycle(questions))

    async def call(question: Question, meant: float) -> None:
        try:
            answer = await rival.predict(question.name, question.rows)
        except rival.refusals:
            outcome.refused += 1
            return
        now = perf_counter()
        outcome.seconds.append(now - meant)
        if now - meant <= deadline:
            outcome.in_time, outcome.last_in_time = outcome.in_time + 1, now - started
        outcome.answered.append((question, answer))

    started = perf_counter()
    while len(tasks) < total:
        due = min(total, int((perf_counter() - started) * rate) + 1)
        meant = [started + number / rate for number in range(len(tasks), due)]
        tasks += [asyncio.create_task(call(next(asked), moment)) for moment in meant]
        await asyncio.sleep(max(0.0, started + len(tasks) / rate - perf_counter()))
    await asyncio.gather(*tasks)
    outcome.elapsed = perf_counter() - started
    return _report(rival, outcome, total, seconds)


def _report(rival: Rival, outcome: Outcome, total: int, seconds: float) -> dict[str, float]:
    times = outcome.seconds or [outcome.elapsed]
    p50, p90, p99 = np.percentile(times, (50, 90, 99)) * 1e6
    wrong = sum(not rival.is_correct(answer, asked.rows, asked.expected) for asked, answer in outcome.answered)
    return {
        "p50": round(p50, 2),
        "p90": round(p90, 2),
        "p99": round(p99, 2),
        "calls_per_second": round(len(outcome.seconds) / outcome.elapsed, 1),
        "goodput": round(outcome.in_time / max(seconds, outcome.last_in_time), 1),
        "refused": round(outcome.refused / total, 4),
        "calls": len(outcome.seconds),
        "wrong": wrong,
    }


async def cost_of_refusals(rival: Rival, questions: Sequence[Question], count: int) -> dict[str, float]:
    """Fill the queue of one model's worker, and report what a refused call costs, in microseconds.

    A call that is refused never suspends: nothing else runs meanwhile, and the queue stays full.
    """
    question = questions[0]
    times: list[float] = []
    refused = 0
    while refused < count:
        waiting = [asyncio.ensure_future(_quietly(rival, question)) for _ in range(rival.queue_limit)]
        await asyncio.sleep(0)
        started = perf_counter()
        for _ in range(_REFUSED_PER_ROUND):
            refused += await _quietly(rival, question)
        times.append((perf_counter() - started) / _REFUSED_PER_ROUND)
        await asyncio.gather(*waiting)
    return {"us": round(float(np.median(times)) * 1e6, 2), "refused": refused}


async def _quietly(rival: Rival, question: Question) -> bool:
    """Make a call and return whether it was refused."""
    try:
        await rival.predict(question.name, question.rows)
    except rival.refusals:
        return True
    return False
