"""What all benchmarks report alike: where they ran, medians with their spread, tables, and the files of results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).resolve().parent / "results"

STEADY = 0.2
"""Interquartile range over the rounds, relative to the median: a figure that varies more is called unstable."""

_BUSY = 0.5
"""Load average per core from which a machine is called busy."""


def environment(*packages: str) -> dict[str, Any]:
    """Return when, where and with which versions a benchmark runs."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": f"{platform.system()} {platform.release()}",
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": f"{platform.python_implementation()} {platform.python_version()}"}
        | {package: _version(package) for package in packages},
    }


def describe(environment: dict[str, Any]) -> str:
    """Return it in a paragraph."""
    machine, versions = environment["machine"], environment["versions"]
    busy = machine["load_average"] > _BUSY * machine["cores"]
    return (
        f"{environment['date']}, `{environment['command']}`, on {machine['processor']}, {machine['usable_cores']} "
        f"usable cores, {machine['memory_gb']} GB, {machine['system']}, load average {machine['load_average']} before "
        f"the start{' (**the machine was busy**)' if busy else ''}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    )


def _version(package: str) -> str:
    if package == "modelcache":  # measured as it lies beside the benchmarks, installed or not
        source = (RESULTS.parent.parent / "modelcache" / "__init__.py").read_text()
        return next(line.split('"')[1] for line in source.splitlines() if line.startswith("__version__"))
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of the rounds, the least and the most of them, and whether they agree."""
    low, median, high = np.percentile(values, (25, 50, 75))
    steady = bool(high - low <= STEADY * median)
    return {
        "median": _figure(median),
        "min": _figure(min(values)),
        "max": _figure(max(values)),
        "steady": steady,
    }


def _figure(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first column is to the left, the others to the right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    highlighted: str = ""
    """Rows whose first cell begins so are shown in bold."""

    def markdown(self) -> str:
        """Return it for a page."""
        rule = ["---", *["--:"] * (len(self.columns) - 1)]
        rows = [[f"**{cell}**" if index == 0 and self._stands_out(row) else cell for index, cell in enumerate(row)]
                for row in self.rows]  # fmt: skip
        lines = ["| " + " | ".join(row) + " |" for row in [list(self.columns), rule, *rows]]
        return "\n".join([f"### {self.title}", "", *lines, ""])

    def rich(self) -> RichTable:
        """Return it for a terminal."""
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for index, column in enumerate(self.columns):
            heading = column.replace(" ", "\n") if index else column
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row, style="bold" if self._stands_out(row) else None)
        return table

    def _stands_out(self, row: tuple[str, ...]) -> bool:
        return bool(self.highlighted) and row[0].startswith(self.highlighted)


def console() -> Console:
    """Return a console that is wide enough for the tables even where there is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the raw figures."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def times(ratio: float) -> str:
    """Return a ratio as it is read: 0.52x, 12.3x."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def short(value: float) -> str:
    """Return a figure with the digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
