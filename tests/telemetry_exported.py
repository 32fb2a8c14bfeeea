"""What the collector exports, by name: for the tests that compare documents with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from modelcache import MemoryStore, ModelRegistry, Summary, WorkerStats
from modelcache.telemetry.prometheus import RegistryCollector

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass(frozen=True)
class Exported:
    """A metric as ``/metrics`` announces it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    series: frozenset[str]
    """The names that queries use."""

    @property
    def unit(self) -> str:
        """Seconds or bytes, if its name says so; else it counts things."""
        return next((unit for unit in ("seconds", "bytes") if self.name.endswith(f"_{unit}")), "")


def exported() -> list[Exported]:
    """Return all metrics of a registry in which something of everything has happened."""
    return [_describe(metric) for metric in RegistryCollector(_eventful()).collect()]


def _describe(metric: Metric) -> Exported:
    name = metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")
    labels = {label for sample in metric.samples for label in sample.labels if label != "le"}
    series = frozenset(sample.name for sample in metric.samples)
    return Exported(name, metric.type, tuple(sorted(labels)), metric.documentation, series)


def _eventful() -> Any:
    stats = replace(
        ModelRegistry(MemoryStore()).stats(),
        worker_deaths={"SIGKILL": 1},
        workers=(WorkerStats(0, 1, 0, 0, 0, Summary()),),
    )
    model = SimpleNamespace(name="m", total_hits=1, size_bytes=1, load_seconds=1.0)
    return SimpleNamespace(stats=lambda: stats, most_used=lambda _: [model])
