"""What HTTP adds: a row of CSV sent to ``modelcache serve``, and to a trivial echo on the same server.

    python benchmarks/over_http.py            about two minutes; writes benchmarks/results/over_http.{json,md,png}
    python benchmarks/over_http.py --quick    seconds; shows that it works, not how fast anything is

Every rival's server is a process of its own, and so is the client that asks it, over connections that stay open; they
take turns. The echo is a route of starlette under uvicorn that sends back what it was sent: nothing that parses HTTP in
Python can take less. Three steps on the way from there to the command are asked as well: the echo behind the command's
limits and guard, its app for SageMaker's clients with an answer at hand, and the echo by way of another process, which
is where models are. ``registry.predict`` is asked the same in the process, to tell the registry's own share. Each
answer is compared with XGBoost's own, bit for bit, after the clock has stopped.

It is not called http.py, since Python would then find it in the place of its own module of that name.
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
from comparing import Claim, case_table, check_claims, claim_line, dealt_out, entry
from harness import Contender
from http_rivals import RIVALS
from models import DEPTH, ENVIRONMENT, NAMES, ONE, TREES, make_fleet
from plots import plot_over_http

if TYPE_CHECKING:
    from collections.abc import Iterator

    Round = dict[str, Any]

CASES = {"one-1": (1, "One row of CSV, 1 client"), "one-64": (64, "One row of CSV, 64 clients")}
"""How many clients ask, and what that is called."""

SERVE, INSIDE = "modelcache-serve", "modelcache-inside"
BARE = "by-bare-worker"
YARDSTICK = "http-echo"
"""What ratios are relative to."""


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


FULL = Plan(rounds=12, starts=3, seconds=0.5, warm_up=0.2)
QUICK = Plan(rounds=1, starts=1, seconds=0.03, warm_up=0.02)

CLAIMS = tuple(
    claim
    for case, clients in (("one-1", "1 client"), ("one-64", "64 clients"))
    for claim in (
        Claim(f"With {clients} a prediction takes at most 1.5 times an echo's p50",
              case, "p50_ratio", 1.5, True, SERVE, bare=BARE if case == "one-1" else ""),
        Claim(f"With {clients} there are at least 0.6 of an echo's calls/s",
              case, "calls_ratio", 0.6, False, SERVE, bare=BARE if case == "one-1" else ""),
    )
)  # fmt: skip


def main() -> None:
    """Measure, report, write."""
    options = parse(make_parser(__doc__), FULL, QUICK)
    with tempfile.TemporaryDirectory(prefix="modelcache-http-") as folder:
        results = measure(Path(folder), options.plan)
    results["claims"] = check_claims(CLAIMS, results["cases"])
    tables = [_table(results, case) for case in CASES]
    publish(
        "over_http", results, tables, _findings(results),
        page=_page(results, tables), plot=plot_over_http, folder=options.output,
    )  # fmt: skip


# Measuring


def measure(folder: Path, plan: Plan) -> dict[str, Any]:
    """Let the rivals take turns, and return everything that was seen."""
    results = report.environment(
        "modelcache", "xgboost-cpu", "numpy", "starlette", "uvicorn", "httptools", "uvloop"
    ) | {
        "benchmark": "over_http",
        "settings": asdict(plan)
        | {"models": len(NAMES), "trees": TREES, "depth": DEPTH, "nthread": 1, "environment": ENVIRONMENT},
        "rivals": {key: {"label": rival.label, "predicts": rival.predicts} for key, rival in RIVALS.items()},
    }
    make_fleet(folder)
    seen: dict[tuple[str, str], list[Round]] = {}
    with Progress(transient=True) as progress:
        for rounds in progress.track(dealt_out(plan.rounds, plan.starts), description="Starts"):
            for case, key, round_ in _after_start(folder, plan, rounds):
                seen.setdefault((case, key), []).append(round_)
    results["cases"] = [
        entry(case, CASES[case][1], key, rounds, seen[case, YARDSTICK]) for (case, key), rounds in seen.items()
    ]
    return results


def _after_start(folder: Path, plan: Plan, rounds: int) -> Iterator[tuple[str, str, Round]]:
    """Start all rivals, and let them take turns for so many ``rounds``."""
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(key, folder, script="http_rivals.py")) for key in RIVALS]
        for contender in contenders:
            contender.ask(ONE, 16, seconds=2 * plan.warm_up)
        for _ in range(rounds):
            for case, (clients, _title) in CASES.items():
                for contender in contenders:
                    found = contender.ask(ONE, clients, seconds=plan.seconds, warm_up=plan.warm_up)
                    yield case, contender.key, found


# Reporting


def _table(results: dict[str, Any], case: str) -> report.Table:
    return case_table(CASES[case][1], [seen for seen in results["cases"] if seen["case"] == case], results["rivals"])


def _findings(results: dict[str, Any]) -> list[str]:
    """Return the claims, and the registry's own share of a call over HTTP."""
    found = {(seen["case"], seen["rival"]): seen["p50"]["median"] for seen in results["cases"]}
    shares = []
    for case, (clients, _title) in CASES.items():
        inside, serve, echo = (report.short(found[case, key]) for key in (INSIDE, SERVE, YARDSTICK))
        shares.append(
            f"With {clients} client{'s' * (clients > 1)} the registry's own p50, asked in the process, is {inside} of "
            f"the {serve} µs over HTTP; the echo takes {echo}."
        )
    return [*map(claim_line, results["claims"]), *shares]


def _page(results: dict[str, Any], tables: list[report.Table]) -> str:
    settings = results["settings"]
    notes = f"""
* Medians of {settings["rounds"]} interleaved rounds of {settings["seconds"]:g} s after
  {settings["warm_up"]:g} s of warm-up, in {settings["starts"]} starts. "rounds": the
  least and the most of the rounds' p50. Ratios are to `{RIVALS[YARDSTICK].label}`, taken within each round.
* "stable" is NO when the interquartile range of the rounds' p50 or calls/s is over {report.STEADY:.0%} of the median:
  believe the order of magnitude, not the digits.
* {settings["models"]} models of {settings["trees"]} trees, depth {settings["depth"]}, six features, `nthread=1`. Closed
  loop: a client asks again when it has its answer, over a connection that stays open.
* `modelcache serve` is the command with all options at their defaults: limits, request ids and figures included. The
  others are apps of one route, run by uvicorn as it comes, with httptools and without a log of requests; but for
  `{RIVALS["guarded-echo"].label}` and `{RIVALS["constant"].label}`, which have what stands before the command's apps.
* The bare worker is the least that we know how to write for predictions in another process: a route that reads the row
  with NumPy, and a process that has the call of XGBoost's library. It checks nothing, and has no limits; the calls of
  many clients it answers one by one.
* CPU is that of client, server and workers together, per call.
* Correct: every answer is compared with `Booster.predict(DMatrix(rows))`, bit for bit; the echo's with what it was
  sent."""
    claims = "\n".join(f"* {line}" for line in _findings(results))
    parts = ("## What HTTP adds", report.describe(results), "![plot](over_http.png)", claims)
    return "\n\n".join([*parts, *(table.markdown() for table in tables), "### How to read this" + "\n" + notes]) + "\n"


if __name__ == "__main__":
    main()
