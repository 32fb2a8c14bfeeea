"""One worker against two: what a second processor brings to one hot model, to ten, and to a lone call of many rows.

    python benchmarks/scaling.py            about three minutes; writes benchmarks/results/scaling.{json,md,png}
    python benchmarks/scaling.py --quick    seconds; shows that it works, not how fast anything is

Sixteen clients ask in a closed loop, each time with 64 rows, models of 500 trees of depth 6; then one client does, with
20,480 rows. The worker is what they wait for, and the process that asks is not. That is shown, not assumed: the share
of a processor that each uses stands beside the calls. With two workers the hot model is called until there is a copy of
it in the second one, before anything is measured. Each rival runs in a process of its own, they take turns, and XGBoost
has one thread everywhere. Each answer is compared with XGBoost's own, bit for bit, after the clock has stopped.
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
from comparing import Claim, check_claims, claim_line, dealt_out, entry
from harness import Contender
from models import DEPTH, ENVIRONMENT, HOT, NAMES, ROWS, make_fleet
from plots import plot_scaling
from scaling_rivals import CLIENTS, RIVALS

if TYPE_CHECKING:
    from collections.abc import Iterator

    Round = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Calls of so many ``models`` by so many ``clients``, each ``times`` as many rows as a question has."""

    title: str
    models: int
    clients: int = CLIENTS
    times: int = 1


CASES = {
    "hot": Case("One hot model", 1),
    "ten": Case("Ten models, called alike", len(NAMES)),
    "big": Case("One hot model, and one client with many rows at once", 1, clients=1, times=320),
}

YARDSTICK, CANDIDATE = "modelcache-1", "modelcache-2"
"""What ratios are relative to, and whose is claimed."""

_SHARES = ("parent_share", "workers_share")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    starts: int
    """Of each rival, which the rounds are dealt out to: two starts of the same code differ."""
    seconds: float
    """Of each measurement."""
    warm_up: float
    """Seconds of calls before it."""
    patience: float
    """Seconds of calls after which no copy of the hot model is waited for any more, in each round."""
    trees: int


FULL = Plan(rounds=9, starts=3, seconds=1.0, warm_up=0.5, patience=15.0, trees=500)
QUICK = Plan(rounds=1, starts=1, seconds=0.05, warm_up=0.02, patience=0.3, trees=25)

CLAIMS = (
    Claim("One hot model is answered by 2 workers at least 1.7 times as often as by 1",
          "hot", "calls_ratio", 1.7, False, CANDIDATE),
)  # fmt: skip


def main() -> None:
    """Measure, report, write."""
    options = parse(make_parser(__doc__), FULL, QUICK)
    with tempfile.TemporaryDirectory(prefix="modelcache-scaling-") as folder:
        results = measure(Path(folder), options.plan)
    results["claims"] = check_claims(CLAIMS, results["cases"])
    tables = [*(_table(results, case) for case in CASES), _copies_table(results)]
    publish(
        "scaling", results, tables, _findings(results),
        page=_page(results, tables), plot=plot_scaling, folder=options.output,
    )  # fmt: skip


# Measuring


def measure(folder: Path, plan: Plan) -> dict[str, Any]:
    """Let the rivals take turns, and return everything that was seen."""
    results = report.environment("modelcache", "xgboost-cpu", "numpy") | {
        "benchmark": "scaling",
        "settings": asdict(plan)
        | {"clients": CLIENTS, "rows": ROWS[HOT][1], "depth": DEPTH + 1, "nthread": 1, "environment": ENVIRONMENT},
        "rivals": {key: {"label": rival.label} for key, rival in RIVALS.items()},
    }
    make_fleet(folder, trees=plan.trees, depth=DEPTH + 1, kinds=(HOT,))
    seen: dict[tuple[str, str], list[Round]] = {}
    heated: list[Round] = []
    results["heated"] = heated
    with Progress(transient=True) as progress:
        for rounds in progress.track(dealt_out(plan.rounds, plan.starts), description="Starts"):
            for case, key, round_ in _after_start(folder, plan, heated, rounds):
                seen.setdefault((case, key), []).append(round_)
    results["cases"] = [_entry(case, key, rounds, seen[case, YARDSTICK]) for (case, key), rounds in seen.items()]
    return results


def _after_start(folder: Path, plan: Plan, heated: list[Round], rounds: int) -> Iterator[tuple[str, str, Round]]:
    """Start all rivals, and let them take turns; what became of the copies is added to ``heated``."""
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(key, folder, script="scaling_rivals.py")) for key in RIVALS]
        for _ in range(rounds):
            for contender in contenders:
                heat = contender.order(do="heat", patience=plan.patience)
                if contender.key == CANDIDATE:
                    heated.append(heat)
            for key, case in CASES.items():
                what = {"models": case.models, "clients": case.clients, "times": case.times}
                for contender in contenders:
                    found = contender.order(do="ask", **what, seconds=plan.seconds, warm_up=plan.warm_up)
                    yield key, contender.key, found


def _entry(case: str, key: str, rounds: list[Round], yardstick: list[Round]) -> dict[str, Any]:
    shares = {share: report.summary([seen[share] for seen in rounds]) for share in _SHARES}
    return entry(case, CASES[case].title, key, rounds, yardstick) | shares


# Reporting


def _table(results: dict[str, Any], case: str) -> report.Table:
    entries = [entry for entry in results["cases"] if entry["case"] == case]
    entries.sort(key=lambda entry: -float(entry["calls_per_second"]["median"]))
    columns = (
        "rival", "calls/s", "rounds", "ratio", "p50 ms", "p99 ms", "CPU of the app's process", "of its workers",
        "CPU µs per call", "stable", "correct",
    )  # fmt: skip
    return report.Table(
        CASES[case].title, columns, [_row(results, entry) for entry in entries], highlighted=RIVALS[CANDIDATE].label
    )


def _row(results: dict[str, Any], entry: dict[str, Any]) -> tuple[str, ...]:
    rate = entry["calls_per_second"]
    wrong = sum(seen["wrong"] for seen in entry["rounds"])
    return (
        results["rivals"][entry["rival"]]["label"],
        report.short(rate["median"]),
        f"{report.short(rate['min'])} to {report.short(rate['max'])}",
        report.times(entry["calls_ratio"]["median"]),
        *(report.short(entry[figure]["median"] / 1000) for figure in ("p50", "p99")),
        *(f"{entry[share]['median']:.0%}" for share in _SHARES),
        report.short(entry["cpu_per_call"]["median"]),
        "yes" if entry["stable"] else "NO",
        f"all {entry['answers_compared']:,}" if entry["correct"] else f"{wrong:,} WRONG",
    )


def _copies_table(results: dict[str, Any]) -> report.Table:
    rows: list[tuple[str, ...]] = [
        (str(number), f"{heat['seconds']:.2f}", str(heat["copies"]), f"{heat['bytes']:,}")
        for number, heat in enumerate(results["heated"], 1)
    ]
    return report.Table("Copies of the hot model with 2 workers", ("round", "s until made", "copies", "bytes"), rows)


def _findings(results: dict[str, Any]) -> list[str]:
    """Return the claims, what the copy took, and what a processor's time says of what was to be expected."""
    found = {(entry["case"], entry["rival"]): entry for entry in results["cases"]}
    one, two = found["hot", YARDSTICK], found["hot", CANDIDATE]
    copy, rounds = max(heat["bytes"] for heat in results["heated"]), len(results["heated"])
    without = sum(not heat["copies"] for heat in results["heated"])
    made = f"The copy takes {copy:,} bytes; in {without} of {rounds} rounds there was none."
    return [*map(claim_line, results["claims"]), made, processor_line(one, two, results["machine"]["usable_cores"])]


def processor_line(one: dict[str, Any], two: dict[str, Any], usable: int) -> str:
    """Return who used the processors with 1 worker and with 2, and how many more calls that leaves room for."""
    alone, (parent, workers) = one["workers_share"]["median"], (two[share]["median"] for share in _SHARES)
    used = (
        f"With 1 worker that one uses {alone:.0%} of a processor and the app's process "
        f"{one['parent_share']['median']:.0%}. With 2 they use {workers:.0%} and {parent:.0%} of the {usable} usable"
    )
    if not alone:  # the system counts in steps of 10 ms
        return f"{used}: too short a time to say more."
    left, dearer = usable - parent, two["cpu_per_call"]["median"] / one["cpu_per_call"]["median"]
    return (
        f"{used}: {left:.2f} are left for workers. If a call took no more of a processor's time than with 1 worker, "
        f"they could answer {left / alone:.2f} times the calls; it takes {dearer:.2f} times as much."
    )


def _page(results: dict[str, Any], tables: list[report.Table]) -> str:
    settings = results["settings"]
    notes = f"""
* Medians of {settings["rounds"]} interleaved rounds of {settings["seconds"]:g} s after
  {settings["warm_up"]:g} s of warm-up, in {settings["starts"]} starts. "rounds": the
  least and the most of the rounds' calls/s. "ratio": of the calls/s, to `{RIVALS[YARDSTICK].label}`, taken within each
  round.
* "stable" is NO when the interquartile range of the rounds' p50 or calls/s is over {report.STEADY:.0%} of the median:
  believe the order of magnitude, not the digits.
* {settings["clients"]} clients in a closed loop, {settings["rows"]} rows in each call, or one client with
  {CASES["big"].times * settings["rows"]:,} rows; {settings["trees"]} trees of depth {settings["depth"]}, `nthread=1`.
  All are given a float32 array made beforehand.
* A call of many rows is answered in slices, by all workers that hold the model and have time.
* CPU shares are of one processor: 100% is one that is never idle. Where they add up to the usable cores, the machine is
  what the calls wait for.
* `to_thread` has both processors, too: XGBoost releases the GIL while it predicts.
* A model is copied when its line was long, at a worker that computes all the time, at two looks 1.25 s apart, and
  another worker has time. On a machine that is busy with something else a worker does not get a processor to itself,
  and no copy is made: see the table of copies.
* Correct: every answer is compared with `Booster.predict(DMatrix(rows))`, bit for bit."""
    claims = "\n".join(f"* {line}" for line in _findings(results))
    parts = ("## Scaling: one worker against two", report.describe(results), "![plot](scaling.png)", claims)
    return "\n\n".join([*parts, *(table.markdown() for table in tables), "### How to read this" + "\n" + notes]) + "\n"


if __name__ == "__main__":
    main()
