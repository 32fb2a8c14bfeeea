"""What a new version of a model costs those who call it: the process that gives the orders, and the table.

Three kinds of stretches take turns. In quiet ones eight clients call one model. In others it is overwritten and
refreshed again and again. And in others a process that has to do with none of this computes for as long as a worker
takes to load the new version: what that does to the calls, the machine does, which has no processor left for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from botocore.session import Session

import report
from cold_models import BUCKET
from harness import Contender
from swapping import NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NICE = 19
"""Who writes the bucket, and its server, have the processor when nobody else wants it: they are elsewhere as a rule."""

COMPUTES = 0.002
"""Seconds that a worker takes to load a new version, about."""

_SPINNER = """
import sys, time
for line in sys.stdin:
    end = time.perf_counter() + float(line)
    while time.perf_counter() < end:
        pass
"""

_LABELS = {
    "quiet": "quiet",
    "computing": f"another process computes for {1000 * COMPUTES:g} ms",
    "overwriting": "overwritten and refreshed",
}

Stretch = dict[str, Any]


def measure(
    folder: Path, environment: dict[str, str], *, overwrites: int, stretches: int, pause: float
) -> dict[str, Any]:
    """Overwrite the model so many times, ``pause`` seconds apart, in so many stretches, and return what was seen."""
    versions, share = iter(range(1, overwrites + 1)), overwrites // stretches
    seen: dict[str, list[Stretch]] = {kind: [] for kind in _LABELS}
    refreshes: list[float] = []
    client = _client(environment)
    with (
        _spinner() as compute,
        Contender("swapping", folder, script="swapping.py", environment=environment) as contender,
    ):

        def overwrite() -> None:
            version = folder / "versions" / str(next(versions))
            client.put_object(Bucket=BUCKET, Key=NAME, Body=version.read_bytes())
            refreshes.append(contender.order(do="refresh")["seconds"])

        os.nice(NICE)
        actions = {"quiet": lambda: None, "computing": compute, "overwriting": overwrite}
        for _ in range(stretches):
            for kind, act in actions.items():
                seen[kind].append(_stretch(contender, act, share, pause))
    return _summary(seen, refreshes)


def _stretch(contender: Contender, act: Callable[[], None], times: int, pause: float) -> Stretch:
    contender.order(do="begin")
    for _ in range(times):
        until = time.monotonic() + pause
        act()
        time.sleep(max(0.0, until - time.monotonic()))
    return contender.order(do="end")


@contextmanager
def _spinner() -> Iterator[Callable[[], None]]:
    """Yield what lets another process compute for a while."""
    with subprocess.Popen([sys.executable, "-c", _SPINNER], stdin=subprocess.PIPE, text=True) as process:
        stdin = process.stdin
        assert stdin is not None

        def compute() -> None:
            stdin.write(f"{COMPUTES}\n")
            stdin.flush()

        yield compute


def _client(environment: dict[str, str]) -> Any:
    """Return a blocking client: this process has nothing else to do."""
    return Session().create_client(
        "s3", endpoint_url=environment["AWS_ENDPOINT_URL_S3"], region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"], aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


def _summary(seen: dict[str, list[Stretch]], refreshes: list[float]) -> dict[str, Any]:
    limit = 3 * float(np.percentile(_seconds(seen["quiet"]), 99))
    swaps: dict[str, Any] = {kind: _calls_seen(stretches, limit) for kind, stretches in seen.items()}
    swaps |= {
        "limit": round(limit * 1e6, 1),
        "refresh": {"overwrites": len(refreshes), **_percentiles(refreshes)},
    }
    return swaps | {"claims": _check(swaps)}


def _seconds(stretches: list[Stretch]) -> list[float]:
    return [seconds for stretch in stretches for seconds in stretch["calls"]]


def _calls_seen(stretches: list[Stretch], limit: float) -> dict[str, Any]:
    """Return the times of all calls in microseconds, and how many took more than ``limit`` seconds."""
    seconds = _seconds(stretches)
    return {
        "calls": len(seconds),
        **_percentiles(seconds),
        "slow": sum(taken > limit for taken in seconds),
        "failed": sum(stretch["failed"] for stretch in stretches),
        "stale": sum(stretch["stale"] for stretch in stretches),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    found = np.percentile(seconds, (50, 99, 99.9, 100)) * 1e6
    return {name: round(float(value), 1) for name, value in zip(("p50", "p99", "p99.9", "max"), found, strict=True)}


def _check(swaps: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the claims about overwriting, and what was seen of them."""
    seen, quiet, computing = swaps["overwriting"], swaps["quiet"], swaps["computing"]
    slow = (
        f"{seen['slow']:,} of {seen['calls']:,} did, the longest {seen['max'] / 1000:,.1f} ms; while nothing was "
        f"overwritten {quiet['slow']:,} of {quiet['calls']:,} did; and while nothing was, but another process computed "
        f"for {1000 * COMPUTES:g} ms each time, {computing['slow']:,} of {computing['calls']:,}"
    )
    text = f"{swaps['refresh']['overwrites']} overwrites let no call"
    limit = f"{text} take more than 3 times the quiet p99, which is {swaps['limit'] / 1000:.1f} ms"
    current = "Each answer is from the version that was current when the call was made, or from a newer one"
    return [
        {"claim": f"{text} fail", "met": not seen["failed"], "seen": f"{seen['failed']:,} did"},
        {"claim": limit, "met": not seen["slow"], "seen": slow},
        {"claim": current, "met": not seen["stale"], "seen": f"{seen['stale']:,} were not"},
    ]


def make_table(results: dict[str, Any]) -> report.Table:
    """Return the table of the overwrites."""
    settings, swaps = results["settings"], results["swaps"]
    rows = [
        (label, f"{calls['calls']:,}", *_times(calls), *(f"{calls[name]:,}" for name in ("slow", "failed", "stale")))
        for label, calls in ((label, swaps[kind]) for kind, label in _LABELS.items())
    ]
    rows.append(("refresh itself", str(swaps["refresh"]["overwrites"]), *_times(swaps["refresh"]), "", "", ""))
    columns = ("", "calls", "p50 µs", "p99 µs", "p99.9 µs", "max µs", "over 3x quiet p99", "failed", "of no version")
    return report.Table(f"A model is replaced while {settings['callers']} clients call it", columns, rows)


def _times(seen: dict[str, Any]) -> tuple[str, ...]:
    return tuple(report.short(seen[name]) for name in ("p50", "p99", "p99.9", "max"))
