"""The picture of the demo: how long each call took, cold or warm."""

from __future__ import annotations

from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from modelcache.demo.story import Call

_KINDS = {True: ("cold: loads the model first", "#d1495b"), False: ("warm: the model is resident", "#00798c")}
_BINS_PER_DECADE = 12
_WIDE_ENOUGH = 0.15
"""Share of the calls that an act has to have for its name to be written across."""


def draw(calls: Sequence[Call], file: Path) -> None:
    """Draw ``calls`` in their order, and beside it how they are distributed."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    timeline, spread = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    figure.suptitle(_title(calls), fontsize=13, fontweight="bold")
    _draw_acts(timeline, calls)
    for cold, (label, color) in _KINDS.items():
        numbers = [number for number, call in enumerate(calls, 1) if call.cold is cold]
        times = _milliseconds(calls, cold=cold)
        timeline.scatter(numbers, times, s=26, color=color, label=label, alpha=0.85, linewidths=0, zorder=3)
        if times:
            _draw_spread(spread, times, color)
    every = [call.timings.total * 1e3 for call in calls]
    timeline.set_ylim(min(every) / 1.5, max(every) * 3)  # with room for the names of the acts
    _label(timeline, spread)
    figure.savefig(file, dpi=150)


def _title(calls: Sequence[Call]) -> str:
    cold, warm = (_milliseconds(calls, cold=is_cold) for is_cold in (True, False))
    if not cold or not warm:
        return "Latency of each call"
    return f"A warm call takes {median(warm):.2g} ms, a cold one {median(cold):.2g} ms (medians)"


def _draw_acts(axes: Axes, calls: Sequence[Call]) -> None:
    """Shade every other act, and name them all."""
    start = 0.5
    for place, (act, members) in enumerate(groupby(calls, key=lambda call: call.act)):
        end = start + len(list(members))
        if place % 2:
            axes.axvspan(start, end, color="0.93", linewidth=0, zorder=0)
        narrow = end - start < _WIDE_ENOUGH * len(calls)
        axes.annotate(
            act, ((start + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, -6),
            textcoords="offset points", ha="center", va="top", rotation=90 if narrow else 0, fontsize=9, color="0.35",
        )  # fmt: skip
        start = end
    axes.set_xlim(0.5, start)


def _draw_spread(axes: Axes, times: list[float], color: str) -> None:
    low, high = np.floor(np.log10(min(times))), np.floor(np.log10(max(times))) + 1
    bins = np.logspace(low, high, int(high - low) * _BINS_PER_DECADE + 1)
    axes.hist(times, bins=list(bins), orientation="horizontal", color=color, alpha=0.85, zorder=3)
    middle = median(times)
    axes.axhline(middle, color=color, linewidth=1, linestyle="--", zorder=2)
    axes.annotate(
        f"{middle:.2g} ms", (1, middle), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", fontsize=9, color=color, fontweight="bold",
    )  # fmt: skip


def _label(timeline: Axes, spread: Axes) -> None:
    timeline.set_yscale("log")
    timeline.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    timeline.yaxis.set_minor_formatter(NullFormatter())
    timeline.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    timeline.set(xlabel="calls, in the order they were made", ylabel="time of the call in ms (log scale)")
    spread.set(xlabel="number of calls", xlim=(0, 1.5 * spread.get_xlim()[1]))  # with room for the medians
    spread.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    timeline.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    for axes in (timeline, spread):
        axes.grid(axis="y", which="major", color="0.85", zorder=1)
        axes.spines[["top", "right"]].set_visible(False)


def _milliseconds(calls: Sequence[Call], *, cold: bool) -> list[float]:
    return [call.timings.total * 1e3 for call in calls if call.cold is cold]
