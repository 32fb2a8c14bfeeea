"""Calls per second: many clients, calls that do not wait for each other, and more of them than can be answered.

    python benchmarks/throughput.py            about four minutes; writes benchmarks/results/throughput.{json,md,png}
    python benchmarks/throughput.py --quick    seconds; shows that it works, not how fast anything is

Closed loop: 1, 16, 64 and 256 clients ask ten house-price models (25 trees) for one row at a time, each in the moment
it has its last answer. Open loop: calls of 100 rows to ten models of 500 trees are made at fixed rates, shares of what
the same rival answers to 16 clients; latency counts from the moment a call was meant for. These are that heavy so that
the rival is what is overloaded, and not the clients, who share its process. The rivals take turns, in processes of
their own, and each answer is compared with XGBoost's own, bit for bit, after the clock has stopped.
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
from models import DEPTH, ENVIRONMENT, HUNDRED, NAMES, ONE, TREES, make_fleet
from plots import plot_throughput
from rivals import YARDSTICK
from throughput_rivals import DEADLINE, HEAVY, QUEUE_LIMIT, RIVALS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    Round = dict[str, float]
    Seen = dict[tuple[str, str], list[Round]]

SCRIPT = "throughput_rivals.py"
CLIENTS = (1, 16, 64, 256)
SHARES = (0.5, 0.8, 1.0, 1.2, 2.0)
"""Rates of the open loop, of the capacity."""
CAPACITY_CLIENTS = QUEUE_LIMIT // 2
"""So few that none is refused: a call may wait in two slices, and all for one worker."""
MEASURED_BY = {"timeouts": "unlimited"}
"""Whose capacity it is: callers that give up cannot be told to ask again."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    """Of each closed measurement."""
    open_seconds: float
    """Of calls in each open one; the answers to them may take longer."""
    warm_up: float
    heavy_trees: int
    refusals: int


FULL = Plan(rounds=5, seconds=0.4, open_seconds=1.0, warm_up=0.1, heavy_trees=500, refusals=2000)
QUICK = Plan(rounds=1, seconds=0.03, open_seconds=0.05, warm_up=0.01, heavy_trees=TREES, refusals=200)


def main() -> None:
    """Measure, report, write."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="modelcache-throughput-") as folder:
        results = measure(Path(folder), options.plan, options.rivals)
    results["claims"] = _claims(results)
    tables = make_tables(results)
    publish(
        "throughput", results, tables, map(_line, results["claims"]),
        page=_page(results, tables), plot=plot_throughput, folder=options.output,
    )  # fmt: skip


def _options() -> argparse.Namespace:
    keys = tuple(RIVALS | HEAVY)
    options = parse(make_parser(__doc__, keys), FULL, QUICK)
    needed = {YARDSTICK, "direct", *(MEASURED_BY[key] for key in options.rivals if key in MEASURED_BY)}
    options.rivals = [key for key in keys if key in needed | set(options.rivals)]
    return options


# Measuring


def measure(folder: Path, plan: Plan, keys: list[str]) -> dict[str, Any]:
    """Let the rivals take turns, first with the small models, then with the large ones."""
    results = report.environment("modelcache", "xgboost-cpu", "numpy") | {
        "benchmark": "throughput",
        "settings": asdict(plan)
        | {"models": len(NAMES), "trees": TREES, "depth": DEPTH, "nthread": 1, "environment": ENVIRONMENT}
        | {"deadline": DEADLINE, "queue_limit": QUEUE_LIMIT},
        "rivals": {key: {"label": kind.label, "predicts": True} for key, kind in (RIVALS | HEAVY).items()},
    }
    seen: Seen = {}
    with Progress(transient=True) as progress:
        small, heavy = (_fleet(folder / str(trees), trees) for trees in (TREES, plan.heavy_trees))
        with ExitStack() as stack:
            contenders = _contenders(stack, small, [key for key in keys if key in RIVALS])
            for _ in progress.track(range(plan.rounds), description="Closed loop"):
                _closed_round(contenders, plan, seen)
        with ExitStack() as stack:
            contenders = _contenders(stack, heavy, [key for key in keys if key in HEAVY])
            for _ in progress.track(range(plan.rounds), description="Open loop"):
                _open_round(contenders, plan, seen)
    results["cases"] = _closed_entries(seen)
    results["open"] = _open_entries(seen)
    results["refusals"] = seen.get(("refusals", "limited"), [])
    return results


def _fleet(folder: Path, trees: int) -> Path:
    if not folder.exists():
        folder.mkdir()
        make_fleet(folder, trees=trees, kinds=(ONE, HUNDRED))
    return folder


def _contenders(stack: ExitStack, folder: Path, keys: Sequence[str]) -> list[Contender]:
    return [stack.enter_context(Contender(key, folder, script=SCRIPT)) for key in keys]


def _closed_round(contenders: list[Contender], plan: Plan, seen: Seen) -> None:
    for clients in CLIENTS:
        for contender in contenders:
            found = contender.ask(ONE, clients, seconds=plan.seconds, warm_up=plan.warm_up)
            seen.setdefault((f"one-{clients}", contender.key), []).append(found)


def _open_round(contenders: list[Contender], plan: Plan, seen: Seen) -> None:
    capacities: dict[str, float] = {}
    for contender in contenders:
        if contender.key in MEASURED_BY:
            contender.order(
                kind=HUNDRED, rate=capacities[MEASURED_BY[contender.key]] / 2, seconds=plan.warm_up, deadline=DEADLINE
            )
            capacities[contender.key] = capacities[MEASURED_BY[contender.key]]
            continue
        found = contender.ask(HUNDRED, CAPACITY_CLIENTS, seconds=plan.open_seconds / 2, warm_up=plan.warm_up)
        capacities[contender.key] = found["calls_per_second"]
        seen.setdefault(("capacity", contender.key), []).append(found)
    for share in SHARES:
        for contender in contenders:
            rate = share * capacities[contender.key]
            found = contender.order(kind=HUNDRED, rate=rate, seconds=plan.open_seconds, deadline=DEADLINE)
            found |= {"rate": rate, "goodput_share": found["goodput"] / capacities[contender.key]}
            seen.setdefault((f"open-{share:g}", contender.key), []).append(found)
    for contender in contenders:
        if HEAVY[contender.key].queue_limit:
            found = contender.order(kind=HUNDRED, refusals=plan.refusals)
            seen.setdefault(("refusals", contender.key), []).append(found)


def _closed_entries(seen: Seen) -> list[dict[str, Any]]:
    cases = [(f"one-{clients}", f"One row, {clients} client{'s' * (clients > 1)}") for clients in CLIENTS]
    found = [
        entry(case, title, key, rounds, seen[case, YARDSTICK])
        | {"direct_ratio": entry(case, title, key, rounds, seen[case, "direct"])["calls_ratio"]}
        for case, title in cases
        for key in RIVALS
        if (rounds := seen.get((case, key)))
    ]
    capacity = [
        entry(
            "capacity", f"100 rows, large models, {CAPACITY_CLIENTS} clients", key, rounds, seen["capacity", YARDSTICK]
        )
        for key in HEAVY
        if (rounds := seen.get(("capacity", key)))
    ]
    return found + capacity


_OPEN_FIGURES = ("rate", "p50", "p90", "p99", "goodput", "goodput_share", "refused")


def _open_entries(seen: Seen) -> list[dict[str, Any]]:
    return [
        {
            "case": f"open-{share:g}",
            "share": share,
            "rival": key,
            "correct": not any(found["wrong"] for found in rounds),
            "answers_compared": sum(int(found["calls"]) for found in rounds),
            **{figure: report.summary([found[figure] for found in rounds]) for figure in _OPEN_FIGURES},
            "rounds": rounds,
        }
        for share in SHARES
        for key in HEAVY
        if (rounds := seen.get((f"open-{share:g}", key)))
    ]


# Claims

CLAIMS = (
    Claim("With 64 clients there are at least 10 times to_thread's calls/s", "one-64", "calls_ratio", 10.0, False),
    Claim(
        "With 64 clients there are at least 4 times the calls/s of calls on the loop",
        "one-64",
        "direct_ratio",
        4.0,
        False,
    ),
    Claim("With 256 clients there are at least 20 times to_thread's calls/s", "one-256", "calls_ratio", 20.0, False),
)
OVERLOAD_CLAIMS = (
    Claim(
        f"At twice the capacity, goodput stays above 0.9 of it (answered in {DEADLINE * 1e3:.0f} ms)",
        "open-2", "goodput_share", 0.9, False, "limited",
    ),
)  # fmt: skip
REFUSAL_LIMIT = 20.0
"""Microseconds."""


def _claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    found = check_claims(CLAIMS, results["cases"]) + check_claims(OVERLOAD_CLAIMS, results["open"])
    if results["refusals"]:
        cost = report.summary([seen["us"] for seen in results["refusals"]])
        found.append(
            {
                "claim": "Refusing a call of 100 rows takes less than 20 µs", "limit": REFUSAL_LIMIT, "unit": "µs",
                "met": cost["median"] < REFUSAL_LIMIT, "measured": cost,
            }
        )  # fmt: skip
    return found


def _line(claim: dict[str, Any]) -> str:
    if "unit" not in claim:
        return claim_line(claim)
    seen = claim["measured"]
    return (
        f"{'Met' if claim['met'] else 'NOT MET'}: {claim['claim']}: {seen['median']:.1f} {claim['unit']} "
        f"(rounds: {seen['min']:.1f} to {seen['max']:.1f})."
    )


# Reporting


def make_tables(results: dict[str, Any]) -> list[report.Table]:
    """Return one table per case."""
    titles = dict.fromkeys((seen["case"], seen["title"]) for seen in results["cases"])
    closed = [
        case_table(title, [seen for seen in results["cases"] if seen["case"] == case], results["rivals"])
        for case, title in titles
    ]
    return closed + [_open_table(results, share) for share in SHARES]


def _open_table(results: dict[str, Any], share: float) -> report.Table:
    columns = (
        "rival", "calls/s asked", "p50 ms", "p99 ms", "in time/s", "of capacity", "rounds", "refused", "stable",
        "correct",
    )  # fmt: skip
    rows = [_open_row(seen, results["rivals"]) for seen in results["open"] if seen["share"] == share]
    return report.Table(f"Open loop at {share:g} of the capacity", columns, rows, highlighted="modelcache")


def _open_row(seen: dict[str, Any], rivals: dict[str, Any]) -> tuple[str, ...]:
    part = seen["goodput_share"]
    return (
        rivals[seen["rival"]]["label"],
        report.short(seen["rate"]["median"]),
        *(report.short(seen[figure]["median"] / 1e3) for figure in ("p50", "p99")),
        report.short(seen["goodput"]["median"]),
        f"{part['median']:.2f}",
        f"{part['min']:.2f} to {part['max']:.2f}",
        f"{seen['refused']['median']:.0%}",
        "yes" if seen["goodput"]["steady"] else "NO",
        f"all {seen['answers_compared']:,}" if seen["correct"] else "WRONG",
    )


def _page(results: dict[str, Any], tables: list[report.Table]) -> str:
    settings = results["settings"]
    notes = f"""
* Medians of {settings["rounds"]} interleaved rounds; "rounds": the least and the most of them. Ratios are taken within
  each round, relative to `{RIVALS[YARDSTICK].label}`. "stable" is NO when the interquartile range of the rounds is over
  {report.STEADY:.0%} of the median.
* Closed loop: {settings["seconds"]:g} s after {settings["warm_up"]:g} s of warm-up; ten models of {TREES} trees, six
  features, one row per call. modelcache is given lists, all others a float32 array made beforehand.
* Open loop: ten models of {settings["heavy_trees"]} trees, 100 rows per call, a float32 array for all. A rival's
  capacity is what it answers to {CAPACITY_CLIENTS} clients in a closed loop, in the same round. Calls are made for
  {settings["open_seconds"]:g} s; "in time/s": answered within {settings["deadline"] * 1e3:.0f} ms of the moment they
  were meant for, per second of those. asyncio's timers have steps of 1 ms, which all rivals' latencies contain.
* The clients run in the process and on the loop of the rival. The models of the open loop are that large so that what
  the clients do is a small part of what a call costs.
* Latencies are of answered calls only: those of a rival that refuses look better than those of one that does not. What
  counts is "in time/s".
* Correct: every answer is compared with `Booster.predict(DMatrix(rows))`, bit for bit."""
    claims = "\n".join(f"* {_line(claim)}" for claim in results["claims"])
    parts = ("## Throughput: many clients, and too many", report.describe(results), "![plot](throughput.png)", claims)
    return "\n\n".join([*parts, *(table.markdown() for table in tables), "### How to read this" + "\n" + notes]) + "\n"


if __name__ == "__main__":
    main()
