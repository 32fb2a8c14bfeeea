"""``engine="auto"`` against XGBoost alone, through two registries of one worker each that take turns.

    python benchmarks/engines.py            about a minute; writes benchmarks/results/engines.{json,md,png}
    python benchmarks/engines.py --quick    seconds; shows that it works, not how fast anything is

Ten models of each size are asked until all are converted. Then one client, and 64, ask rows of them in turn. Ratios are
taken within a round, and each answer of one registry is compared with the other's, bit for bit, before the clock runs.
An echo between two processes takes its turn with the lone clients: nothing with a worker can be faster than that.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import report
from command import make_parser, parse, publish
from modelcache import MemoryStore, ModelRegistry
from models import ENVIRONMENT, houses, train
from plots import plot_engines
from rivals import Echo

MODELS = 10
SIZES = ((25, 5), (100, 6), (500, 6))
WARM_UP = 200
"""Calls of each model, of which 128 earn the conversion."""

MOST_ECHOES = 1.6
"""What a lone call of the smallest models should take at most."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    """Of each measurement."""
    sizes: tuple[tuple[int, int], ...] = SIZES


FULL = Plan(rounds=5, seconds=0.3)
QUICK = Plan(rounds=1, seconds=0.02, sizes=SIZES[:1])


def main() -> None:
    """Measure, report, write."""
    options = parse(make_parser(__doc__), FULL, QUICK)
    plan = options.plan
    os.environ.update(ENVIRONMENT)
    results = report.environment("modelcache", "xgboost-cpu", "onnxruntime", "numpy") | {"benchmark": "engines"}
    results["cases"] = [asyncio.run(compare(trees, depth, plan.rounds, plan.seconds)) for trees, depth in plan.sizes]
    results["rounds"] = plan.rounds
    table = make_table(results)
    publish(
        "engines", results, [table], [_claim(results)],
        page=_page(results, table), plot=plot_engines, folder=options.output,
    )  # fmt: skip


def make_table(results: dict[str, Any]) -> report.Table:
    """Return a row for each size of models."""
    columns = (
        "trees", "XGBoost: p50 µs", "auto: p50 µs", "times as fast", "rounds", "of the echo",
        "XGBoost, 64 clients: calls/s", "auto", "times as many", "KB of a model", "with both", "correct",
    )  # fmt: skip
    return report.Table("One row, ten models", columns, [_row(case) for case in results["cases"]])


def _row(case: dict[str, Any]) -> tuple[str, ...]:
    gain, sizes = case["p50_ratio"], case["bytes"]
    return (
        f"{case['trees']}, depth {case['depth']}",
        *(report.short(1e6 * case[key]["median"]) for key in ("p50_xgboost", "p50_auto")),
        report.times(gain["median"]),
        f"{report.times(gain['min'])} to {report.times(gain['max'])}",
        report.times(case["echoes"]["median"]),
        *(report.short(case[key]["median"]) for key in ("rate_xgboost", "rate_auto")),
        report.times(case["rate_ratio"]["median"]),
        *(report.short(sizes[key] / 1e3 / MODELS) for key in ("xgboost", "auto")),
        "all" if case["correct"] and case["converted"] == MODELS else "NO",
    )


def _claim(results: dict[str, Any]) -> str:
    seen = results["cases"][0]["echoes"]
    verdict = "Met" if seen["median"] <= MOST_ECHOES else "NOT MET"
    return (
        f'{verdict}: with engine="auto", a lone call of 25 trees takes at most {MOST_ECHOES} times a bare echo: '
        f"{report.times(seen['median'])} (rounds: {report.times(seen['min'])} to {report.times(seen['max'])})."
    )


def _page(results: dict[str, Any], table: report.Table) -> str:
    notes = (
        f"Medians of {results['rounds']} rounds. Each registry has one worker. The echo is of 64 bytes, between two "
        "processes, in the same rounds. Correct: each answer is that of XGBoost alone, bit for bit."
    )
    parts = (
        "## Engines",
        report.describe(results),
        "![plot](engines.png)",
        f"* {_claim(results)}",
        table.markdown(),
        notes,
    )
    return "\n\n".join(parts) + "\n"


async def compare(trees: int, depth: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Return what was seen with models of one size."""
    random = np.random.default_rng(1)
    boosters = [train(random, trees=trees, depth=depth) for _ in range(MODELS)]
    models = {f"m{index}.ubj": bytes(booster.save_raw("ubj")) for index, booster in enumerate(boosters)}
    rows = houses(WARM_UP, random).astype(np.float32)
    async with (
        ModelRegistry(MemoryStore(models), workers=1) as xgboost,
        ModelRegistry(MemoryStore(models), workers=1, engine="auto") as auto,
    ):
        correct = await _same_answers(xgboost, auto, rows)
        await _all_tried(auto)
        correct = correct and await _same_answers(xgboost, auto, rows)
        echo = Echo(Path(tempfile.gettempdir()))
        await echo.start()
        await echo.predict("", b"x" * 64)  # its process is up now
        registries = {"xgboost": xgboost, "auto": auto}
        seen = []
        for _ in range(rounds):
            seen.append(await _round(registries, echo, rows, seconds))
            registries = dict(reversed(registries.items()))  # who comes first may find the caches warm
        await echo.close()
        return {
            "trees": trees,
            "depth": depth,
            "correct": correct,
            "converted": sum(model.engine == "onnx" for model in auto.loaded()),
            "bytes": {"xgboost": xgboost.stats().bytes_resident, "auto": auto.stats().bytes_resident},
            **{key: report.summary([one[key] for one in seen]) for key in seen[0]},
        }


async def _same_answers(one: ModelRegistry, two: ModelRegistry, rows: np.ndarray[Any, Any]) -> bool:
    same = True
    for name in _names():
        for row in rows:
            ours, theirs = await one.predict(name, row), await two.predict(name, row)
            same = same and ours.tobytes() == theirs.tobytes()
    return same


async def _all_tried(registry: ModelRegistry) -> None:
    """Wait until each model is converted, or it is said why not."""

    def is_tried(name: str) -> bool:
        said = registry.explain(name)
        return "ONNX Runtime" in said or "no second engine" in said

    while not all(map(is_tried, _names())):  # noqa: ASYNC110 - it is nobody's event
        await asyncio.sleep(0.02)


async def _round(
    registries: dict[str, ModelRegistry], echo: Echo, rows: np.ndarray[Any, Any], seconds: float
) -> dict[str, float]:
    """Return what was seen of each, in their order."""
    echoed = await _p50(echo, [b"x" * 64], seconds)
    p50 = {key: await _p50(registry, rows, seconds) for key, registry in registries.items()}
    rate = {key: await _rate(registry, rows, seconds) for key, registry in registries.items()}
    return {
        "p50_xgboost": p50["xgboost"], "p50_auto": p50["auto"], "p50_ratio": p50["xgboost"] / p50["auto"],
        "p50_echo": echoed, "echoes": p50["auto"] / echoed,
        "rate_xgboost": rate["xgboost"], "rate_auto": rate["auto"], "rate_ratio": rate["auto"] / rate["xgboost"],
    }  # fmt: skip


async def _p50(asked: ModelRegistry | Echo, rows: Any, seconds: float) -> float:
    """Return seconds of a call with one client."""
    names, taken, end, call = _names(), [], time.perf_counter() + seconds, 0
    while (started := time.perf_counter()) < end:
        await asked.predict(names[call % MODELS], rows[call % len(rows)])
        taken.append(time.perf_counter() - started)
        call += 1
    return median(taken)


async def _rate(registry: ModelRegistry, rows: np.ndarray[Any, Any], seconds: float) -> float:
    """Return calls per second with 64 clients."""
    names, started = _names(), time.perf_counter()

    async def client(number: int) -> int:
        call = number
        while time.perf_counter() < started + seconds:
            await registry.predict(names[call % MODELS], rows[call % len(rows)])
            call += 1
        return call - number

    calls = sum(await asyncio.gather(*map(client, range(64))))
    return calls / (time.perf_counter() - started)


def _names() -> list[str]:
    return [f"m{index}" for index in range(MODELS)]


if __name__ == "__main__":
    main()
