"""What the rounds of rivals come to: medians and ratios for each case, a table of them, and what they say of claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Round = dict[str, float]

FIGURES = ("p50", "p90", "p99", "calls_per_second", "cpu_per_call")


def dealt_out(rounds: int, starts: int) -> list[int]:
    """Return how many of so many ``rounds`` follow each of so many ``starts``, one at least."""
    starts = min(starts, rounds)
    return [rounds // starts + (number < rounds % starts) for number in range(starts)]


def entry(case: str, title: str, rival: str, rounds: list[Round], yardstick: list[Round]) -> dict[str, Any]:
    """Return what is known of one rival in one case; ratios to the ``yardstick`` are taken within each round."""
    return {
        "case": case,
        "title": title,
        "rival": rival,
        "correct": not any(seen["wrong"] for seen in rounds),
        "answers_compared": sum(int(seen["calls"]) for seen in rounds),
        "stable": _is_stable(rounds),
        **{figure: report.summary([seen[figure] for seen in rounds]) for figure in FIGURES},
        "p50_ratio": _ratio(rounds, yardstick, "p50"),
        "calls_ratio": _ratio(rounds, yardstick, "calls_per_second"),
        "rounds": rounds,
    }


def _is_stable(rounds: list[Round]) -> bool:
    return all(report.summary([seen[figure] for seen in rounds])["steady"] for figure in ("p50", "calls_per_second"))


def _ratio(rounds: list[Round], yardstick: list[Round], figure: str) -> dict[str, Any]:
    pairs = zip(rounds, yardstick, strict=True)
    return report.summary([mine[figure] / others[figure] for mine, others in pairs])


# Tables


def case_table(title: str, entries: Sequence[dict[str, Any]], rivals: Mapping[str, dict[str, Any]]) -> report.Table:
    """Return the entries of one case as a table, the fastest first."""
    columns = (
        "rival", "p50 µs", "rounds", "p90 µs", "p99 µs", "calls/s", "p50 ratio", "calls/s ratio", "CPU µs", "stable",
        "correct",
    )  # fmt: skip
    ordered = sorted(entries, key=lambda entry: float(entry["p50"]["median"]))
    rows = [_case_row(entry, rivals[entry["rival"]]) for entry in ordered]
    return report.Table(title, columns, rows, highlighted="modelcache")


def _case_row(entry: dict[str, Any], rival: dict[str, Any]) -> tuple[str, ...]:
    p50 = entry["p50"]
    return (
        rival["label"],
        report.short(p50["median"]),
        f"{report.short(p50['min'])} to {report.short(p50['max'])}",
        *(report.short(entry[figure]["median"]) for figure in ("p90", "p99", "calls_per_second")),
        report.times(entry["p50_ratio"]["median"]),
        report.times(entry["calls_ratio"]["median"]),
        report.short(entry["cpu_per_call"]["median"]),
        "yes" if entry["stable"] else "NO",
        correctness(entry, predicts=rival["predicts"]),
    )


def correctness(entry: dict[str, Any], *, predicts: bool) -> str:
    """Return what the comparison of all answers has come to."""
    wrong = sum(int(seen["wrong"]) for seen in entry["rounds"])
    if not entry["correct"]:
        return f"{wrong:,} WRONG"
    return f"all {entry['answers_compared']:,}" if predicts else "-"


# Claims


@dataclass(frozen=True)
class Claim:
    """What the project says of itself, to be checked in each run."""

    text: str
    case: str
    figure: str
    limit: float
    at_most: bool
    rival: str = "modelcache"
    against: str = ""
    """Whose figure in the same round it is relative to; if empty, the figure is a ratio to the yardstick already."""
    bare: str = ""
    """The rival that has another process, too, and nothing but XGBoost's call there: what a process takes by itself."""

    def check(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Return what was measured of it, None if its case was left out."""
        by_rival = {entry["rival"]: entry for entry in entries if entry["case"] == self.case}
        ratio = self._measured(by_rival, self.rival)
        if ratio is None:
            return None
        met = ratio["median"] <= self.limit if self.at_most else ratio["median"] >= self.limit
        checked = {"claim": self.text, "limit": self.limit, "met": met, "measured": ratio}
        bare = self._measured(by_rival, self.bare)
        return checked if bare is None else checked | {"bare": bare}

    def _measured(self, by_rival: Mapping[str, dict[str, Any]], rival: str) -> dict[str, Any] | None:
        found, other = by_rival.get(rival), by_rival.get(self.against or rival)
        if found is None or other is None:
            return None
        measured: dict[str, Any] = found[self.figure]
        return _ratio(found["rounds"], other["rounds"], self.figure) if self.against else measured


def check_claims(claims: Sequence[Claim], entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the claims with what was measured."""
    return [checked for claim in claims if (checked := claim.check(entries)) is not None]


def claim_line(claim: dict[str, Any]) -> str:
    """Return what has become of a claim, in a sentence."""
    line = f"{'Met' if claim['met'] else 'NOT MET'}: {claim['claim']}: {_spread(claim['measured'])}."
    return line + (f" A bare worker: {_spread(claim['bare'])}." if "bare" in claim else "")


def _spread(measured: dict[str, Any]) -> str:
    low, high = (report.times(measured[end]) for end in ("min", "max"))
    return f"{report.times(measured['median'])} (rounds: {low} to {high})"
