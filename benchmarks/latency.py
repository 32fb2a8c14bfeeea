"""Cold against warm, and modelcache against what one would write by hand.

    python benchmarks/latency.py            about three minutes; writes benchmarks/results/latency.{json,md,png}
    python benchmarks/latency.py --quick    seconds; shows that it works, not how fast anything is

Ten house-price models (25 trees of depth 5, six features) lie in a folder as NAME.tar.gz. Each rival runs in a process
of its own, all see the same artifacts, rows and environment, XGBoost has one thread everywhere. The rivals take turns:
A B C ... A B C ..., so that what the machine does meanwhile hits all of them; ratios are taken within a round. Clients
ask in a closed loop, and each answer is compared with XGBoost's own, bit for bit, after the clock has stopped.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

import report
from command import make_parser, parse, publish
from comparing import Claim, case_table, check_claims, claim_line, entry
from harness import Contender
from models import DEPTH, ENVIRONMENT, NAMES, ONE, THOUSAND, TREES, copies, make_fleet
from plots import plot_latency
from rivals import RIVALS, YARDSTICK

if TYPE_CHECKING:
    import argparse

    Round = dict[str, float]


@dataclass(frozen=True)
class Case:
    """What is asked, and by how many at once."""

    key: str
    title: str
    kind: str
    concurrency: int
    first: bool = False
    """First calls, of names that nobody has asked for before."""


CASES = (
    Case("one-1", "One row, 1 client", ONE, 1),
    Case("one-16", "One row, 16 clients", ONE, 16),
    Case("one-64", "One row, 64 clients", ONE, 64),
    Case("thousand-4", "1,000 rows, 4 clients", THOUSAND, 4),
    Case("first-1", "First calls, one after another", ONE, 1, first=True),
    Case("first-10", "First calls, 10 at once", ONE, 10, first=True),
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    """Of each warm measurement."""
    warm_up: float
    """Seconds of calls before it."""
    first_calls: int
    """In each cold measurement."""
    memory_alone: bool
    """Whether each rival's memory is measured while no other is there to share pages with, by one more start of it."""


FULL = Plan(rounds=7, seconds=0.4, warm_up=0.1, first_calls=50, memory_alone=True)
QUICK = Plan(rounds=1, seconds=0.02, warm_up=0.01, first_calls=10, memory_alone=False)


def main() -> None:
    """Measure, report, write."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="modelcache-latency-") as folder:
        results = measure(Path(folder), options.plan, options.rivals)
    results["claims"] = check_claims(CLAIMS, results["cases"])
    tables = make_tables(results)
    publish(
        "latency", results, tables, map(claim_line, results["claims"]),
        page=_page(results, tables), plot=plot_latency, folder=options.output,
    )  # fmt: skip
    if set(_README_RIVALS) <= set(options.rivals):
        (options.output / "readme.md").write_text(_readme(results))


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__, RIVALS)
    parser.add_argument("--seconds", type=float, help="length of one warm measurement")
    options = parse(parser, FULL, QUICK)
    if YARDSTICK not in options.rivals:
        options.rivals.append(YARDSTICK)
    return options


# Measuring


def measure(folder: Path, plan: Plan, keys: list[str]) -> dict[str, Any]:
    """Let the rivals take turns, and return everything that was seen."""
    results = report.environment("modelcache", "xgboost-cpu", "numpy", "async-lru") | {
        "benchmark": "latency",
        "settings": asdict(plan)
        | {"models": len(NAMES), "trees": TREES, "depth": DEPTH, "nthread": 1, "environment": ENVIRONMENT},
    }
    make_fleet(folder, kinds=(ONE, THOUSAND))
    alone = {key: _memory_alone(key, folder, plan) for key in keys if plan.memory_alone}
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(key, folder)) for key in keys]
        for contender in contenders:
            _load_everything(contender, plan)
        results["cases"] = _summarised(_take_turns(contenders, plan, folder))
        memory = alone or {contender.key: contender.memory() for contender in contenders}
        results["rivals"] = {contender.key: _about(contender, memory[contender.key]) for contender in contenders}
    return results


def _memory_alone(key: str, folder: Path, plan: Plan) -> Round:
    """Return what a rival takes, having every model."""
    with Contender(key, folder) as contender:
        _load_everything(contender, plan)
        return contender.memory()


def _load_everything(contender: Contender, plan: Plan) -> None:
    """Ask until each process of the rival has every model."""
    contender.ask(ONE, 16, seconds=2 * plan.warm_up)
    contender.ask(THOUSAND, 4, seconds=plan.warm_up)


def _take_turns(contenders: list[Contender], plan: Plan, folder: Path) -> dict[tuple[str, str], list[Round]]:
    seen: dict[tuple[str, str], list[Round]] = {}
    with Progress(transient=True) as progress:
        for number in progress.track(range(plan.rounds), description="Rounds"):
            for case in CASES:
                first = copies(folder, plan.first_calls, f"{case.key}_{number}") if case.first else []
                for contender in contenders:
                    if RIVALS[contender.key].predicts or not case.first:
                        seen.setdefault((case.key, contender.key), []).append(_turn(case, contender, plan, first))
    return seen


def _turn(case: Case, contender: Contender, plan: Plan, first: list[tuple[str, str]]) -> Round:
    if case.first:
        return contender.ask_first(case.kind, case.concurrency, first)
    return contender.ask(case.kind, case.concurrency, seconds=plan.seconds, warm_up=plan.warm_up)


def _about(contender: Contender, memory: Round) -> dict[str, Any]:
    rival = RIVALS[contender.key]
    return {
        "label": rival.label,
        "rows": rival.takes,
        "predicts": rival.predicts,
        "start_seconds": round(contender.start_seconds, 3),
        **memory,
    }


def _summarised(rounds: dict[tuple[str, str], list[Round]]) -> list[dict[str, Any]]:
    return [
        entry(case.key, case.title, key, seen_rounds, rounds[case.key, YARDSTICK])
        for case in CASES
        for key in RIVALS
        if (seen_rounds := rounds.get((case.key, key)))
    ]


CLAIMS = (
    Claim("A warm one-row call of 1 client takes at most half of to_thread's p50", "one-1", "p50_ratio", 0.5, True),
    Claim("It takes at most 2.5 times a bare echo between two processes", "one-1", "p50", 2.5, True, against="echo"),
    Claim("It takes less than inplace_predict on the loop", "one-1", "p50", 1.0, True, against="direct", bare="bare"),
    Claim("With 64 clients there are at least 10 times to_thread's calls/s", "one-64", "calls_ratio", 10.0, False),
)


# Reporting


def make_tables(results: dict[str, Any]) -> list[report.Table]:
    """Return one table per case, and one of the processes."""
    tables = [
        case_table(case.title, [entry for entry in results["cases"] if entry["case"] == case.key], results["rivals"])
        for case in CASES
    ]
    return [*tables, _process_table(results)]


def _process_table(results: dict[str, Any]) -> report.Table:
    rows: list[tuple[str, ...]] = [
        (
            about["label"], about["rows"], f"{about['start_seconds']:.2f}", str(about["processes"]),
            f"{about['rss_mb']:.0f}", f"{about['pss_mb']:.0f}",
        )
        for about in results["rivals"].values()
    ]  # fmt: skip
    columns = ("rival", "rows", "start s", "processes", "RSS MB", "PSS MB")
    return report.Table(f"Processes, with {len(NAMES)} models loaded", columns, rows, highlighted="modelcache")


_README_RIVALS = ("modelcache", "to_thread", "process-pool", "direct")
_README_CASES = (
    ("one-1", "one row, 1 client: p50 µs", "p50"),
    ("one-64", "64 clients: calls/s", "calls_per_second"),
    ("thousand-4", "1,000 rows, 4 clients: calls/s", "calls_per_second"),
    ("first-1", "first call: p50 µs", "p50"),
)


def _readme(results: dict[str, Any]) -> str:
    """Return the few figures that the README shows."""
    found = {(entry["case"], entry["rival"]): entry for entry in results["cases"]}
    lines = [f"| | {' | '.join(title for _, title, _ in _README_CASES)} |", "|---" * (len(_README_CASES) + 1) + "|"]
    for key in _README_RIVALS:
        label = results["rivals"][key]["label"]
        cells = [report.short(found[case, key][figure]["median"]) for case, _, figure in _README_CASES]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    claims = "\n".join(f"* {claim_line(claim)}" for claim in results["claims"])
    notes = (
        f"{report.describe(results)}\n\n{claims}\n"
        "* A bare worker is another process that has the call of XGBoost's library and nothing else.\n"
        "* Every answer was compared with XGBoost's own, bit for bit. All rivals, percentiles, spread, and the JSON: "
        "[benchmarks/results](benchmarks/results/latency.md).\n"
    )
    return "\n".join(lines) + "\n\n" + notes


def _page(results: dict[str, Any], tables: list[report.Table]) -> str:
    settings = results["settings"]
    notes = f"""
* Medians of {settings["rounds"]} interleaved rounds; a warm measurement takes {settings["seconds"]:g} s after
  {settings["warm_up"]:g} s of warm-up, a cold one makes {settings["first_calls"]} first calls. "rounds": the least and
  the most of the rounds' p50. "p50 ratio" and "calls/s ratio" are relative to `{RIVALS[YARDSTICK].label}`, taken within
  each round.
* "stable" is NO when the interquartile range of the rounds' p50 or calls/s is over {report.STEADY:.0%} of the median:
  believe the order of magnitude, not the digits.
* {settings["models"]} models of {settings["trees"]} trees, depth {settings["depth"]}, six features; `nthread=1` and the
  same OpenMP settings everywhere; garbage collector as Python sets it. Closed loop: a client asks its next question in
  the moment it has the last answer.
* Rows: `modelcache` is given lists, as a user would write them, and converts them in each call; all others are given a
  float32 array made beforehand, and so is "modelcache, array".
* First calls are of names never heard before in a local folder. The files are in the page cache, the libraries are
  imported and the processes run: "start s" is what that takes from nothing.
* "inplace_predict on the loop" lets everything else in the app wait while it predicts or loads. The echo predicts
  nothing: it is the floor of any design with processes. The bare worker ([bare_worker.py](../bare_worker.py)) predicts:
  it has the call of XGBoost's library and the way to it, one process of the two that there could be, and nothing else.
  With one client it is the least that we know how to write for that; many calls it does not predict together.
* CPU is that of all processes of the rival, per call. RSS and PSS are of all of them too, read while no other rival
  runs; PSS counts pages that they share once.
* Correct: every answer is compared with `Booster.predict(DMatrix(rows))`, bit for bit."""
    claims = "\n".join(f"* {claim_line(claim)}" for claim in results["claims"])
    parts = ("## Latency: cold, warm, and written by hand", report.describe(results), "![plot](latency.png)", claims)
    return "\n\n".join([*parts, *(table.markdown() for table in tables), "### How to read this" + "\n" + notes]) + "\n"


if __name__ == "__main__":
    main()
