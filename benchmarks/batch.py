"""Batches of 1 to 1,000,000 rows, and what a million rows cost those who call with one.

    python benchmarks/batch.py            about three minutes; writes benchmarks/results/batch.{json,md,png}
    python benchmarks/batch.py --quick    seconds; shows that it works, not how fast anything is

Two models (25 trees of depth 5) of 6 and of 50 features. Each rival runs in a process of its own, and they take turns;
all are given the same float32 array, XGBoost has one thread everywhere, and each answer is compared with XGBoost's own,
bit for bit, after the clock has stopped.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

import report
from batch_models import COLUMNS, make_batches
from command import make_parser, parse, publish
from comparing import Claim, case_table, check_claims, claim_line, entry
from harness import Contender
from models import DEPTH, ENVIRONMENT, TREES
from plots import plot_batch
from rivals import RIVALS

if TYPE_CHECKING:
    import argparse

    Round = dict[str, float]

OURS, DIRECT, THREADS, PROCESSES = "modelcache-array", "direct", "to_thread", "process-pool"
KEYS = (OURS, DIRECT, THREADS, PROCESSES)
MILLION = 1_000_000


@dataclass(frozen=True)
class Case:
    """Calls of so many ``rows``, by how many clients; ``beside`` others, of so many rows."""

    key: str
    title: str
    columns: int
    rows: int
    concurrency: int = 1
    beside: int = 0
    yardstick: str = DIRECT


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    """Of each measurement."""
    sizes: tuple[int, ...]
    """Rows of a call; the most of them are those beside which calls of one row are made."""


FULL = Plan(rounds=5, seconds=0.3, sizes=(1, 10, 100, 1000, 10_000, 100_000, MILLION))
QUICK = Plan(rounds=1, seconds=0.02, sizes=(1, 1000, 60_000))


def cases(plan: Plan) -> list[Case]:
    """Return what is measured, in this order."""
    most = plan.sizes[-1]
    return [
        *(
            Case(f"{rows}x{columns}", f"{rows:,} rows of {columns} columns, 1 client", columns, rows)
            for columns in COLUMNS
            for rows in plan.sizes
        ),
        *(
            Case(
                f"1000x{columns}-4", f"1,000 rows of {columns} columns, 4 clients", columns, 1000,
                concurrency=4, yardstick=THREADS,
            )
            for columns in COLUMNS
        ),
        *(
            Case(
                f"beside-{columns}", f"One row, while another client calls with {most:,} rows of {columns} columns",
                columns, 1, beside=most, yardstick=THREADS,
            )
            for columns in COLUMNS
        ),
    ]  # fmt: skip


def main() -> None:
    """Measure, report, write."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="modelcache-batch-") as folder:
        results = measure(Path(folder), options.plan)
    results["claims"] = check_claims(CLAIMS, results["cases"])
    tables = make_tables(results)
    publish(
        "batch", results, tables, map(claim_line, results["claims"]),
        page=_page(results, tables), plot=plot_batch, folder=options.output,
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, help="length of one measurement")
    return parse(parser, FULL, QUICK)


# Measuring


def measure(folder: Path, plan: Plan) -> dict[str, Any]:
    """Let the rivals take turns, and return everything that was seen."""
    results = report.environment("modelcache", "xgboost-cpu", "numpy") | {
        "benchmark": "batch",
        "settings": asdict(plan) | {"trees": TREES, "depth": DEPTH, "nthread": 1, "environment": ENVIRONMENT},
        "rivals": {key: {"label": RIVALS[key].label, "predicts": True} for key in KEYS},
    }
    make_batches(folder, plan.sizes[-1])
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(key, folder, script="batching.py")) for key in KEYS]
        seen = _take_turns(contenders, plan)
    results["cases"] = [
        _entry(case, key, rounds, seen[case.key, case.yardstick])
        for case in cases(plan)
        for key in KEYS
        if (rounds := seen.get((case.key, key)))
    ]
    return results


def _take_turns(contenders: list[Contender], plan: Plan) -> dict[tuple[str, str], list[Round]]:
    seen: dict[tuple[str, str], list[Round]] = {}
    with Progress(console=report.console(), transient=True) as progress:
        for _ in progress.track(range(plan.rounds), description="Measuring"):
            for case in cases(plan):
                for contender in contenders:
                    if case.beside and RIVALS[contender.key].blocks:
                        continue  # nobody else is served meanwhile
                    seen.setdefault((case.key, contender.key), []).append(_turn(case, contender, plan))
    return seen


def _turn(case: Case, contender: Contender, plan: Plan) -> Round:
    what = {"rows": case.rows, "columns": case.columns, "concurrency": case.concurrency, "seconds": plan.seconds}
    if not case.beside:
        return contender.order(**what)
    seen: Round = contender.order(**what, beside=case.beside)
    return seen | {"isolation": seen["p99"] / seen["quiet_p99"]}


def _entry(case: Case, key: str, rounds: list[Round], yardstick: list[Round]) -> dict[str, Any]:
    found = entry(case.key, case.title, key, rounds, yardstick)
    if case.beside:
        found |= {name: report.summary([seen[name] for seen in rounds]) for name in _BESIDE}
    return found


_BESIDE = ("isolation", "quiet_p99", "large_p50")

CLAIMS = (
    *(
        Claim(
            f"100,000 rows of {columns} columns take at most 1.3 times a direct call's p50",
            f"100000x{columns}", "p50_ratio", 1.3, at_most=True, rival=OURS,
        )
        for columns in COLUMNS
    ),
    *(
        Claim(
            f"4 clients with 1,000 rows of {columns} columns get at least to_thread's calls/s",
            f"1000x{columns}-4", "calls_ratio", 1.0, at_most=False, rival=OURS,
        )
        for columns in COLUMNS
    ),
    *(
        Claim(
            f"Beside calls of a million rows of {columns} columns one-row calls have at most 5 times their quiet p99",
            f"beside-{columns}", "isolation", 5.0, at_most=True, rival=OURS,
        )
        for columns in COLUMNS
    ),
)  # fmt: skip


# Reporting


def make_tables(results: dict[str, Any]) -> list[report.Table]:
    """Return one table per case, and one of what calls of one row wait beside large ones."""
    titles = dict.fromkeys((entry["case"], entry["title"]) for entry in results["cases"])
    tables = [
        case_table(title, [entry for entry in results["cases"] if entry["case"] == key], results["rivals"])
        for key, title in titles
    ]
    return [*tables, _isolation_table(results)]


def _isolation_table(results: dict[str, Any]) -> report.Table:
    rows = [
        (
            results["rivals"][entry["rival"]]["label"], entry["case"].removeprefix("beside-"),
            *(report.short(entry[figure]["median"]) for figure in ("quiet_p99", "p99")),
            report.times(entry["isolation"]["median"]),
            f"{entry['large_p50']['median'] / 1000:,.0f}",
        )
        for entry in results["cases"] if "isolation" in entry
    ]  # fmt: skip
    columns = ("rival", "columns", "quiet p99 µs", "p99 µs beside", "ratio", "the large call, ms")
    return report.Table("One-row calls beside large ones", columns, rows, highlighted="modelcache")


def _page(results: dict[str, Any], tables: list[report.Table]) -> str:
    settings = results["settings"]
    notes = f"""
* Medians of {settings["rounds"]} interleaved rounds of {settings["seconds"]:g} s, or of one call where it takes longer,
  after a quarter of that as warm-up. "rounds": the least and the most of the rounds' p50. Ratios are relative to the
  rival at 1.00x, taken within each round: the direct call for one client, to_thread for several.
* "stable" is NO when the interquartile range of the rounds' p50 or calls/s is over {report.STEADY:.0%} of the median:
  believe the order of magnitude, not the digits.
* {settings["trees"]} trees of depth {settings["depth"]}; `nthread=1` and the same OpenMP settings everywhere. All are
  given a C-contiguous float32 array.
* "inplace_predict on the loop" lets everything else in the app wait: with a million rows for a quarter of a second.
* Beside large calls: one client calls with one row, another with {settings["sizes"][-1]:,}, both the same model, so
  that modelcache has one worker for both. "quiet p99" is of the same client while nobody else calls.
* Correct: every answer is compared with `Booster.predict(DMatrix(rows))`, bit for bit."""
    claims = "\n".join(f"* {claim_line(claim)}" for claim in results["claims"])
    parts = ("## Batches of all sizes", report.describe(results), "![plot](batch.png)", claims)
    return "\n\n".join([*parts, *(table.markdown() for table in tables), "### How to read this" + "\n" + notes]) + "\n"


if __name__ == "__main__":
    main()
