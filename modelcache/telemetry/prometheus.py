"""Figures of a registry for Prometheus: a collector for whoever has a ``/metrics`` already, and an app for the others.

Nothing is counted here: each scrape reads ``registry.stats()`` and the most used models. Distributions are histograms,
not summaries: percentiles that a process works out for itself never age, and cannot be added up over several processes.
"""

from __future__ import annotations

import asyncio
import gzip
import platform
from contextlib import suppress
from typing import TYPE_CHECKING, get_args

import modelcache
from modelcache.errors import (
    BudgetTimeoutError,
    LoadTimeoutError,
    MissingDependencyError,
    ModelCacheError,
    ModelLoadError,
    ModelNotFoundError,
    ModelTooLargeError,
    StoreError,
    WorkerCrashedError,
)
from modelcache.records import EvictionCause, Summary

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.exposition import choose_encoder, gzip_accepted
    from prometheus_client.registry import Collector
    from prometheus_client.utils import floatToGoString
except ImportError as error:
    raise MissingDependencyError(
        "modelcache.telemetry.prometheus needs prometheus_client: pip install 'modelcache[prometheus]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

    from modelcache.records import ModelInfo, RegistryStats, WorkerStats
    from modelcache.registry import ModelRegistry

_LOADS = range(-13, 10)
"""Powers of two that are bounds of buckets, in seconds: 0.1 ms to 8 minutes,"""
_PREDICTIONS = range(-15, 4)
"""30 microseconds to 8 seconds,"""
_AGES = range(17)
"""and a second to 18 hours."""
_TEXTS = tuple(map(floatToGoString, Summary.bounds))

_LOAD_ERRORS = (
    BudgetTimeoutError, LoadTimeoutError, ModelLoadError, ModelNotFoundError, ModelTooLargeError, StoreError,
    WorkerCrashedError,
)  # fmt: skip
"""What a load can end with; subclasses, too."""

_DEATHS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGTERM", "exit code 1", "unknown")
"""What workers usually die of: a series that is there from the start shows the first of them, too."""

_ATTEMPTS = 9
"""To read figures from another thread, each of which meets a change only now and then."""


class RegistryCollector(Collector):
    """A collector of ``prometheus_client``: ``REGISTRY.register(RegistryCollector(registry))``.

    The ``models`` most used of the resident models have series of their own. Any thread may scrape it, before the start
    of the registry and after its end, too.
    """

    def __init__(self, registry: ModelRegistry, *, models: int = 100) -> None:
        self._registry = registry
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; between two of them the loop may run."""
        stats = self._stats()
        yield from _counters(stats)
        yield from _gauges(stats)
        yield from _distributions(stats)
        yield from _of_workers(stats.workers)
        yield from _of_models(self._registry.most_used(self._models))
        yield InfoMetricFamily(
            "modelcache_build",
            "The versions of modelcache and Python; always 1.",
            {"version": modelcache.__version__, "python": platform.python_version()},
        )

    def _stats(self) -> RegistryStats:
        for _ in range(_ATTEMPTS - 1):
            with suppress(RuntimeError):  # in another thread a model has been used, just as the oldest was looked up
                return self._registry.stats()
        return self._registry.stats()


def metrics_app(registry: ModelRegistry, *, models: int = 100) -> ASGIApp:
    """Return an ASGI app that answers each request with the metrics, in the format and coding that is asked for.

    It runs on the registry's event loop, and lets that go on after each metric: the longest step takes 2 to 3 ms with
    10,000 resident models. Whoever has other metrics to show beside these registers a :class:`RegistryCollector`.
    """
    return _App(RegistryCollector(registry, models=models))


class _App:
    """No function, since Starlette takes functions for handlers of its own kind, and objects for apps."""

    def __init__(self, collector: RegistryCollector) -> None:
        self._collector = collector

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        assert scope["type"] == "http", "it answers HTTP requests only"
        encode, media_type = choose_encoder(_header(scope, b"accept"))
        body = await _render(self._collector.collect(), encode)
        headers = [(b"content-type", media_type.encode()), (b"vary", b"accept, accept-encoding")]
        if gzip_accepted(_header(scope, b"accept-encoding")):
            body = gzip.compress(body)
            headers.append((b"content-encoding", b"gzip"))
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


async def _render(metrics: Iterable[Metric], encode: Callable[[Collector], bytes]) -> bytes:
    """Encode one metric at a time, since a text of hundreds of lines takes milliseconds."""
    end = encode(_Few([]))
    parts = []
    for metric in metrics:
        await asyncio.sleep(0)
        parts.append(encode(_Few([metric])).removesuffix(end))
        await asyncio.sleep(0)
    return b"".join([*parts, end])


class _Few(Collector):
    """Some metrics, as encoders want them."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _counters(stats: RegistryStats) -> Iterator[Metric]:
    counter = CounterMetricFamily
    yield counter("modelcache_requests", "Calls for a model, those that were rejected left out.", stats.requests)
    yield counter("modelcache_hits", "Calls whose model was resident.", stats.hits)
    yield counter("modelcache_joins", "Calls that shared a load which another had started.", stats.joins)
    yield counter(
        "modelcache_rejected_requests", "Calls refused since queue_limit calls waited for the worker.", stats.rejected
    )
    tiers = {"store": stats.loads - stats.loads_from_disk, "disk": stats.loads_from_disk}
    yield _by("modelcache_loads", "Models loaded, by where their bytes came from.", "tier", tiers)
    failures = dict.fromkeys(_names(_LOAD_ERRORS), 0) | dict(stats.load_failures_by_error)
    yield _by("modelcache_load_failures", "Loads that failed, by the class of the error.", "error", failures)
    yield counter("modelcache_refreshes", "New versions that took the place of older ones.", stats.refreshes)
    causes = {cause: stats.evictions.get(cause, 0) for cause in get_args(EvictionCause)}
    yield _by("modelcache_evictions", "Models that left memory, by cause.", "cause", causes)
    yield counter(
        "modelcache_copies_made", "Copies of hot models that were made in further workers.", stats.copies_made
    )
    yield counter("modelcache_worker_restarts", "Workers that took the place of dead ones.", stats.worker_restarts)
    deaths = dict.fromkeys(_DEATHS, 0) | dict(stats.worker_deaths)
    yield _by("modelcache_worker_deaths", "Workers that died, by the signal or exit code.", "reason", deaths)


def _by(name: str, help_text: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _names(kinds: Iterable[type[ModelCacheError]]) -> Iterator[str]:
    """Give the names of error classes and of their subclasses; those of a store's own show when they come."""
    for kind in kinds:
        if kind.__module__ == ModelCacheError.__module__:
            yield kind.__name__
            yield from _names(kind.__subclasses__())


def _gauges(stats: RegistryStats) -> Iterator[Metric]:
    gauge = GaugeMetricFamily
    yield gauge("modelcache_models", "Resident models.", stats.models)
    yield gauge(
        "modelcache_loads_in_progress", "Loads under way, those that wait for their turn among them.", stats.loading
    )
    yield gauge("modelcache_copies", "Copies of hot models in further workers.", stats.copies)
    yield gauge("modelcache_memory_budget_bytes", "What all resident models may take together.", stats.budget)
    memory = gauge(
        "modelcache_memory_bytes",
        "Bytes of the budget in use: of resident models, reserved for loads, and not yet free of models that left.",
        labels=["state"],
    )
    for state in ("resident", "reserved", "unloading"):
        memory.add_metric([state], getattr(stats, f"bytes_{state}"))
    yield memory
    yield gauge("modelcache_disk_bytes", "Bytes of local copies; 0 without a disk cache.", stats.bytes_on_disk)
    yield gauge("modelcache_lru_age_seconds", "Time since the least recently used model was used.", stats.lru_age)


def _distributions(stats: RegistryStats) -> Iterator[Metric]:
    def distribution(name: str, help_text: str, summary: Summary, exponents: range = _LOADS) -> Metric:
        family = HistogramMetricFamily(name, help_text)
        _add(family, [], summary, exponents)
        return family

    yield distribution(
        "modelcache_model_loading_wait_seconds",
        "Time that calls waited for their model to be loaded.",
        stats.model_loading_wait_time,
    )
    yield distribution(
        "modelcache_model_downloading_seconds", "Time that each download took.", stats.model_downloading_time
    )
    yield distribution(
        "modelcache_model_loading_seconds", "Time that each load took in the worker.", stats.model_loading_time
    )
    yield distribution(
        "modelcache_model_unloading_seconds",
        "Time from the order to unload to the bytes being free.",
        stats.model_unloading_time,
    )
    yield distribution(
        "modelcache_eviction_age_seconds",
        "Time since its last use of each model evicted to make room.",
        stats.age_at_eviction,
        _AGES,
    )


def _of_workers(workers: Iterable[WorkerStats]) -> Iterator[Metric]:
    models = GaugeMetricFamily("modelcache_worker_models", "Models and copies in each worker.", labels=["worker"])
    charged = GaugeMetricFamily(
        "modelcache_worker_charged_bytes",
        "Bytes of the models of each worker, and of loads into it.",
        labels=["worker"],
    )
    depth = GaugeMetricFamily("modelcache_worker_queue_depth", "Calls that wait for each worker.", labels=["worker"])
    latency = HistogramMetricFamily(
        "modelcache_predict_seconds", "Time from sending rows to a worker to its answer.", labels=["worker"]
    )
    for worker in workers:
        labels = [str(worker.index)]
        models.add_metric(labels, worker.models)
        charged.add_metric(labels, worker.charged_bytes)
        depth.add_metric(labels, worker.queue_depth)
        _add(latency, labels, worker.predict_latency, _PREDICTIONS)
    return iter((models, charged, depth, latency))


def _add(family: HistogramMetricFamily, labels: list[str], summary: Summary, exponents: range) -> None:
    below = summary.below or (0,) * len(Summary.bounds)
    first = Summary.bounds.index(2.0**exponents.start)
    places = range(first, first + len(exponents))
    buckets: list[tuple[str, float]] = [(_TEXTS[place], below[place]) for place in places]
    family.add_metric(labels, [*buckets, ("+Inf", summary.count)], summary.sum)


def _of_models(models: Iterable[ModelInfo]) -> Iterator[Metric]:
    """Give series by name, without the version: with it each refresh would end one and begin another."""
    hits = CounterMetricFamily(
        "modelcache_model_hits", "Calls that each of the most used models answered without a load.", labels=["model"]
    )
    size = GaugeMetricFamily("modelcache_model_size_bytes", "Bytes that each of them takes.", labels=["model"])
    load = GaugeMetricFamily("modelcache_model_last_load_seconds", "Time that its last load took.", labels=["model"])
    for model in models:
        hits.add_metric([model.name], model.total_hits)
        size.add_metric([model.name], model.size_bytes)
        load.add_metric([model.name], model.load_seconds)
    return iter((hits, size, load))
