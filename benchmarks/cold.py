"""The first call of a model, and what a new version of one costs those who call it.

    python benchmarks/cold.py            about five minutes; writes benchmarks/results/cold.{json,md,png}
    python benchmarks/cold.py --quick    seconds; shows that it works, not how fast anything is

An S3 server (rclone, on this machine) has models as UBJSON and JSON. Each rival runs in a process of its own, has a
client of the same library with as many connections, and gets the same bytes under names it has not heard of. They take
turns: A B C ... A B C .... Ratios are taken within a round. Each answer is compared with XGBoost's own, bit for bit,
after the clock has stopped. In the end a model is overwritten again and again while it is called.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

import replacing
import report
import s3_server
from cold_models import AS_JSON, BUCKET, MEDIUM, SMALL, make_bucket, offer
from cold_rivals import CONNECTIONS, RIVALS
from command import make_parser, parse, publish
from comparing import Claim, case_table, check_claims, claim_line, entry
from harness import Contender
from models import ENVIRONMENT, ONE
from plots import plot_cold
from swapping import CALLERS, NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    Round = dict[str, float]
    Names = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """What is asked of whom; ratios are relative to the last of the ``rivals``."""

    key: str
    title: str
    kind: str
    rivals: tuple[str, ...]
    concurrency: int = 1
    apart: bool = False
    """With a pause after each call."""

    @property
    def yardstick(self) -> str:
        """What the others are compared with."""
        return self.rivals[-1]

    def among(self, keys: list[str]) -> Case:
        """Return it with the yardstick and those of ``keys`` alone."""
        return replace(self, rivals=tuple(key for key in self.rivals if key in (*keys, self.yardstick)))


_FROM_S3 = ("s3", "s3-bare-name", "s3-keeping", "get-object-threads", "get-object")
_FROM_DISK = ("disk", "folder", "read-elsewhere", "read-threads", "read")
_APART = ("disk", "read-elsewhere", "read-threads", "read")
_JSON = ("disk", "s3-keeping", "get-object", "s3")

CASES = (
    Case("s3-small", "From S3, 25 trees of depth 5 (UBJSON), one after another", SMALL, _FROM_S3),
    Case("s3-medium", "From S3, 100 trees of depth 6 (UBJSON), one after another", MEDIUM, _FROM_S3),
    Case("many", "From S3, 25 trees of depth 5, 32 at once", SMALL, (*_FROM_S3, "get-object-only"), 32),
    Case("disk-small", "From the local disk, 25 trees of depth 5 (UBJSON), one after another", SMALL, _FROM_DISK),
    Case("disk-medium", "From the local disk, 100 trees of depth 6 (UBJSON), one after another", MEDIUM, _FROM_DISK),
    Case("disk-small-apart", "From the local disk, 25 trees, 20 ms after another", SMALL, _APART, apart=True),
    Case("disk-medium-apart", "From the local disk, 100 trees, 20 ms after another", MEDIUM, _APART, apart=True),
    Case("json", "A JSON artifact: from the disk tier, and the first time", AS_JSON, _JSON),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    calls: int
    """Of a case of one client; a tenth of it with JSON."""
    apart: float
    """Seconds between two calls that are not to follow each other at once."""
    many: int
    """Calls where many are made at once."""
    json_trees: int
    overwrites: int
    stretches: int
    """As many quiet ones, and as many with their share of the overwrites, in turn."""
    pause: float
    """Seconds from one overwrite to the next, if that is done by then."""


FULL = Plan(rounds=7, calls=50, apart=0.02, many=500, json_trees=500, overwrites=100, stretches=10, pause=0.1)
QUICK = Plan(rounds=1, calls=10, apart=0.001, many=32, json_trees=25, overwrites=2, stretches=2, pause=0.02)

CLAIMS = (
    Claim("A first call from S3, 25 trees, takes at most 1.5 times get_object, load_model and predict",
          "s3-small", "p50_ratio", 1.5, True, "s3"),
    Claim("A first call from S3, 100 trees, takes at most 1.5 times get_object, load_model and predict",
          "s3-medium", "p50_ratio", 1.5, True, "s3"),
    Claim("A first call from the disk tier, 25 trees, takes at most 1.5 times read, load_model and predict in a loop",
          "disk-small", "p50_ratio", 1.5, True, "disk", bare="read-elsewhere"),
    Claim("A first call from the disk tier, 100 trees, takes at most 1.5 times read, load_model and predict in a loop",
          "disk-medium", "p50_ratio", 1.5, True, "disk", bare="read-elsewhere"),
    Claim("A first call from the disk tier, 25 trees, takes at most 1.5 times the same by hand, 20 ms after another",
          "disk-small-apart", "p50_ratio", 1.5, True, "disk", bare="read-elsewhere"),
    Claim("A first call from the disk tier, 100 trees, takes at most 1.5 times the same by hand, 20 ms after another",
          "disk-medium-apart", "p50_ratio", 1.5, True, "disk", bare="read-elsewhere"),
    Claim("A JSON artifact loads from the disk tier in at most a fifth of the time that its first load takes",
          "json", "p50_ratio", 0.2, True, "disk"),
    Claim("With 32 first calls at once there are at least 0.7 times as many per second as get_object alone brings",
          "many", "calls_ratio", 0.7, False, "s3"),
)  # fmt: skip


def main() -> None:
    """Measure, report, write."""
    options = parse(make_parser(__doc__, RIVALS), FULL, QUICK)
    with tempfile.TemporaryDirectory(prefix="modelcache-cold-") as folder:
        results = measure(Path(folder), options.plan, [case.among(options.rivals) for case in CASES])
    results["claims"] = check_claims(CLAIMS, results["cases"])
    tables = make_tables(results)
    publish(
        "cold", results, tables, _claims(results),
        page=_page(results, tables), plot=plot_cold, folder=options.output,
    )  # fmt: skip


# Measuring


def measure(folder: Path, plan: Plan, cases: list[Case]) -> dict[str, Any]:
    """Let the rivals take turns, then overwrite a model, and return everything that was seen."""
    results = report.environment("modelcache", "aiobotocore", "xgboost-cpu", "numpy") | {
        "benchmark": "cold",
        "settings": asdict(plan) | {"connections": CONNECTIONS, "callers": CALLERS, "environment": ENVIRONMENT},
    }
    keys = list(dict.fromkeys(rival for case in cases for rival in case.rivals))
    results["rivals"] = {key: {"label": RIVALS[key].label, "predicts": RIVALS[key].predicts} for key in keys}
    results["versions"]["rclone"] = s3_server.version().removeprefix("rclone ")
    make_bucket(folder, versions=plan.overwrites, json_trees=plan.json_trees)
    offers = _offers(folder, plan, cases)
    (folder / "buckets" / BUCKET / NAME).write_bytes((folder / "versions" / "0").read_bytes())
    with s3_server.s3_server(folder / "buckets") as environment, ExitStack() as stack:
        contenders = {
            key: stack.enter_context(Contender(key, folder, script="cold_rivals.py", environment=environment))
            for key in keys
        }
        results["cases"] = _take_turns(contenders, plan, cases, offers)
    with s3_server.s3_server(folder / "buckets", niceness=replacing.NICE) as environment:
        results["swaps"] = replacing.measure(
            folder, environment, overwrites=plan.overwrites, stretches=plan.stretches, pause=plan.pause
        )
    return results


def _offers(folder: Path, plan: Plan, cases: list[Case]) -> dict[tuple[int, str, str], Names]:
    """Make all objects before the server starts: names for each rival of each case in each round, and to warm up."""
    return {
        (number, case.key, rival): offer(folder, case.kind, _calls(case, plan), f"{case.key}_{number}_{rival}")
        for number in range(-1, plan.rounds)
        for case in cases
        for rival in case.rivals
    }


def _calls(case: Case, plan: Plan) -> int:
    if case.concurrency > 1:
        return plan.many
    return plan.calls // 10 if case.kind == AS_JSON else plan.calls


def _take_turns(
    contenders: dict[str, Contender], plan: Plan, cases: list[Case], offers: dict[tuple[int, str, str], Names]
) -> list[dict[str, Any]]:
    seen: dict[tuple[str, str], list[Round]] = {}
    with Progress(transient=True) as progress:
        for number in progress.track(range(-1, plan.rounds), description="Rounds"):
            for case in cases:
                for rival in case.rivals:
                    pause = plan.apart if case.apart else 0.0
                    found = _turn(case, contenders[rival], offers[number, case.key, rival], pause)
                    if number >= 0:  # the one before opens connections, and has each library warm up
                        seen.setdefault((case.key, rival), []).append(found)
            for contender in contenders.values():
                contender.forget()
    return [
        entry(case.key, case.title, rival, seen[case.key, rival], seen[case.key, case.yardstick])
        for case in cases
        for rival in case.rivals
    ]


def _turn(case: Case, contender: Contender, names: Names, pause: float) -> Round:
    if contender.key == "disk":  # it is the second load that is measured
        contender.ask_first(ONE, case.concurrency, names)
        contender.forget()
    return contender.ask_first(ONE, case.concurrency, names, pause=pause)


# Reporting


def make_tables(results: dict[str, Any]) -> list[report.Table]:
    """Return one table per case, and one of the overwrites."""
    tables = [
        case_table(case.title, [entry for entry in results["cases"] if entry["case"] == case.key], results["rivals"])
        for case in CASES
    ]
    return [*tables, replacing.make_table(results)]


def _claims(results: dict[str, Any]) -> Iterator[str]:
    yield from map(claim_line, results["claims"])
    for claim in results["swaps"]["claims"]:
        yield f"{'Met' if claim['met'] else 'NOT MET'}: {claim['claim']}: {claim['seen']}."


def _page(results: dict[str, Any], tables: list[report.Table]) -> str:
    settings = results["settings"]
    notes = f"""
* Medians of {settings["rounds"]} interleaved rounds, after one that is not counted: {settings["calls"]} first calls of
  one client ({settings["calls"] // 10} of JSON), {settings["many"]} where many are made at once. "rounds": the least
  and the most of the rounds' p50. Ratios are relative to the rival at 1.00x, taken within each round.
* "stable" is NO when the interquartile range of the rounds' p50 or calls/s is over {report.STEADY:.0%} of the median:
  believe the order of magnitude, not the digits.
* All share the machine with the S3 server, which takes part of its cores: at many calls at once it is as much the
  server's speed that is measured as the clients'.
* By hand, the object's key is known. modelcache is given it too, but for "name without suffix": there it looks for
  NAME.tar.gz and NAME.ubj, at once, in each of these calls.
* "on the loop" lets everything else in the app wait while it reads, loads or predicts: the floor. What is read from the
  disk is in the page cache; modelcache checks its SHA-256 besides, and all it loads is measured.
* The bare worker reads, loads and predicts in one other process, whose Python does nothing else. It has no digest, no
  measured heap, no bound on the memory, no second worker, and reports nothing.
* One right after another, the loop by hand does nothing else and has the processor's caches to itself; modelcache's
  steps are in two processes, each of which waits for the other. A first call in an app comes after something else: that
  is what the cases with {1000 * settings["apart"]:g} ms between two calls are for (calls/s says nothing there).
* The JSON artifact has {settings["json_trees"]} trees of depth 6. Its copy in the disk tier is UBJSON.
* Correct: every answer is compared with `Booster.predict(DMatrix(rows))`, bit for bit.
* Overwriting: {settings["overwrites"]} versions, one every {settings["pause"]:g} s, in {settings["stretches"]}
  stretches with quiet ones of the same length between them, and others in which a process that has to do with none of
  this computes for {1000 * replacing.COMPUTES:g} ms each time; `refresh(name)` follows each overwrite. The clients are
  in the serving process; the server of the bucket, and the process that writes it, have the processor when nobody else
  wants it (`nice`): they are on other machines as a rule. "of no version": an answer that is neither that of the
  version which the last refresh before the call returned, nor of one that was asked for since."""
    claims = "\n".join(f"* {line}" for line in _claims(results))
    parts = ("## First calls, and new versions", report.describe(results), "![plot](cold.png)", claims)
    return "\n\n".join([*parts, *(table.markdown() for table in tables), "### How to read this" + "\n" + notes]) + "\n"


if __name__ == "__main__":
    main()
