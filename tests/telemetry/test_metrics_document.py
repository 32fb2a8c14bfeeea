"""docs/metrics.md: its table is what is exported, and what else it names is there."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from pythonjsonlogger.json import JsonFormatter
from starlette.applications import Starlette

from modelcache import MemoryStore, ModelRegistry
from telemetry_exported import exported

if TYPE_CHECKING:
    import pytest
    from prometheus_client.registry import Collector

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "metrics.md").read_text()


def test_the_table_is_what_is_exported() -> None:
    """Names, types, labels, units, meanings, in the order of a scrape."""
    table = DOCUMENT.partition("<!-- metrics -->")[2].partition("<!-- /metrics -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert rows == [
        [
            f"`{metric.name}`",
            metric.kind,
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.unit,
            metric.meaning,
        ]
        for metric in exported()
    ]


def test_every_name_in_the_text_is_exported() -> None:
    """In queries and in the comparison with CloudWatch, too."""
    known = {metric.name for metric in exported()} | {name for metric in exported() for name in metric.series}
    named = set(re.findall(r"(?<![\w/])modelcache_\w+", DOCUMENT))
    assert named - known == set()


def test_names_follow_the_conventions_of_prometheus() -> None:
    """One prefix, base units, counters and only they end in _total, every meaning is a sentence."""
    for metric in exported():
        assert metric.name.startswith("modelcache_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.meaning.endswith(".") and metric.meaning[0].isupper()
        assert not re.search(r"_(ms|milliseconds|mib|kb|percent)\b", metric.name)
        assert metric.kind != "histogram" or metric.unit == "seconds"


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, in an app that has a registry."""
    configured: list[logging.Handler] = []
    registered: list[Collector] = []
    monkeypatch.setattr(logging, "basicConfig", lambda *, level, handlers: configured.extend(handlers))
    monkeypatch.setattr(REGISTRY, "register", registered.append)
    names: dict[str, Any] = {"app": Starlette(), "registry": ModelRegistry(MemoryStore())}
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    assert [type(handler.formatter) for handler in configured] == [JsonFormatter]
    assert len(registered) == len(names["app"].routes) == 1
