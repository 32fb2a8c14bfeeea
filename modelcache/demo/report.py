"""The figures at the end of the demo: the six metrics, and cold against warm calls."""

from __future__ import annotations

from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING

from modelcache.commands.terminal import make_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from modelcache import RegistryStats, Summary, Timings
    from modelcache.demo.story import Call

_PARTS = {
    "downloading": "reading",
    "loading": "loading",
    "predicting": "predicting",
    "waiting": "waiting and passing on",
}
_TIMES = ("model_loading_wait_time", "model_downloading_time", "model_loading_time", "model_unloading_time")


def print_metrics(console: Console, stats: RegistryStats) -> None:
    """Print the six metrics of SageMaker multi-model endpoints."""
    console.print("\nThe six metrics of SageMaker multi-model endpoints\n", style="bold cyan")
    table = make_table("metric", "unit", "count", "mean", "min", "p50", "p90", "p99", "max", text=("metric", "unit"))
    for name in _TIMES:
        _add(table.add_row, name, "ms", getattr(stats, name), lambda seconds: f"{seconds * 1e3:.2f}")
    _add(table.add_row, "model_cache_hit", "", stats.model_cache_hit, lambda ratio: f"{ratio:.2f}")
    _add(table.add_row, "loaded_model_count", "", stats.loaded_model_count, lambda count: f"{count:.0f}")
    console.print(table)


def print_comparison(console: Console, calls: Sequence[Call]) -> None:
    """Print how long cold and warm calls took, and what the time of the cold ones went into."""
    cold, warm = ([call.timings for call in calls if call.cold is is_cold] for is_cold in (True, False))
    console.print("\nCold against warm, in ms, of the calls above one by one\n", style="bold cyan")
    table = make_table("", "calls", "fastest", "median", "p90", "slowest", text=("",))
    for what, timings in (("cold: loads the model first", cold), ("warm: the model is resident", warm)):
        if timings:
            _add_times(table.add_row, what, [each.total for each in timings])
    console.print(table)
    if cold:
        _print_parts(console, cold)


def _print_parts(console: Console, cold: Sequence[Timings]) -> None:
    means = {what: fmean(getattr(each, part) for each in cold) for part, what in _PARTS.items()}
    console.print("\nWhere the time of the cold ones goes, on average:")
    console.print("  " + ", ".join(f"{what} {seconds * 1e3:.2f}" for what, seconds in means.items()))


def _add_times(add_row: Callable[..., None], what: str, seconds: list[float]) -> None:
    p90 = quantiles(seconds, n=10, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    figures = (min(seconds), median(seconds), p90, max(seconds))
    add_row(what, str(len(seconds)), *(f"{each * 1e3:.2f}" for each in figures))


def _add(add_row: Callable[..., None], name: str, unit: str, figures: Summary, show: Callable[[float], str]) -> None:
    values = (figures.mean, figures.min, figures.p50, figures.p90, figures.p99, figures.max)
    add_row(name, unit, str(figures.count), *map(show, values))
