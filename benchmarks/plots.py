"""The figures of the benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

OURS, FLOOR, OTHERS = "#0b6e4f", "#b8b8b8", "#5b7db1"
"""modelcache, what nobody can beat, what one would write by hand."""

_FLOORS = (
    "direct", "echo", "bare", "http-echo", "relayed-echo", "by-bare-worker", "guarded-echo", "constant",
    "get-object", "get-object-only", "read", "read-elsewhere",
)  # fmt: skip

_LATENCY_PANELS = (
    ("one-1", "p50", "One row, 1 client: p50 in µs", "shorter is better"),
    ("one-64", "calls_per_second", "One row, 64 clients: calls/s", "longer is better"),
    ("thousand-4", "calls_per_second", "1,000 rows, 4 clients: calls/s", "longer is better"),
)


def plot_latency(results: dict[str, Any], path: Path) -> None:
    """Draw three warm cases, and the first call beside the warm one."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for (case, quantity, title, hint), panel in zip(_LATENCY_PANELS, axes.flat, strict=False):
        _bars(panel, results, case, quantity)
        _entitle(panel, title, hint)
    _cold_and_warm(axes.flat[3], results)
    figure.suptitle(
        "modelcache (green), written by hand (blue), floors that block the loop, or have nothing beside (grey)\n"
        f"medians of {results['settings']['rounds']} interleaved rounds, lines from the least to the most",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


_COLD_PANELS = (
    ("s3-small", "p50", "S3, 25 trees: p50 in µs", "shorter is better"),
    ("s3-medium", "p50", "S3, 100 trees: p50 in µs", "shorter is better"),
    ("disk-small", "p50", "Disk, 25 trees: p50 in µs", "shorter is better"),
    ("disk-medium", "p50", "Disk, 100 trees: p50 in µs", "shorter is better"),
    ("many", "calls_per_second", "S3, 25 trees, 32 at once: calls/s", "longer is better"),
    ("json", "p50", "JSON, again and first: p50 in µs", "shorter is better"),
)


def plot_cold(results: dict[str, Any], path: Path) -> None:
    """Draw the first calls of each case."""
    figure, axes = plt.subplots(3, 2, figsize=(17, 10), layout="constrained")
    for (case, quantity, title, hint), panel in zip(_COLD_PANELS, axes.flat, strict=True):
        _bars(panel, results, case, quantity)
        _entitle(panel, title, hint)
    figure.suptitle(
        "First calls: modelcache (green), by hand (blue), by hand with all on the loop, or nothing beside (grey)\n"
        f"medians of {results['settings']['rounds']} interleaved rounds, lines from the least to the most",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_batch(results: dict[str, Any], path: Path) -> None:
    """Draw the microseconds per row over the rows of a call, and calls of one row beside large ones."""
    figure, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    for panel, columns in zip(axes, (6, 50), strict=False):
        _per_row(panel, results, columns)
        _entitle(panel, f"{columns} columns: µs per row, by the rows of a call", "lower is better")
    _bars(axes[2], results, "beside-50", "p99")
    _entitle(axes[2], "One row beside a million of 50 columns: p99 in µs", "shorter is better")
    figure.suptitle(
        "Batches: modelcache (green), written by hand (blue), on the loop, which stands still (grey)\n"
        f"medians of {results['settings']['rounds']} interleaved rounds, lines from the least to the most",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_throughput(results: dict[str, Any], path: Path) -> None:
    """Draw calls/s by clients, and what is answered in time by what is asked for."""
    figure, (closed, opened) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    cases = [entry | {"at": int(entry["case"][4:])} for entry in results["cases"] if entry["case"].startswith("one-")]
    _lines(closed, results, cases, "at", "calls_per_second")
    closed.set_xscale("log", base=4)
    closed.set_yscale("log")
    closed.set_xlabel("clients")
    _entitle(closed, "Closed loop, one row: calls/s", "higher is better")
    _lines(opened, results, results["open"], "share", "goodput_share")
    opened.set_xlabel("calls asked for, of the capacity")
    opened.set_ylim(bottom=0)
    _entitle(opened, "Open loop: answered in time, of the capacity", "higher is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_scaling(results: dict[str, Any], path: Path) -> None:
    """Draw the calls of one hot model, of ten, and of one client with many rows."""
    figure, axes = plt.subplots(1, 3, figsize=(17, 3.2), layout="constrained")
    titles = {"hot": "One hot model", "ten": "Ten models", "big": "20,480 rows at once"}
    for (case, title), panel in zip(titles.items(), axes.flat, strict=True):
        _bars(panel, results, case, "calls_per_second")
        _entitle(panel, f"{title}: calls/s", "longer is better")
    figure.suptitle(
        f"16 clients with calls of 64 rows, or one, {results['settings']['trees']} trees: "
        f"medians of {results['settings']['rounds']} interleaved rounds",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_over_http(results: dict[str, Any], path: Path) -> None:
    """Draw one client's p50, and the calls of 64."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.2), layout="constrained")
    _bars(axes[0], results, "one-1", "p50")
    _entitle(axes[0], "One row of CSV, 1 client: p50 in µs", "shorter is better")
    _bars(axes[1], results, "one-64", "calls_per_second")
    _entitle(axes[1], "One row of CSV, 64 clients: calls/s", "longer is better")
    figure.suptitle(f"Over loopback HTTP: medians of {results['settings']['rounds']} interleaved rounds", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


_STYLES = {"process-pool": "--", "direct": ":"}


def _per_row(panel: Axes, results: dict[str, Any], columns: int) -> None:
    sizes = results["settings"]["sizes"]
    p50 = {(entry["case"], entry["rival"]): entry["p50"] for entry in results["cases"]}
    for key in results["rivals"]:
        seen = [p50[f"{rows}x{columns}", key] for rows in sizes]
        colour, style = _colour(results, key), _STYLES.get(key, "-")
        medians = [figure["median"] / rows for figure, rows in zip(seen, sizes, strict=True)]
        panel.plot(sizes, medians, style, color=colour, marker="o", markersize=4, label=_label(results, key))
        low, high = ([figure[end] / rows for figure, rows in zip(seen, sizes, strict=True)] for end in ("min", "max"))
        panel.vlines(sizes, low, high, color=colour, linewidth=1.2)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.legend(frameon=False, fontsize=9)


def plot_isolation(results: dict[str, Any], path: Path) -> None:
    """Draw the warm p99 when it is quiet, and in each storm."""
    figure, axes = plt.subplots(1, 3, figsize=(17, 3), layout="constrained")
    titles = (("quiet", "Quiet"), ("remote", "Storm from a remote store"), ("local", "Storm from a folder"))
    for (case, title), panel in zip(titles, axes.flat, strict=True):
        _bars(panel, results, case, "p99")
        _entitle(panel, f"{title}: p99 in µs", "shorter is better")
    figure.suptitle(
        "Warm calls of one row, 4 clients, while 8 cold loads are in flight: "
        f"medians of {results['settings']['rounds']} interleaved rounds",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(panel: Axes, results: dict[str, Any], entries: list[dict[str, Any]], along: str, quantity: str) -> None:
    """Draw a line per rival; those of one colour differ in their marks."""
    for mark, key in zip("os^Dvx", dict.fromkeys(entry["rival"] for entry in entries), strict=False):
        mine = [entry for entry in entries if entry["rival"] == key]
        places, medians = [entry[along] for entry in mine], [entry[quantity]["median"] for entry in mine]
        panel.plot(places, medians, marker=mark, color=_colour(results, key), label=_label(results, key))
    panel.legend(fontsize=8)


def _bars(panel: Axes, results: dict[str, Any], case: str, quantity: str) -> None:
    """Draw one bar per rival, the best at the top; among calls/s the echo would dwarf all that predict."""
    hidden = "echo" if quantity == "calls_per_second" else ""
    entries = [entry for entry in results["cases"] if entry["case"] == case and entry["rival"] != hidden]
    entries.sort(key=lambda entry: entry[quantity]["median"], reverse=quantity in ("p50", "p99"))
    for place, entry in enumerate(entries):
        seen = entry[quantity]
        panel.barh(place, seen["median"], color=_colour(results, entry["rival"]), height=0.7)
        panel.hlines(place, seen["min"], seen["max"], color="black", linewidth=1.2)
        panel.annotate(
            f"{seen['median']:,.0f}", (max(seen["median"], seen["max"]), place), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    panel.set_yticks(range(len(entries)), [_label(results, entry["rival"]) for entry in entries])
    panel.margins(x=0.13)
    panel.set_xlim(left=0)
    panel.locator_params(axis="x", nbins=6)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _cold_and_warm(panel: Axes, results: dict[str, Any]) -> None:
    """Draw a warm and a first call of each rival on one line."""
    p50 = {(entry["case"], entry["rival"]): entry["p50"] for entry in results["cases"]}
    keys = sorted((key for case, key in p50 if case == "first-1"), key=lambda key: -p50["first-1", key]["median"])
    for place, key in enumerate(keys):
        ends = [p50[case, key] for case in ("one-1", "first-1")]
        warm, cold = (end["median"] for end in ends)
        panel.plot([warm, cold], [place, place], color=_colour(results, key), linewidth=2, alpha=0.4)
        for end in ends:
            panel.hlines(place, end["min"], end["max"], color="black", linewidth=1.2)
        panel.scatter([warm], [place], color="white", edgecolors=_colour(results, key), linewidths=2, s=55, zorder=3)
        panel.scatter([cold], [place], color=_colour(results, key), s=65, zorder=3)
        panel.annotate(
            f"{cold:,.0f}", (ends[1]["max"], place), xytext=(7, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.margins(x=0.15)
    panel.set_yticks(range(len(keys)), [_label(results, key) for key in keys])
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _entitle(panel, "First call (dot), warm (ring): p50 in µs", "log")


def _entitle(panel: Axes, title: str, hint: str) -> None:
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
    panel.set_title(hint, loc="right", fontsize=9, color="grey")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="#e6e6e6")
    panel.set_axisbelow(True)


def _label(results: dict[str, Any], key: str) -> str:
    label: str = results["rivals"][key]["label"]
    return label


def _colour(results: dict[str, Any], key: str) -> str:
    if _label(results, key).startswith("modelcache"):
        return OURS
    return FLOOR if key in _FLOORS else OTHERS


def plot_budget(results: dict[str, Any], path: Path) -> None:
    """Draw the items of a call one after another, and what they are to be compared with below."""
    seen = results["microseconds"]
    figure, panel = plt.subplots(figsize=(12, 4.5), layout="constrained")
    items = [key for key in seen if key not in ("whole", "echo", "direct", "parent_cpu", "worker_cpu")]
    start = 0.0
    for index, item in enumerate(items):
        width = seen[item]["median"]
        shade = mpl.colormaps["viridis"](0.1 + 0.8 * index / len(items))
        panel.barh(3, width, left=start, color=shade, label=f"{item}: {width:.0f}")
        start += width
    others = {"whole": "without clocks", "echo": "echo, no prediction", "direct": "inplace_predict"}
    for place, (key, colour) in enumerate(zip(others, (OURS, FLOOR, OTHERS), strict=True)):
        panel.barh(2 - place, seen[key]["median"], color=colour)
        panel.hlines(2 - place, seen[key]["min"], seen[key]["max"], color="black", linewidth=1.2)
    panel.set_yticks([3, 2, 1, 0], ["item by item", *others.values()])
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False, fontsize=9)
    _entitle(panel, "A warm call of one row: µs", "medians")
    figure.savefig(path, dpi=110)
    plt.close(figure)


_MANY_PANELS = (
    ("ten-1", "p50", "The same ten models, 1 client: p50 in µs", "lower is better"),
    ("uniform-1", "p50", "All models alike, 1 client: p50 in µs", "lower is better"),
    ("uniform-64", "calls_per_second", "All models alike, 64 clients: calls/s", "higher is better"),
    ("zipf-64", "calls_per_second", "Zipf, 64 clients: calls/s", "higher is better"),
)


def plot_many_models(results: dict[str, Any], path: Path) -> None:
    """Draw how four cases change with the number of resident models."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for (case, quantity, title, hint), panel in zip(_MANY_PANELS, axes.flat, strict=True):
        for key in results["rivals"]:
            _line(panel, results, case, quantity, key)
        _entitle(panel, title, hint)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#e6e6e6")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.flat[0].legend(frameon=False)
    figure.suptitle(
        f"Calls of one row by the number of resident models: medians of {results['settings']['rounds']} interleaved "
        "rounds, lines from the least to the most",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(panel: Axes, results: dict[str, Any], case: str, quantity: str, key: str) -> None:
    """Draw one rival over the numbers of models."""
    found = [entry for entry in results["cases"] if (entry["kind"], entry["rival"]) == (case, key)]
    models, colour = [entry["models"] for entry in found], _colour(results, key)
    seen = [entry[quantity] for entry in found]
    panel.plot(models, [one["median"] for one in seen], color=colour, marker="o", label=_label(results, key))
    panel.vlines(models, [one["min"] for one in seen], [one["max"] for one in seen], color=colour, linewidth=1.2)
    panel.set_xscale("log")
    panel.set_xticks(models, [f"{count:,}" for count in models])
    panel.xaxis.set_minor_locator(NullLocator())


def plot_engines(results: dict[str, Any], path: Path) -> None:
    """Draw the lone call with each engine, by the size of the model, and the echo as a line."""
    figure, panel = plt.subplots(figsize=(9, 3.6), layout="constrained")
    cases = results["cases"]
    for offset, (key, label, colour) in zip(
        (0.2, -0.2), (("p50_xgboost", "XGBoost", OTHERS), ("p50_auto", 'engine="auto"', OURS)), strict=True
    ):
        places = [place + offset for place in range(len(cases))]
        panel.barh(places, [1e6 * case[key]["median"] for case in cases], 0.36, color=colour, label=label)
        for place, case in zip(places, cases, strict=True):
            panel.hlines(place, 1e6 * case[key]["min"], 1e6 * case[key]["max"], color="black", linewidth=1.2)
    panel.axvline(1e6 * cases[0]["p50_echo"]["median"], color="grey", linestyle=":", label="echo")
    panel.set_yticks(range(len(cases)), [f"{case['trees']} trees" for case in cases])
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.legend(frameon=False)
    _entitle(panel, "One row, 1 client: p50 in µs", "log; shorter is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)
