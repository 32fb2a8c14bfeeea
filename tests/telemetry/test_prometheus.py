"""Metrics for Prometheus: what parsers read of them, how many there are, and that counters only ever grow."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Mount, Route

import modelcache
import zoo
from modelcache import MemoryStore, ModelNotFoundError, ModelRegistry, RegistryClosedError, Summary
from modelcache.records import EvictionCause
from modelcache.telemetry.prometheus import RegistryCollector, metrics_app
from modelcache.testing import GatedStore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric

    from conftest import MakeRegistry

ROW = zoo.rows(1)
TEXT = "text/plain; version=0.0.4"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(metrics: Iterable[Metric]) -> Samples:
    """Return the values by name and labels, each there once."""
    found = [
        (sample.name, frozenset(sample.labels.items()), sample.value) for metric in metrics for sample in metric.samples
    ]
    values = {(name, labels): value for name, labels, value in found}
    assert len(values) == len(found)
    return values


def parsed(text: bytes) -> Samples:
    return samples(text_string_to_metric_families(text.decode()))


def parsed_strictly(text: bytes) -> Samples:
    """Read the format whose parser checks everything: names, units, buckets, the end."""
    return samples(openmetrics.text_string_to_metric_families(text.decode()))  # type: ignore[no-untyped-call]


def value(values: Samples, name: str, **labels: str) -> float:
    return values[f"modelcache_{name}", frozenset(labels.items())]


def models_of(values: Samples) -> set[str]:
    return {dict(labels)["model"] for name, labels in values if name == "modelcache_model_hits_total"}


async def request(app: Any, **headers: str) -> tuple[dict[str, str], bytes]:
    """Return the headers and the body of the answer."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "method": "GET", "path": "/", "headers": named}, receive, send)
    start, body = sent
    assert start["status"] == 200
    return {name.decode(): value.decode() for name, value in start["headers"]}, body["body"]


async def scrape(registry: ModelRegistry, **options: int) -> Samples:
    _, body = await request(metrics_app(registry, **options), accept=TEXT)
    return parsed(body)


# Formats


async def test_it_speaks_both_formats(make_registry: MakeRegistry) -> None:
    """As is asked for, the text format if nothing is; parsers find the same figures in both."""
    registry = await make_registry(MemoryStore(zoo.fleet(2)))
    await registry.predict("m000", ROW)
    app = metrics_app(registry)
    headers, text = await request(app)
    assert headers["content-type"].startswith("text/plain; version=")
    assert headers["content-length"] == str(len(text))
    plain = parsed(text)
    headers, body = await request(app, accept=PROMETHEUS_3)
    assert headers["content-type"].startswith(OPEN_METRICS)
    assert body.endswith(b"# EOF\n") and body.count(b"# EOF") == 1
    strict = parsed_strictly(body)
    assert plain.keys() == strict.keys()
    assert value(strict, "build_info", version=modelcache.__version__, python=sys.version.split()[0].rstrip("+")) == 1


async def test_it_is_compressed_for_those_who_take_it(make_registry: MakeRegistry) -> None:
    """The text is long and repeats itself."""
    registry = await make_registry()
    app = metrics_app(registry)
    headers, plain = await request(app)
    assert "content-encoding" not in headers
    headers, body = await request(app, accept_encoding="br, GZIP;q=0.8")
    assert headers["content-encoding"] == "gzip"
    assert headers["content-length"] == str(len(body)) and len(body) < len(plain) / 4
    assert b"modelcache_requests_total 0.0" in gzip.decompress(body).splitlines()


async def test_it_has_a_place_in_any_app() -> None:
    """As a route of its own, so that no redirect adds a slash; or mounted; or alone."""
    metrics = metrics_app(ModelRegistry(MemoryStore()))
    for app, path in (
        (Starlette(routes=[Route("/metrics", metrics)]), "/metrics"),
        (Starlette(routes=[Mount("/metrics", metrics)]), "/metrics/"),
        (metrics, "/"),
    ):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            response = await client.get(path)
        assert response.status_code == 200
        assert value(parsed(response.content), "models") == 0


async def test_other_collectors_render_it_the_same(make_registry: MakeRegistry) -> None:
    """An app that has metrics already registers the collector among them."""
    registry = await make_registry(MemoryStore(zoo.fleet(2)))
    await registry.load("m001")
    theirs = CollectorRegistry(auto_describe=True)
    theirs.register(RegistryCollector(registry))
    _, ours = await request(metrics_app(registry))
    age = b"modelcache_lru_age_seconds"
    lines = [
        [line for line in text.splitlines() if not line.startswith(age)] for text in (generate_latest(theirs), ours)
    ]
    assert lines[0] == lines[1]


# Figures


async def test_the_figures_are_the_registry_s(make_registry: MakeRegistry) -> None:
    """What stats() says, under the names and in the units of Prometheus."""
    registry = await make_registry(MemoryStore(zoo.fleet(3)), workers=2, failure_ttl=0)
    for name in ("m000", "m000", "m001", "m002"):
        await registry.predict(name, zoo.rows(2))
    await registry.unload("m002")
    with pytest.raises(ModelNotFoundError):
        await registry.load("absent")
    found, stats = await scrape(registry), registry.stats()
    assert (value(found, "requests_total"), value(found, "hits_total")) == (5, 1)
    assert (value(found, "loads_total", tier="store"), value(found, "loads_total", tier="disk")) == (3, 0)
    assert value(found, "load_failures_total", error="ModelNotFoundError") == 1
    assert value(found, "load_failures_total", error="StoreUnavailableError") == 0
    assert value(found, "evictions_total", cause="unload") == 1
    assert value(found, "evictions_total", cause="budget") == 0
    assert value(found, "models") == 2
    assert value(found, "memory_budget_bytes") == 64 << 20
    assert value(found, "memory_bytes", state="resident") == stats.bytes_resident > 0
    assert value(found, "model_size_bytes", model="m000") == registry.most_used(1)[0].size_bytes
    assert value(found, "model_loading_wait_seconds_count") == 3
    assert value(found, "model_loading_seconds_sum") == stats.model_loading_time.sum
    assert [value(found, "worker_charged_bytes", worker=str(worker.index)) for worker in stats.workers] == [
        worker.charged_bytes for worker in stats.workers
    ]


def test_what_has_not_happened_yet_is_0() -> None:
    """increase() takes a series that begins with 1 for one in which nothing happened."""
    found = samples(RegistryCollector(watched(worker_deaths={"SIGKILL": 2, "exit code 7": 1})).collect())
    deaths = {dict(labels)["reason"]: count for (name, labels), count in found.items() if "worker_deaths" in name}
    assert deaths == {
        "SIGKILL": 2, "SIGSEGV": 0, "SIGABRT": 0, "SIGBUS": 0, "SIGTERM": 0, "exit code 1": 0, "unknown": 0,
        "exit code 7": 1,
    }  # fmt: skip
    causes = {dict(labels)["cause"] for name, labels in found if name == "modelcache_evictions_total"}
    assert causes == set(get_args(EvictionCause))
    errors = {dict(labels)["error"] for name, labels in found if name == "modelcache_load_failures_total"}
    assert errors >= {"ModelNotFoundError", "StoreAccessDeniedError", "CorruptArtifactError", "WorkerCrashedError"}


def test_buckets_count_what_is_below_their_bounds() -> None:
    """They grow from bound to bound, and the last one holds all."""
    below = tuple(range(len(Summary.bounds)))
    waited = Summary(count=99, sum=12.5, below=below)
    found = samples(RegistryCollector(watched(model_loading_wait_time=waited)).collect())
    bucket = "model_loading_wait_seconds_bucket"
    assert value(found, bucket, le="1.0") == below[Summary.bounds.index(1.0)]
    assert value(found, bucket, le="0.001953125") == below[Summary.bounds.index(2**-9)]
    assert value(found, bucket, le="+Inf") == value(found, "model_loading_wait_seconds_count") == 99
    assert value(found, "model_loading_wait_seconds_sum") == 12.5
    assert value(found, "model_downloading_seconds_bucket", le="1.0") == 0


def watched(**figures: Any) -> Any:
    """Return something that says ``figures`` of itself, else what a registry without workers does."""

    class Watched(ModelRegistry):
        def stats(self) -> modelcache.RegistryStats:
            return replace(super().stats(), **figures)

    return Watched(MemoryStore())


# Series by model


async def test_only_the_most_used_models_have_series(make_registry: MakeRegistry) -> None:
    """Of a thousand models as many as was said, and all hits are in the total still."""
    ubj = zoo.model().ubj
    registry = await make_registry(MemoryStore({f"m{number}.ubj": ubj for number in range(1000)}))
    await registry.preload(f"m{number}" for number in range(1000))
    used = {f"m{number}" for number in range(0, 1000, 200)}
    for name in used:
        await registry.predict(name, ROW)
    found = await scrape(registry, models=5)
    assert models_of(found) == used
    assert value(found, "models") == 1000
    assert value(found, "hits_total") == 5
    assert len(models_of(await scrape(registry))) == 100
    assert models_of(await scrape(registry, models=0)) == set()


async def test_counters_grow_over_evictions_and_refreshes(make_registry: MakeRegistry) -> None:
    """A counter that falls is taken for a restart, and all that it says for new: none ever does."""
    store = MemoryStore({"a.ubj": zoo.model().ubj, "b.ubj": zoo.model().ubj})
    registry = await make_registry(store)
    seen = await scrape(registry, models=1)
    for step in range(12):
        await registry.predict("a", ROW)
        await registry.predict("b", ROW)
        if step % 3 == 0:
            await registry.unload("a")
        if step % 3 == 1:
            store.put("a.ubj", zoo.model(seed=step).ubj)
            await registry.refresh("a")
        found = await scrape(registry, models=1 + step % 2)
        for (name, labels), count in found.items():
            if name.endswith(("_total", "_bucket", "_count", "_sum")):
                assert count >= seen.get((name, labels), 0), name
        seen |= found
    assert value(seen, "model_hits_total", model="a") + value(seen, "model_hits_total", model="b") == value(
        seen, "hits_total"
    )


@pytest.mark.parametrize("name", ['say "m"', "Köln/雪 {a=b},#", "a'b", "x" * 900])
async def test_odd_names_come_back_as_they_are(name: str, make_registry: MakeRegistry) -> None:
    """Quotes, braces, other scripts: parsers of both formats read the name that the model has."""
    registry = await make_registry(MemoryStore({f"{name}.ubj": zoo.model().ubj}))
    await registry.load(name)
    app = metrics_app(registry)
    _, text = await request(app, accept=TEXT)
    assert models_of(parsed(text)) == {name}
    _, text = await request(app, accept=OPEN_METRICS)
    assert models_of(parsed_strictly(text)) == {name}


# At any time


async def test_a_scrape_waits_for_no_load(make_registry: MakeRegistry) -> None:
    """While loads are under way it says how many, and models may come and go between two of its steps."""
    store = GatedStore(zoo.fleet(3))
    store.open("m000")
    registry = await make_registry(store)
    await registry.load("m000")
    loads = [asyncio.create_task(registry.load(name)) for name in ("m001", "m002")]
    await store.fetched(3)
    found = await scrape(registry)
    assert (value(found, "models"), value(found, "loads_in_progress")) == (1, 2)
    collecting = RegistryCollector(registry).collect()
    first = next(collecting)
    store.open("m001", "m002")
    await asyncio.gather(*loads, registry.unload("m000"))
    assert models_of(samples([first, *collecting])) == {"m001", "m002"}


async def test_a_scrape_lets_the_loop_go_on(make_registry: MakeRegistry) -> None:
    """No step of it is longer than what one metric takes."""
    registry = await make_registry()
    scraping = asyncio.create_task(request(metrics_app(registry)))
    turns = 0
    while not scraping.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > len(list(RegistryCollector(registry).collect()))


async def test_any_thread_may_scrape(make_registry: MakeRegistry) -> None:
    """prometheus_client's own server has threads: they meet a registry in the middle of everything."""
    registry = await make_registry(MemoryStore(zoo.fleet(20)))
    collector, scraped, ended = RegistryCollector(registry), [], threading.Event()

    def scrape_on() -> None:
        while not ended.is_set():
            scraped.append(samples(collector.collect()))

    scraping = asyncio.create_task(asyncio.to_thread(scrape_on))
    try:
        for turn in range(60):
            await registry.predict(f"m{turn % 20:03}", ROW)
            if turn % 5 == 0:
                await registry.unload(f"m{turn % 20:03}")
    finally:
        ended.set()
        await scraping
    assert scraped


def test_a_table_that_changes_under_a_scrape_is_looked_at_again() -> None:
    """What another thread meets in the middle of a change is no error."""
    registry, changes = ModelRegistry(MemoryStore()), [True, True]

    class Changing:
        most_used = registry.most_used

        def stats(self) -> modelcache.RegistryStats:
            if changes:
                changes.pop()
                raise RuntimeError("OrderedDict mutated during iteration")
            return registry.stats()

    assert samples(RegistryCollector(Changing()).collect())  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [RecursionError, RegistryClosedError])
def test_what_goes_wrong_each_time_is_raised(error: type[RuntimeError]) -> None:
    """A scrape ends, whatever the registry says."""

    class Broken:
        def stats(self) -> modelcache.RegistryStats:
            raise error("always")

    with pytest.raises(error):
        list(RegistryCollector(Broken()).collect())  # type: ignore[arg-type]


async def test_a_registry_is_scraped_before_its_start_and_after_its_end() -> None:
    """Totals stay, what is gone is 0, and nothing starts."""
    registry = ModelRegistry(MemoryStore(zoo.fleet(1)), workers=1, memory_budget="64 MiB")
    collector = RegistryCollector(registry)
    before = samples(collector.collect())
    assert value(before, "models") == 0 and value(before, "requests_total") == 0
    async with registry:
        await registry.predict("m000", ROW)
    after = samples(collector.collect())
    assert (value(after, "requests_total"), value(after, "models")) == (1, 0)
    assert value(after, "evictions_total", cause="close") == 1
    assert not any(dict(labels).get("worker") for _, labels in after)


# Imports


def test_without_prometheus_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra, by its name."""
    for name in [name for name in sys.modules if name.startswith(("prometheus_client", "modelcache.telemetry."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(modelcache.MissingDependencyError, match=r"pip install 'modelcache\[prometheus\]'"):
        importlib.import_module("modelcache.telemetry.prometheus")


def test_the_exporter_imports_no_server() -> None:
    """It is an ASGI app, and needs nothing but prometheus_client."""
    code = "import sys, modelcache.telemetry.prometheus; print({'starlette', 'orjson', 'uvicorn'} & sys.modules.keys())"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=50).stdout
    assert told.strip() == "set()"
