"""One-row calls while 10, 100, 1,000 and 10,000 models are resident, and what they take of the memory.

    python benchmarks/many_models.py            four minutes; writes benchmarks/results/many_models.{json,md,png}
    python benchmarks/many_models.py --quick    seconds; shows that it works, not how fast anything is

The models are copies of ten (25 trees of depth 5) under names of their own. Each rival, with each number of models, is
a process of its own; all of them take turns: A10 B10 C10 A100 ..., A10 B10 ..., so that what the machine does meanwhile
hits all of them, and ratios are taken within a round. The whole takes 4 GB of memory. Clients ask in a closed loop, and
each answer is compared with XGBoost's own, bit for bit, after the clock has stopped.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

import report
from command import make_parser, parse, publish
from comparing import Claim, check_claims, claim_line, correctness, entry
from harness import Contender
from many_rivals import RIVALS, names_of
from models import DEPTH, ENVIRONMENT, NAMES, TREES, make_fleet
from plots import plot_many_models
from rivals import YARDSTICK

if TYPE_CHECKING:
    import argparse

    Round = dict[str, float]
    Rounds = dict[tuple[str, str, int], list[Round]]


@dataclass(frozen=True)
class Case:
    """Which models are asked, and by how many clients."""

    key: str
    title: str
    spread: str
    concurrency: int

    def of(self, count: int) -> str:
        """Return the key of the case with so many models resident."""
        return f"{self.key}-{count}"


CASES = (
    Case("ten-1", "The same ten models, 1 client", "ten", 1),
    Case("ten-64", "The same ten models, 64 clients", "ten", 64),
    Case("uniform-1", "All models alike, 1 client", "uniform", 1),
    Case("uniform-64", "All models alike, 64 clients", "uniform", 64),
    Case("zipf-1", "Zipf (s = 1), 1 client", "zipf", 1),
    Case("zipf-64", "Zipf (s = 1), 64 clients", "zipf", 64),
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    """Of each measurement."""
    warm_up: float
    """Seconds of calls before it."""
    counts: tuple[int, ...]
    """Of resident models."""


FULL = Plan(rounds=5, seconds=0.3, warm_up=0.1, counts=(10, 100, 1000, 10_000))
QUICK = Plan(rounds=1, seconds=0.02, warm_up=0.005, counts=(10, 100))

CLAIMS = (
    Claim("With 10,000 models resident the p50 of calls of the same ten is at most 1.2 times that with 10",
          "ten-1-10000", "growth", 1.2, True),
    Claim("With 1,000 models, all asked alike by 64 clients, there are at least 4 times to_thread's calls/s",
          "uniform-64-1000", "calls_ratio", 4.0, False),
    Claim("A resident model takes at most 1 KiB of the parent's memory (RSS, 10,000 of them, in KiB)",
          "memory-10000", "kibibytes", 1.0, True),
)  # fmt: skip


def main() -> None:
    """Measure, report, write."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="modelcache-many-") as folder:
        results = measure(Path(folder), options.plan, options.rivals)
    results["claims"] = check_claims(CLAIMS, [*results["cases"], *results["memory"]])
    tables = make_tables(results)
    publish(
        "many_models", results, tables, _claims(results),
        page=_page(results, tables), plot=plot_many_models, folder=options.output,
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__, RIVALS)
    parser.add_argument("--counts", type=_counts, metavar="N,N", help="numbers of resident models")
    options = parse(parser, FULL, QUICK)
    if YARDSTICK not in options.rivals:
        options.rivals.append(YARDSTICK)
    return options


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, text.split(","))))


# Measuring


def measure(folder: Path, plan: Plan, keys: list[str]) -> dict[str, Any]:
    """Let the rivals take turns, and return everything that was seen."""
    results = report.environment("modelcache", "xgboost-cpu", "numpy") | {
        "benchmark": "many_models",
        "settings": asdict(plan) | {"trees": TREES, "depth": DEPTH, "nthread": 1, "environment": ENVIRONMENT},
        "rivals": {key: {"label": RIVALS[key].label, "predicts": True} for key in keys},
    }
    make_fleet(folder)
    for index, name in enumerate(names_of(max(plan.counts))):
        os.link(folder / f"{NAMES[index % len(NAMES)]}.tar.gz", folder / f"{name}.tar.gz")
    with ExitStack() as stack:
        contenders = {
            (key, count): stack.enter_context(Contender(f"{key}:{count}", folder, script="many_rivals.py"))
            for count in plan.counts
            for key in keys
        }
        results["memory"] = _load_everything(contenders)
        results["cases"] = _summarised(_take_turns(contenders, plan))
    return results


def _load_everything(contenders: dict[tuple[str, int], Contender]) -> list[dict[str, Any]]:
    return [
        _memory(key, count, contender.order(load=True))
        for (key, count), contender in Progress(transient=True).track([*contenders.items()], description="Loading")
    ]


def _memory(key: str, count: int, seen: dict[str, float]) -> dict[str, Any]:
    kibibytes = report.summary([seen["parent_bytes_per_model"] / 1024])
    return {"case": f"memory-{count}", "rival": key, "models": count, "kibibytes": kibibytes, **seen}


def _take_turns(contenders: dict[tuple[str, int], Contender], plan: Plan) -> Rounds:
    seen: Rounds = {}
    with Progress(transient=True) as progress:
        for _ in progress.track(range(plan.rounds), description="Rounds"):
            for case in CASES:
                for (key, count), contender in contenders.items():
                    answer = contender.ask(case.spread, case.concurrency, seconds=plan.seconds, warm_up=plan.warm_up)
                    seen.setdefault((case.key, key, count), []).append(answer)
    return seen


def _summarised(rounds: Rounds) -> list[dict[str, Any]]:
    cases, least = {case.key: case for case in CASES}, min(count for _, _, count in rounds)
    return [
        entry(cases[case].of(count), cases[case].title, key, seen, rounds[case, YARDSTICK, count])
        | {"kind": case, "models": count, "growth": _growth(seen, rounds[case, key, least])}
        for (case, key, count), seen in rounds.items()
    ]


def _growth(rounds: list[Round], fewest: list[Round]) -> dict[str, Any]:
    """Return the p50 relative to the same rival's with the fewest models, within each round."""
    return report.summary([mine["p50"] / few["p50"] for mine, few in zip(rounds, fewest, strict=True)])


# Reporting


def make_tables(results: dict[str, Any]) -> list[report.Table]:
    """Return one table per case, and one of the memory."""
    entries = results["cases"]
    return [
        *(_case_table(case, [entry for entry in entries if entry["kind"] == case.key], results) for case in CASES),
        _memory_table(results),
    ]


def _case_table(case: Case, entries: list[dict[str, Any]], results: dict[str, Any]) -> report.Table:
    least = results["settings"]["counts"][0]
    columns = (
        "rival", "models", "p50 µs", "rounds", "p99 µs", "calls/s", "calls/s ratio", f"p50 vs {least} models",
        "CPU µs", "stable", "correct",
    )  # fmt: skip
    rows = [_case_row(entry, results["rivals"][entry["rival"]]["label"]) for entry in entries]
    return report.Table(case.title, columns, sorted(rows, key=lambda row: row[0]), highlighted="modelcache")


def _case_row(entry: dict[str, Any], label: str) -> tuple[str, ...]:
    p50 = entry["p50"]
    return (
        label,
        f"{entry['models']:,}",
        report.short(p50["median"]),
        f"{report.short(p50['min'])} to {report.short(p50['max'])}",
        *(report.short(entry[figure]["median"]) for figure in ("p99", "calls_per_second")),
        report.times(entry["calls_ratio"]["median"]),
        report.times(entry["growth"]["median"]),
        report.short(entry["cpu_per_call"]["median"]),
        "yes" if entry["stable"] else "NO",
        correctness(entry, predicts=True),
    )


def _memory_table(results: dict[str, Any]) -> report.Table:
    rows = [
        (
            results["rivals"][seen["rival"]]["label"], f"{seen['models']:,}", f"{seen['load_seconds']:.1f}",
            report.short(seen["parent_bytes_per_model"]),
            report.short(seen["workers_pss_mb"]) if seen["workers_pss_mb"] else "-",
        )
        for seen in results["memory"]
    ]  # fmt: skip
    columns = ("rival", "models", "load s", "parent's bytes per model", "workers' PSS MB")
    return report.Table("Memory", columns, sorted(rows, key=lambda row: row[0]), highlighted="modelcache")


def _claims(results: dict[str, Any]) -> list[str]:
    return [*map(claim_line, results["claims"]), *_shares(results)]


def _shares(results: dict[str, Any]) -> list[str]:
    """Say what it costs to spread calls over all models, and what of that is XGBoost's own."""
    growth = {(entry["kind"], entry["rival"], entry["models"]): entry["growth"] for entry in results["cases"]}
    least, most = results["settings"]["counts"][0], results["settings"]["counts"][-1]
    return [
        f"Spread over all of {most:,} models instead of {least} ({case.title.split(',')[0]}, 1 client), the p50 is "
        + ", ".join(
            f"{report.times(growth[case.key, key, most]['median'])} ({about['label']})"
            for key, about in results["rivals"].items()
        )
        + ": caches. That of the call on the loop is XGBoost's own share."
        for case in CASES
        if case.spread != "ten" and case.concurrency == 1
    ]


def _page(results: dict[str, Any], tables: list[report.Table]) -> str:
    settings = results["settings"]
    notes = f"""
* Medians of {settings["rounds"]} interleaved rounds; a measurement takes {settings["seconds"]:g} s after
  {settings["warm_up"]:g} s of warm-up. "rounds": the least and the most of the rounds' p50. "calls/s ratio" is
  relative to `{RIVALS[YARDSTICK].label}` with as many models, "p50 vs" to the same rival with the fewest; both within
  each round.
* "stable" is NO when the interquartile range of the rounds' p50 or calls/s is over {report.STEADY:.0%} of the median:
  believe the order of magnitude, not the digits.
* The models are copies of {len(NAMES)} with {settings["trees"]} trees of depth {settings["depth"]}, each loaded by
  itself; `nthread=1` and the same OpenMP settings everywhere. All are loaded before the first call.
* "The same ten" are asked in turn, whatever else is resident. "Alike" asks any model next, "Zipf" the n-th 1/n as often
  as the first.
* The parent's bytes per model are the slope of its RSS (what malloc keeps for later is returned before each reading)
  while the second half of the models is loaded, the names not counted; of few models it says little. For the other
  rivals it is the models themselves.
* Rows: `modelcache` is given lists and converts them in each call; the others are given a float32 array.
* Correct: every answer is compared with `Booster.predict(DMatrix(rows))`, bit for bit."""
    claims = "\n".join(f"* {line}" for line in _claims(results))
    parts = ("## Many models: one-row calls", report.describe(results), "![plot](many_models.png)", claims)
    return "\n\n".join([*parts, *(table.markdown() for table in tables), "### How to read this" + "\n" + notes]) + "\n"


if __name__ == "__main__":
    main()
