"""The Open Inference Protocol: all routes, by JSON, without a socket."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import modelcache
import zoo
from modelcache import (
    BudgetTimeoutError,
    CorruptArtifactError,
    InvalidInputError,
    LoadTimeoutError,
    LocalStore,
    MemoryStore,
    ModelCacheError,
    ModelRegistry,
    ModelTooLargeError,
    OverloadedError,
    PredictTimeoutError,
    RegistryClosedError,
    StoreAccessDeniedError,
    StoreUnavailableError,
    WorkerCrashedError,
)
from modelcache.serving import open_inference
from modelcache.serving.open_inference_app import split_target
from modelcache.testing import FakeClock, GatedStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from conftest import MakeRegistry

ROWS = zoo.rows(4)
COLUMNS = [
    {"name": name, "shape": [2], "datatype": "FP64", "data": [place, place + 0.5]}
    for place, name in enumerate(zoo.FEATURES)
]


def client_of(registry: ModelRegistry, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(open_inference(registry, **options))
    return httpx.AsyncClient(transport=transport, base_url="http://modelcache/v2")


def asking(rows: Any = ROWS, **more: Any) -> dict[str, Any]:
    """Return a request for predictions."""
    values = np.asarray(rows)
    data = [None if np.isnan(cell) else float(cell) for cell in values.ravel()]
    return {"inputs": [{"name": "x", "shape": list(values.shape), "datatype": "FP32", "data": data}], **more}


def asking_for(*outputs: str, rows: Any = ROWS) -> dict[str, Any]:
    return asking(rows, outputs=[{"name": output} for output in outputs])


def predictions(response: httpx.Response, name: str = "predict") -> np.ndarray[Any, Any]:
    assert response.status_code == 200, response.text
    found = next(output for output in response.json()["outputs"] if output["name"] == name)
    return np.array(found["data"], np.float32).reshape(found["shape"])


def problem(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (message,) = response.json().values()
    assert list(response.json()) == ["error"]
    return str(message)


# One registry for the tests that change nothing.


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[ModelRegistry]:
    models = {
        "plain.ubj": zoo.model().ubj, "tenant_a/house.tar.gz": zoo.model(seed=1).targz,
        "named.ubj": zoo.model(names=True).ubj, "multi.ubj": zoo.model("multiclass").ubj,
        "a/versions/b.ubj": zoo.model(seed=2).ubj, "broken.ubj": b"no model",
    }  # fmt: skip
    async with ModelRegistry(MemoryStore(models), workers=1, memory_budget="64 MiB") as registry:
        yield registry


@pytest.fixture
async def client(shared: ModelRegistry) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(shared) as client:
        yield client


# Predictions


async def test_predictions_are_those_of_xgboost(client: httpx.AsyncClient) -> None:
    """Bit by bit, also as JSON."""
    response = await client.post("models/plain/infer", json=asking(id="7"))
    assert np.array_equal(predictions(response), zoo.model().expected(ROWS))
    answer = response.json()
    assert (answer["model_name"], answer["id"]) == ("plain", "7")
    assert answer["outputs"][0]["datatype"] == "FP32"


async def test_one_row_may_have_one_dimension(client: httpx.AsyncClient) -> None:
    """Its answer has one value."""
    assert predictions(await client.post("models/plain/infer", json=asking(ROWS[0]))).shape == (1,)


async def test_a_name_may_have_slashes_and_a_suffix(client: httpx.AsyncClient) -> None:
    """Quoted or not: clients differ."""
    expected = zoo.model(seed=1).expected(ROWS)
    for name in ("tenant_a/house", "tenant_a%2Fhouse", "tenant_a/house.tar.gz"):
        assert np.array_equal(predictions(await client.post(f"models/{name}/infer", json=asking())), expected)


async def test_outputs_are_answered_by_name_and_in_order(client: httpx.AsyncClient) -> None:
    """All that the registry can predict is offered, for a model of several outputs in their shape."""
    response = await client.post("models/multi/infer", json=asking_for("contribs", "leaf", "margin", "predict"))
    model = zoo.model("multiclass")
    assert [output["name"] for output in response.json()["outputs"]] == ["contribs", "leaf", "margin", "predict"]
    assert np.array_equal(predictions(response), model.expected(ROWS))
    assert np.array_equal(predictions(response, "margin"), model.expected(ROWS, output_margin=True))
    assert np.array_equal(predictions(response, "leaf"), model.expected(ROWS, pred_leaf=True))
    assert np.array_equal(predictions(response, "contribs"), model.expected(ROWS, pred_contribs=True))
    one = await client.post("models/multi/infer", json=asking_for("margin"))
    assert np.array_equal(predictions(one, "margin"), predictions(response, "margin"))


async def test_columns_by_name_are_put_in_order(client: httpx.AsyncClient) -> None:
    """As MLServer's clients send data frames; a model without names takes them by position."""
    rows = np.array([[n, n + 0.5] for n in range(zoo.N)], np.float32).T
    backwards = {"inputs": COLUMNS[::-1], "parameters": {"content_type": "pd"}}
    named = predictions(await client.post("models/named/infer", json=backwards))
    assert np.array_equal(named, zoo.model(names=True).expected(rows))
    plain = predictions(await client.post("models/plain/infer", json=backwards))
    assert np.array_equal(plain, zoo.model().expected(rows[:, ::-1]))


async def test_columns_that_the_model_does_not_have_are_named(client: httpx.AsyncClient) -> None:
    """So are those that are missing."""
    wrong = {"inputs": [*COLUMNS[1:], COLUMNS[0] | {"name": "f_x"}]}
    message = problem(await client.post("models/named/infer", json=wrong), 400)
    assert "missing: 'f_a'" in message and "unexpected: 'f_x'" in message
    too_few = {"inputs": COLUMNS[1:]}
    assert "takes 6 columns, the rows have 5" in problem(await client.post("models/plain/infer", json=too_few), 400)


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_body_may_be_compressed(client: httpx.AsyncClient, coding: str, compress: Any) -> None:
    """By gzip and by deflate."""
    body = compress(httpx.Request("POST", "http://m", json=asking()).content)
    response = await client.post("models/plain/infer", content=body, headers={"content-encoding": coding})
    assert np.array_equal(predictions(response), zoo.model().expected(ROWS))


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip", "gzip"),
        ("br, deflate;q=0.5", "deflate"),
        ("gzip; q=0, deflate;q=0.0", None),
        ("identity", None),
        ("", None),
    ],
)
async def test_a_large_answer_is_compressed_if_the_client_accepts_that(
    client: httpx.AsyncClient, accept: str, coding: str | None
) -> None:
    """A small one is faster sent than compressed."""
    rows = zoo.rows(3000)
    headers = {"accept-encoding": accept}
    response = await client.post("models/plain/infer", json=asking(rows), headers=headers)
    assert response.headers.get("content-encoding") == coding
    assert np.array_equal(predictions(response), zoo.model().expected(rows))
    assert "content-encoding" not in (await client.post("models/plain/infer", json=asking(), headers=headers)).headers


# Versions


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("m", ("m", None, "")),
        ("a/b/infer", ("a/b", None, "infer")),
        ("m/versions/1/infer", ("m", "1", "infer")),
        ("a/versions/b/versions/1", ("a/versions/b", "1", "")),
        ("ready", ("ready", None, "")),
        ("stats", ("", None, "stats")),
        ("stats/ready", ("stats", None, "ready")),
        ("m/learn", ("m/learn", None, "")),
        ("/versions/1", ("/versions/1", None, "")),
        ("a%2Fversions%2Fb", ("a/versions/b", None, "")),
        ("a%2Fversions%2Fb/versions/x%2Fy/infer", ("a/versions/b", "x/y", "infer")),
        ("a%2fready", ("a/ready", None, "")),
        ("50%2525/ready", ("50%25", None, "ready")),
        ("", ("", None, "")),
    ],
)
def test_a_path_is_read_from_its_end(target: str, parts: tuple[str, str | None, str]) -> None:
    """A name may hold anything but a verb at its end; and that, too, if its slash is quoted."""
    assert split_target(target) == parts


async def test_a_quoted_slash_is_part_of_the_name(client: httpx.AsyncClient) -> None:
    """So that each model can be asked for without a version; unquoted it is the version of another."""
    path = "models/a%2Fversions%2Fb"
    rows = predictions(await client.post(f"{path}/infer", json=asking()))
    assert np.array_equal(rows, zoo.model(seed=2).expected(ROWS))
    assert (await client.get(path)).json()["name"] == "a/versions/b"
    problem(await client.get("models/a/versions/b"), 404)


async def test_a_server_need_not_tell_the_path_as_it_was_sent(shared: ModelRegistry) -> None:
    """What is decoded already is not decoded twice."""
    app = open_inference(shared)

    async def without(scope: Any, receive: Any, send: Any) -> None:
        del scope["raw_path"]
        await app(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(without), base_url="http://server/v2") as client:
        assert (await client.get("models/tenant_a/house/ready")).json()["name"] == "tenant_a/house"
        assert "'50%25'" in problem(await client.get("models/50%2525/ready"), 404)


async def test_the_version_is_in_every_answer_and_can_be_asked_for(client: httpx.AsyncClient) -> None:
    """Another one is not there."""
    answer = (await client.post("models/plain/infer", json=asking())).json()
    path = f"models/plain/versions/{answer['model_version']}"
    assert (await client.post(f"{path}/infer", json=asking())).json() == answer
    for verb in ("", "/ready", "/config", "/stats"):
        assert (await client.get(path + verb)).status_code == 200
        message = problem(await client.get(f"models/plain/versions/7{verb}"), 404)
        assert f"served as version {answer['model_version']}, not 7" in message
    assert "not 7" in problem(await client.post("models/plain/versions/7/infer", json=asking()), 404)


class Tagged(MemoryStore):
    """Tells versions apart by what HTTP servers send."""

    async def fetch(self, name: str, *, if_version: str | None = None) -> Any:
        found: Any = await super().fetch(name)
        return modelcache.Artifact(version='W/"1 2"', size=found.size, suffix=found.suffix, chunks=found.chunks)


async def test_a_version_may_hold_any_characters(make_registry: MakeRegistry) -> None:
    """It is listed as it can stand in a path, and taken as listed and as it is."""
    async with client_of(await make_registry(Tagged({"m.ubj": zoo.model().ubj}))) as client:
        (version,) = (await client.get("models/m")).json()["versions"]
        assert version == "W%2F%221%202%22"
        for path in (version, version.replace("%", "%25"), 'W/"1 2"'):
            assert (await client.post(f"models/m/versions/{path}/infer", json=asking())).status_code == 200


async def test_a_version_of_a_cold_model_is_loaded_for_a_call(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """A client that keeps to a version is not locked out by an eviction."""
    (tmp_path / "m.ubj").write_bytes(zoo.model().ubj)
    registry = await make_registry(LocalStore(tmp_path))
    async with client_of(registry) as client:
        (version,) = (await client.get("models/m")).json()["versions"]
        assert await registry.unload("m")
        response = await client.post(f"models/m/versions/{version}/infer", json=asking())
        assert np.array_equal(predictions(response), zoo.model().expected(ROWS))


# What is told of the server and its models


async def test_the_server_tells_what_it_is(client: httpx.AsyncClient, shared: ModelRegistry) -> None:
    """Its extensions are those that it has."""
    answer = (await client.get("http://m/v2")).json()
    assert (answer["name"], answer["version"]) == ("modelcache", modelcache.__version__)
    assert {"binary_tensor_data", "model_repository"} < set(answer["extensions"])
    async with client_of(shared, management=False) as locked:
        assert "model_repository" not in (await locked.get("http://m/v2")).json()["extensions"]


async def test_metadata_tells_what_a_model_takes_and_gives(client: httpx.AsyncClient) -> None:
    """The shapes are those of the answers."""
    answer = (await client.get("models/multi")).json()
    assert answer["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 6]}]
    outputs = {output["name"]: output["shape"] for output in answer["outputs"]}
    assert outputs == {"predict": [-1, 3], "margin": [-1, 3], "leaf": [-1, -1], "contribs": [-1, 3, 7]}
    response = await client.post("models/multi/infer", json=asking_for(*outputs))
    for output in response.json()["outputs"]:
        assert len(output["shape"]) == len(outputs[output["name"]])
        assert all(told in (-1, size) for told, size in zip(outputs[output["name"]], output["shape"], strict=True))
    named = (await client.get("models/named")).json()
    assert named["parameters"]["feature_names"] == list(zoo.FEATURES)
    assert [output["shape"] for output in named["outputs"]] == [[-1], [-1], [-1, -1], [-1, 7]]


async def test_the_configuration_is_as_triton_writes_it(client: httpx.AsyncClient) -> None:
    """For clients that read the shapes there."""
    answer = (await client.get("models/plain/config")).json()
    assert answer["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [-1, 6]}]
    assert answer["output"][0] == {"name": "predict", "data_type": "TYPE_FP32", "dims": [-1]}


async def test_statistics_are_of_resident_models(client: httpx.AsyncClient, shared: ModelRegistry) -> None:
    """Nothing is loaded for them."""
    await client.post("models/plain/infer", json=asking())
    (info,) = [info for info in shared.loaded() if info.name == "plain"]
    (found,) = (await client.get("models/plain/stats")).json()["model_stats"]
    assert found["inference_count"] == info.hits
    assert found["memory_usage"] == [{"type": "CPU", "id": 0, "byte_size": info.size_bytes}]
    every = (await client.get("models/stats")).json()["model_stats"]
    assert [one["name"] for one in every] == [info.name for info in shared.loaded()]
    assert (await client.get("models/nowhere/stats")).json() == {"model_stats": []}


# Mistakes of clients


@pytest.mark.parametrize(
    ("method", "path", "status", "match"),
    [
        ("POST", "models/nowhere/infer", 404, "no model 'nowhere'"),
        ("GET", "models/nowhere", 404, "no model 'nowhere'"),
        ("GET", "models/nowhere/config", 404, "no model 'nowhere'"),
        ("GET", "models/nowhere/ready", 404, "lists no model 'nowhere'"),
        ("POST", "repository/models/nowhere/load", 404, "no model 'nowhere'"),
        ("POST", "models/a/../b%5Cc/infer", 400, "is no model name"),
        ("POST", "models/a%5Cb/infer", 400, "is no model name"),
        ("GET", "models/%ff/ready", 404, "lists no model"),
        ("GET", "models/plain/infer", 405, "takes POST"),
        ("POST", "models/plain", 405, "takes GET"),
        ("PUT", "models/plain", 405, "Method Not Allowed"),
        ("GET", "repository/index", 405, "Method Not Allowed"),
        ("GET", "trace/setting", 404, "nothing at /v2/trace/setting"),
        ("POST", "models/broken/infer", 422, "neither an XGBoost model nor a tar"),
    ],
)
async def test_an_error_is_told_as_json(
    client: httpx.AsyncClient, method: str, path: str, status: int, match: str
) -> None:
    """A client's mistake is never a 5xx."""
    message = problem(await client.request(method, path, json=asking() if path.endswith("infer") else None), status)
    assert match in message


@pytest.mark.parametrize(
    ("body", "headers", "status", "match"),
    [
        (b"", {}, 400, "is no JSON"),
        (b"{}", {}, 400, "'inputs' has to be a list"),
        (b"{}", {"inference-header-content-length": "9"}, 400, "says that 9 bytes are JSON"),
        (b"{}", {"content-encoding": "br"}, 415, "'br' is not read"),
        (b"{}", {"content-encoding": "gzip"}, 400, "is not"),
        (b" " * 1001, {}, 413, "more than 1,000 bytes"),
        (gzip.compress(bytes(1 << 16), mtime=0), {"content-encoding": "gzip"}, 413, "more than 1,000 bytes"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused(
    shared: ModelRegistry, body: bytes, headers: dict[str, str], status: int, match: str
) -> None:
    """Each mistake by its own status."""
    async with client_of(shared, max_body_bytes=1000) as client:
        assert match in problem(await client.post("models/plain/infer", content=body, headers=headers), status)


async def test_rows_of_another_width_are_refused(client: httpx.AsyncClient) -> None:
    """By the model, with what it takes."""
    message = problem(await client.post("models/plain/infer", json=asking(ROWS[:, :5])), 400)
    assert "takes 6 columns, the rows have 5" in message


@pytest.mark.parametrize(
    ("error", "retry_after"),
    [
        (OverloadedError("full", retry_after=0.2), "1"),
        (LoadTimeoutError("slow", retry_after=2.5), "3"),
        (PredictTimeoutError("slow"), None),
        (RegistryClosedError("closed"), "1"),
        (StoreUnavailableError("away", retry_after=7), "7"),
        (StoreAccessDeniedError("no"), None),
        (ModelTooLargeError("large"), None),
        (BudgetTimeoutError("held"), None),
        (CorruptArtifactError("damaged"), None),
        (WorkerCrashedError("gone"), None),
        (InvalidInputError("ragged \ud800"), None),
    ],
)
async def test_each_error_has_its_status(
    shared: ModelRegistry, monkeypatch: pytest.MonkeyPatch, error: ModelCacheError, retry_after: str | None
) -> None:
    """With the seconds after which to come back, where that can help."""

    async def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(shared, "invoke", fail)
    async with client_of(shared) as client:
        response = await client.post("models/plain/infer", json=asking())
    assert problem(response, error.http_status) == str(error)
    assert response.headers.get("retry-after") == retry_after


async def test_a_large_body_is_read_in_a_thread(client: httpx.AsyncClient) -> None:
    """What is wrong with it is told as ever."""
    rows = zoo.rows(40_000)
    assert np.array_equal(
        predictions(await client.post("models/plain/infer", json=asking(rows))), zoo.model().expected(rows)
    )
    wrong = asking(rows) | {"id": 7}
    assert "'id' has to be text" in problem(await client.post("models/plain/infer", json=wrong), 400)


async def test_a_client_that_goes_away_is_no_fault(shared: ModelRegistry) -> None:
    """Half a request is nothing that the server's log has to tell."""
    messages: list[Any] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v2/models/plain/infer", "headers": [], "query_string": b""}
    await open_inference(shared)(scope, receive, send)
    assert not messages


async def test_the_parameter_timeout_is_kept(make_registry: MakeRegistry) -> None:
    """It is a 504 with the time to come back, whichever way the call goes."""
    store = GatedStore({"m.ubj": zoo.model().ubj})
    async with client_of(await make_registry(store)) as client:
        for more in ({}, {"outputs": [{"name": "margin"}, {"name": "leaf"}]}):
            body = asking(parameters={"timeout": 1000}, **more)
            assert "m" in problem(await client.post("models/m/infer", json=body), 504)
        store.open("m")


# Health


async def test_a_closed_registry_is_alive_and_not_ready(make_registry: MakeRegistry) -> None:
    """503 with the time to come back, for the server, for a model and for a call."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    async with client_of(registry) as client:
        assert (await client.get("health/ready")).json() == {"ready": True}
        await registry.close()
        assert (await client.get("health/live")).json() == {"live": True}
        for response in (
            await client.get("health/ready"),
            await client.get("models/m/ready"),
            await client.post("models/m/infer", json=asking()),
        ):
            assert "closed" in problem(response, 503)
            assert response.headers["retry-after"] == "1"


async def test_a_cold_model_is_ready(make_registry: MakeRegistry) -> None:
    """Its first call loads it: programs that ask before they call must not be kept out. Nothing is loaded for that."""
    registry = await make_registry(MemoryStore({"m.tar.gz": zoo.model().targz}))
    async with client_of(registry) as client:
        for name in ("m", "m.tar.gz"):
            assert (await client.get(f"models/{name}/ready")).json() == {"name": name, "ready": True}
        assert not registry.loaded()
        await registry.load("m")
        assert (await client.get("models/m/ready")).status_code == 200


async def test_a_model_that_failed_is_not_ready_until_it_is_tried_again(make_registry: MakeRegistry) -> None:
    """As long as calls are refused for it, and no longer."""
    clock = FakeClock()
    registry = await make_registry(MemoryStore({"m.ubj": b"no model"}), clock=clock)
    async with client_of(registry) as client:
        refused = await client.post("models/m/infer", json=asking())
        assert refused.status_code == 422
        assert "neither an XGBoost model nor a tar" in problem(await client.get("models/m/ready"), 503)
        clock.advance(60)
        assert (await client.get("models/m/ready")).status_code == 200


class Unlisted(MemoryStore):
    """A store that does not tell what it has."""

    error: Exception | None = None

    def names(self, prefix: str = "") -> AsyncIterator[str]:
        assert self.error is not None
        raise self.error


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), StoreAccessDeniedError("no")])
async def test_a_model_is_ready_if_the_store_does_not_tell(make_registry: MakeRegistry, error: Exception) -> None:
    """A call finds out. The index, which is nothing but a list, passes on what the store said."""
    store = Unlisted({"m.ubj": zoo.model().ubj})
    store.error = error
    async with client_of(await make_registry(store)) as client:
        assert (await client.get("models/m/ready")).status_code == 200
        assert problem(await client.post("repository/index"), error.http_status) == str(error)  # type: ignore[attr-defined]


async def test_the_store_is_not_asked_about_a_resident_model(make_registry: MakeRegistry) -> None:
    """Programs ask before each call."""
    registry = await make_registry(Unlisted({"m.ubj": zoo.model().ubj}))
    async with client_of(registry) as client:
        await registry.load("m")
        for name in ("m", "m.ubj"):
            assert (await client.get(f"models/{name}/ready")).status_code == 200


# The repository


async def test_the_index_lists_every_model_with_its_state(make_registry: MakeRegistry) -> None:
    """Those that are resident, those that are cold, and those that failed, each with the reason."""
    models = {"a.ubj": zoo.model().ubj, "b.ubj": b"no model", "c.ubj": zoo.model().ubj}
    registry = await make_registry(MemoryStore(models))
    async with client_of(registry) as client:
        await client.post("repository/models/a/load")
        await client.post("repository/models/b/load")
        a, b, c = (await client.post("repository/index")).json()
        assert a == {"name": "a", "version": registry.loaded()[0].version, "state": "READY", "reason": ""}
        assert (b["name"], b["state"]) == ("b", "UNAVAILABLE") and "neither an XGBoost model nor a tar" in b["reason"]
        assert c == {
            "name": "c",
            "version": "",
            "state": "UNAVAILABLE",
            "reason": "It is not loaded: its next call, or a load, does that.",
        }
        assert (await client.post("repository/index", json={"ready": True})).json() == [a]
        assert "'ready' has to be" in problem(await client.post("repository/index", json={"ready": 1}), 400)


async def test_a_store_that_cannot_list_has_an_index_of_what_is_resident(make_registry: MakeRegistry) -> None:
    """Nothing else is known."""
    store: Any = MemoryStore({"a.ubj": zoo.model().ubj})

    class Minimal:
        fetch, close = store.fetch, store.close

    registry = await make_registry(Minimal())
    async with client_of(registry) as client:
        assert (await client.post("repository/index")).json() == []
        assert (await client.get("models/a/ready")).status_code == 200
        await registry.load("a")
        assert [item["name"] for item in (await client.post("repository/index")).json()] == ["a"]


async def test_a_model_is_loaded_renewed_and_unloaded(make_registry: MakeRegistry) -> None:
    """To load one again is to ask the store for another version."""
    store = MemoryStore({"m.ubj": zoo.model().ubj})
    registry = await make_registry(store)
    async with client_of(registry) as client:
        assert (await client.post("repository/models/m/load", json={})).status_code == 200
        store.put("m.ubj", zoo.model(seed=1).ubj)
        assert (await client.post("repository/models/m/load")).status_code == 200
        answer = predictions(await client.post("models/m/infer", json=asking()))
        assert np.array_equal(answer, zoo.model(seed=1).expected(ROWS))
        for _ in range(2):
            assert (await client.post("repository/models/m/unload", json={})).status_code == 200
            assert not registry.loaded()
        override = {"parameters": {"config": "{}"}}
        assert "as the store has it" in problem(await client.post("repository/models/m/load", json=override), 400)


async def test_management_can_be_switched_off(shared: ModelRegistry) -> None:
    """What is left changes nothing but by calls."""
    async with client_of(shared, management=False) as client:
        for verb in ("load", "unload"):
            message = problem(await client.post(f"repository/models/plain/{verb}"), 404)
            assert "or it is switched off here" in message
        assert (await client.post("repository/index")).status_code == 200


# The app among others


async def test_a_cold_model_blocks_nothing(make_registry: MakeRegistry) -> None:
    """Neither health nor a warm call waits for it."""
    store = GatedStore({"warm.ubj": zoo.model().ubj, "cold.ubj": zoo.model(seed=1).ubj})
    store.open("warm")
    registry = await make_registry(store)
    async with client_of(registry) as client:
        await registry.load("warm")
        cold = asyncio.create_task(client.post("models/cold/infer", json=asking()))
        await store.fetched(2)
        for path in ("health/live", "health/ready", "models/cold/ready", "models/cold/stats", "models/warm"):
            assert (await client.get(path)).status_code == 200
        assert np.array_equal(
            predictions(await client.post("models/warm/infer", json=asking())), zoo.model().expected(ROWS)
        )
        assert not cold.done()
        store.open("cold")
        assert np.array_equal(predictions(await cold), zoo.model(seed=1).expected(ROWS))


async def test_the_app_is_mounted_in_another(shared: ModelRegistry) -> None:
    """Its errors stay its own there."""
    app = Starlette(routes=[Mount("/models", open_inference(shared))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://m/models/v2") as client:
        assert predictions(await client.post("models/plain/infer", json=asking())).shape == (4,)
        assert "no model" in problem(await client.get("models/nowhere"), 404)


async def test_a_fault_of_the_server_is_told_as_json(shared: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """And raised, so that the server logs it."""

    def fault(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(shared, "loaded", fault)
    transport = httpx.ASGITransport(open_inference(shared), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://m") as client:
        assert "at fault" in problem(await client.get("/v2/models/stats"), 500)
    with pytest.raises(ZeroDivisionError):
        async with client_of(shared) as client:
            await client.get("models/stats")
