"""What a storm of cold loads does to warm calls.

    python benchmarks/isolation.py            about four minutes; writes benchmarks/results/isolation.{json,md,png}
    python benchmarks/isolation.py --quick    seconds; shows that it works, not how fast anything is

Four clients call ten models (25 trees of depth 5) in a closed loop, one row each time. Meanwhile eight loads are always
under way, of names that were never heard of: each is loaded by its first call, and unloaded. Each rival has five kinds
of stretches, which take turns: quiet; a storm from a store where each fetch takes 50 ms; one from a folder, as fast as
it goes; and, for each storm, one without any load in which processes that have to do with none of this compute instead.
What those do to the calls, the machine does: it has no processor left for them. Each p99 is compared with the quiet one
of the same rival in the same round, and each answer with XGBoost's own, bit for bit, after the clock has stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

import report
from command import make_parser, parse, publish
from comparing import Claim, check_claims, claim_line, dealt_out, entry
from harness import Contender
from isolation_rivals import AWAY, CLIENTS, RIVALS, STORM
from models import DEPTH, ENVIRONMENT, NAMES, TREES, make_fleet, offer_cold
from plots import plot_isolation

if TYPE_CHECKING:
    from collections.abc import Iterator

    Round = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What else happens while the warm models are called."""

    key: str
    title: str
    away: float | None = None
    """Seconds that a fetch of the storm takes; None without a storm."""
    computing: float = 0.0
    """Share of the time for which each of as many processes as there are cores computes, 2 ms at a time."""


_PIECE = 0.002
"""Seconds that the others compute for at a time: what one load takes, about."""

QUIET = "quiet"
CASES = (
    Case(QUIET, "Quiet"),
    Case("remote", f"Storm of cold loads from a store that takes {AWAY * 1000:g} ms", away=AWAY),
    Case("remote-control", "No loads; others compute for 2 ms of each 12.5 on each core", computing=0.16),
    Case("local", "Storm of cold loads from a folder, as fast as it goes", away=0.0),
    Case("local-control", "No loads; others compute all the time on each core", computing=1.0),
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    starts: int
    """Of each rival, which the rounds are dealt out to: two starts of the same code differ."""
    seconds: float
    """Of each measurement."""
    warm_up: float
    """Seconds of calls before it, with whatever else happens."""
    names: int
    """That may be loaded by one rival."""


FULL = Plan(rounds=12, starts=4, seconds=1.0, warm_up=0.2, names=40_000)
QUICK = Plan(rounds=1, starts=1, seconds=0.1, warm_up=0.02, names=500)

CLAIMS = (
    Claim("In a storm of cold loads from a remote store, 8 in flight, the warm p99 is at most 3 times the quiet p99",
          "remote", "p99_ratio", 3.0, True),
    Claim("In a storm of cold loads from a folder, 8 in flight, the warm p99 is at most 3 times the quiet p99",
          "local", "p99_ratio", 3.0, True),
)  # fmt: skip


def main() -> None:
    """Measure, report, write."""
    options = parse(make_parser(__doc__, RIVALS), FULL, QUICK)
    with tempfile.TemporaryDirectory(prefix="modelcache-isolation-") as folder:
        results = measure(Path(folder), options.plan, options.rivals)
    results["claims"] = check_claims(CLAIMS, results["cases"])
    tables = [_table(results, case) for case in CASES]
    publish(
        "isolation", results, tables, _findings(results),
        page=_page(results, tables), plot=plot_isolation, folder=options.output,
    )  # fmt: skip


# Measuring


def measure(folder: Path, plan: Plan, keys: list[str]) -> dict[str, Any]:
    """Let the rivals take turns, and return everything that was seen."""
    results = report.environment("modelcache", "xgboost-cpu", "numpy") | {
        "benchmark": "isolation",
        "settings": asdict(plan)
        | {"clients": CLIENTS, "storm": STORM, "away": AWAY, "models": len(NAMES), "trees": TREES, "depth": DEPTH}
        | {"nthread": 1, "environment": ENVIRONMENT},
        "rivals": {key: {"label": RIVALS[key].label} for key in keys},
    }
    make_fleet(folder)
    offer_cold(folder, plan.names)
    seen: dict[tuple[str, str], list[Round]] = {}
    with Progress(transient=True) as progress:
        for rounds in progress.track(dealt_out(plan.rounds, plan.starts), description="Starts"):
            for case, key, round_ in _after_start(folder, plan, keys, rounds):
                seen.setdefault((case.key, key), []).append(round_)
    results["cases"] = [_entry(case, key, seen[case.key, key], seen[QUIET, key]) for case in CASES for key in keys]
    return results


def _after_start(folder: Path, plan: Plan, keys: list[str], rounds: int) -> Iterator[tuple[Case, str, Round]]:
    """Start all rivals, and let them take turns for so many ``rounds``."""
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(key, folder, script="isolation_rivals.py")) for key in keys]
        for contender in contenders:  # loads the ten models, and warms both paths up
            _turn(contender, CASES[3], plan)
        for _ in range(rounds):
            for case in CASES:
                for contender in contenders:
                    yield case, contender.key, _turn(contender, case, plan)


def _turn(contender: Contender, case: Case, plan: Plan) -> Round:
    with _computing(case.computing):
        return contender.order(away=case.away, seconds=plan.seconds, warm_up=plan.warm_up)


_COMPUTES = """
import os, sys, time
piece, pause = map(float, sys.argv[1:])
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    end = time.perf_counter() + piece
    while time.perf_counter() < end:
        pass
    time.sleep(pause)
"""


@contextmanager
def _computing(share: float) -> Iterator[None]:
    """Have one process per usable core compute for ``share`` of the time, as long as the block lasts.

    They are in the session of the rivals, as workers are: where the kernel has autogroups, others would have a share
    of the processor of their own.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pause = _PIECE / share - _PIECE if share else 0.0
    command = [sys.executable, "-c", _COMPUTES, str(_PIECE), str(pause)]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) for _ in range(count if share else 0)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


def _entry(case: Case, key: str, rounds: list[Round], quiet: list[Round]) -> dict[str, Any]:
    found = entry(case.key, case.title, key, rounds, quiet)
    figures = ("p999", "longest", "loads_per_second", "cpu_share")
    found |= {figure: report.summary([seen[figure] for seen in rounds]) for figure in figures}
    pairs = zip(rounds, quiet, strict=True)
    found["p99_ratio"] = report.summary([seen["p99"] / calm["p99"] for seen, calm in pairs])
    found["stable"] = found["stable"] and found["p99"]["steady"]
    return found


# Reporting


def _table(results: dict[str, Any], case: Case) -> report.Table:
    entries = [entry for entry in results["cases"] if entry["case"] == case.key]
    entries.sort(key=lambda entry: float(entry["p99"]["median"]))
    columns = (
        "rival", "p50 ms", "p99 ms", "rounds", "p99 ratio", "p99.9 ms", "longest ms", "calls/s", "loads/s", "CPU",
        "stable", "correct",
    )  # fmt: skip
    return report.Table(
        case.title, columns, [_row(results, entry) for entry in entries], highlighted=RIVALS["modelcache"].label
    )


def _row(results: dict[str, Any], entry: dict[str, Any]) -> tuple[str, ...]:
    p99 = entry["p99"]
    wrong = sum(seen["wrong"] for seen in entry["rounds"])
    return (
        results["rivals"][entry["rival"]]["label"],
        *(_milliseconds(entry[figure]["median"]) for figure in ("p50", "p99")),
        f"{_milliseconds(p99['min'])} to {_milliseconds(p99['max'])}",
        report.times(entry["p99_ratio"]["median"]),
        *(_milliseconds(entry[figure]["median"]) for figure in ("p999", "longest")),
        *(report.short(entry[figure]["median"]) for figure in ("calls_per_second", "loads_per_second")),
        f"{entry['cpu_share']['median']:.0%}",
        "yes" if entry["stable"] else "NO",
        f"all {entry['answers_compared']:,}" if entry["correct"] else f"{wrong:,} WRONG",
    )


def _milliseconds(microseconds: float) -> str:
    return report.short(microseconds / 1000)


def _findings(results: dict[str, Any]) -> list[str]:
    """Return the claims, and what the machine alone does to the same calls."""
    found = {(entry["case"], entry["rival"]): entry for entry in results["cases"]}
    controls = [
        f"While nothing is loaded, but others compute instead of the {kind} storm, the warm p99 is "
        f"{report.times(control['p99_ratio']['median'])} the quiet one "
        f"(rounds: {report.times(control['p99_ratio']['min'])} to {report.times(control['p99_ratio']['max'])})."
        for kind in ("remote", "local")
        if (control := found.get((f"{kind}-control", "modelcache"))) is not None
    ]
    return [*map(claim_line, results["claims"]), *controls]


def _page(results: dict[str, Any], tables: list[report.Table]) -> str:
    settings = results["settings"]
    notes = f"""
* Medians of {settings["rounds"]} interleaved rounds of {settings["seconds"]:g} s for each kind and
  rival, in {settings["starts"]} starts, and each after {settings["warm_up"]:g} s of the
  same. "rounds": the least and the most of the rounds' p99. "p99 ratio": to the quiet one of the same rival in the same
  round.
* "stable" is NO when the interquartile range of the rounds' p50, p99 or calls/s is over {report.STEADY:.0%} of the
  median: believe the order of magnitude, not the digits.
* {settings["clients"]} clients in a closed loop call {settings["models"]} models of {settings["trees"]} trees, depth
  {settings["depth"]}, one row each time. In a storm {settings["storm"]} loads of further such models are always under
  way: a first call, then an unload, and the next. `nthread=1` and the same OpenMP settings everywhere.
* "loads/s" is what the storm has achieved: a rival that loads less disturbs less. "CPU" is that of all processes of the
  rival: 100% is one processor.
* `to_thread` loads in the same threads as it predicts. The pool's cache holds 32 models in each process; a new one
  drives out the one that was not called for longest, and nothing is unloaded by hand.
* modelcache is given lists, as a user would write them; the others a float32 array made beforehand.
* Correct: every answer, those of first calls included, is compared with `Booster.predict(DMatrix(rows))`, bit for
  bit."""
    claims = "\n".join(f"* {line}" for line in _findings(results))
    parts = (
        "## Isolation: warm calls in a storm of cold loads", report.describe(results), "![plot](isolation.png)", claims,
    )  # fmt: skip
    return "\n\n".join([*parts, *(table.markdown() for table in tables), "### How to read this" + "\n" + notes]) + "\n"


if __name__ == "__main__":
    main()
