"""SageMaker's protocols, request by request: the container's routes, and what the runtime answers."""

from __future__ import annotations

import asyncio
import base64
import io
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount

import zoo
from modelcache import (
    BudgetTimeoutError,
    LoadTimeoutError,
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
    errors,
)
from modelcache.serving import access, codecs, sagemaker, sagemaker_calls, sagemaker_errors, sagemaker_models
from modelcache.serving.access import Grant, GuardedRegistry
from modelcache.testing import FakeClock, GatedStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from starlette.requests import Request

    from conftest import MakeRegistry

ROWS = zoo.rows(3)
MODEL, OTHER = zoo.model(), zoo.model(seed=1)
ARTIFACTS = {
    "Houston_TX.tar.gz": MODEL.targz,
    "tenant a/New York, NY.tar.gz": OTHER.targz,
    "Zürich.ubj": OTHER.ubj,
    "50%2F50.ubj": OTHER.ubj,
    "damaged.ubj": MODEL.ubj[:-100],
    "classes.ubj": zoo.model("multiclass").ubj,
}
CSV = {"content-type": "text/csv"}
TARGET = "x-amzn-sagemaker-target-model"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[ModelRegistry]:
    """One registry for the tests that leave it as it is, but for what it has loaded."""
    async with ModelRegistry(MemoryStore(ARTIFACTS), workers=1, memory_budget="64 MiB") as registry:
        yield registry


@pytest.fixture(scope="module")
async def client(shared: ModelRegistry) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(shared) as client:
        yield client


def client_of(registry: ModelRegistry, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(sagemaker(registry, **options), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def csv(rows: Any) -> bytes:
    """As the examples of SageMaker write it; missing cells are empty."""
    return b"".join(b",".join(b"" if np.isnan(x) else repr(float(x)).encode() for x in row) + b"\n" for row in rows)


def as_bytes(target: bytes) -> dict[bytes, bytes]:
    return {TARGET.encode(): target, b"content-type": b"text/csv"}


def floats(numbers: Any) -> Any:
    return np.array(numbers, np.float32)


async def call(client: httpx.AsyncClient, model: str = "Houston_TX.tar.gz", **headers: str) -> httpx.Response:
    """POST /endpoints/e/invocations."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return await client.post("/endpoints/e/invocations", content=csv(ROWS), headers={TARGET: model, **CSV, **named})


# Forms of calls and answers


async def test_each_form_has_its_own_answer_by_default(client: httpx.AsyncClient) -> None:
    """Without an Accept the multi-model forms answer with a bare JSON array, the single-container form with CSV."""
    expected = MODEL.expected(ROWS)
    multi = await client.post("/models/Houston_TX.tar.gz/invoke", content=csv(ROWS), headers=CSV)
    for response in (await call(client), multi):
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
        assert np.array_equal(floats(response.json()), expected)
    single = await client.post("/invocations", content=csv(ROWS), headers={TARGET: "Houston_TX", **CSV})
    assert (single.status_code, single.headers["content-type"]) == (200, "text/csv")
    assert np.array_equal(floats(single.text.replace(",", "\n").split()), expected)


async def test_the_client_chooses_what_it_gets(client: httpx.AsyncClient) -> None:
    """Accept decides; the single-container form's JSON holds predictions with scores; */* leaves it to the server."""
    expected = MODEL.expected(ROWS)
    as_csv = await call(client, accept="text/csv")
    assert as_csv.headers["content-type"] == "text/csv"
    assert np.array_equal(floats(as_csv.text.replace(",", "\n").split()), expected)
    single = await client.post(
        "/invocations", content=csv(ROWS), headers={TARGET: "Houston_TX", "accept": "application/json", **CSV}
    )
    assert [list(one) for one in single.json()["predictions"]] == [["score"]] * 3
    assert np.array_equal(floats([one["score"] for one in single.json()["predictions"]]), expected)
    assert (await call(client, accept="*/*")).headers["content-type"] == "application/json"
    classes = await call(client, "classes")
    assert np.array_equal(floats(classes.json()), zoo.model("multiclass").expected(ROWS))


async def test_sparse_rows_are_as_wide_as_the_model(client: httpx.AsyncClient) -> None:
    """A libsvm body does not say how many columns there are: the model is loaded to know; 0 rows wide is no guess."""
    lines = b"".join(
        b"0 " + b" ".join(b"%d:%r" % (i, float(x)) for i, x in enumerate(row[:-1]) if not np.isnan(x)) + b"\n"
        for row in ROWS
    )
    rows = ROWS.copy()
    rows[:, -1] = np.nan
    for _ in range(2):
        response = await client.post(
            "/models/Houston_TX.tar.gz/invoke", content=lines, headers={"content-type": "text/libsvm"}
        )
        assert np.array_equal(floats(response.json()), MODEL.expected(rows))


async def test_the_index_base_is_what_runs_the_app_says(shared: ModelRegistry) -> None:
    """Where the content type does not say it."""
    sparse = {"content-type": "text/libsvm"}
    answers = []
    for base, body in ((0, b"0:1 1:2"), (1, b"1:1 2:2")):
        async with client_of(shared, index_base=base) as client:
            answers.append(await client.post("/models/Houston_TX/invoke", content=body, headers=sparse))
    assert answers[0].json() == answers[1].json()
    assert answers[0].status_code == 200


class Slow:
    """A registry whose loads take 50 of the 60 seconds that a call has."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.timeouts: list[float] = []

    def peek(self, name: str) -> None:
        pass

    async def load(self, name: str) -> Any:
        self._clock.advance(50)
        return SimpleNamespace(n_features=6)

    async def predict(self, name: str, rows: Any, timeout: float) -> Any:
        self.timeouts.append(timeout)
        return np.zeros(1, np.float32)


async def test_a_call_has_one_time_for_all_that_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the load takes, for the width of sparse rows, is not left for the prediction."""
    clock = FakeClock()
    monkeypatch.setattr(sagemaker_calls, "monotonic", clock)
    slow: Any = Slow(clock)
    async with client_of(slow) as client:
        for content_type in ("text/libsvm", "text/csv"):
            response = await client.post(
                "/models/m/invoke",
                content=b"1:1" if "lib" in content_type else b"1",
                headers={"content-type": content_type},
            )
            assert response.status_code == 200
    assert slow.timeouts == [10, 60]


async def test_a_large_body_is_answered_like_a_small_one(client: httpx.AsyncClient) -> None:
    """Bodies that take long to read are read in a thread, with the same answer."""
    rows = zoo.rows(20_000)
    response = await client.post("/models/Houston_TX.tar.gz/invoke", content=csv(rows), headers=CSV)
    assert np.array_equal(floats(response.json()), MODEL.expected(rows))


async def test_headers_come_back(client: httpx.AsyncClient) -> None:
    """Custom attributes and the inference id are echoed, and the variant that answered is named."""
    sent = {"x-amzn-sagemaker-custom-attributes": "trace=1; user", "x-amzn-sagemaker-inference-id": "id 7"}
    response = await call(client, **sent)
    assert {key: response.headers[key] for key in sent} == sent
    assert response.headers["x-amzn-invoked-production-variant"] == "AllTraffic"
    chosen = await call(client, x_amzn_sagemaker_target_variant="canary")
    assert chosen.headers["x-amzn-invoked-production-variant"] == "canary"
    for path in ("/invocations", "/models/Houston_TX/invoke"):
        response = await client.post(path, content=csv(ROWS), headers={TARGET: "Houston_TX", **CSV, **sent})
        assert {key: response.headers[key] for key in sent} == sent


async def test_an_empty_body_has_an_empty_answer(client: httpx.AsyncClient) -> None:
    """No rows are no mistake: 204, whatever the content type."""
    for path in ("/endpoints/e/invocations", "/invocations", "/models/Houston_TX/invoke"):
        response = await client.post(path, headers={TARGET: "Houston_TX", "content-type": "a/b"})
        assert (response.status_code, response.content) == (204, b"")
        assert "content-length" not in response.headers


@pytest.mark.parametrize("name", ["tenant a/New York, NY.tar.gz", "tenant a/New York, NY", "Zürich", "50%2F50"])
async def test_names_are_taken_as_they_are(client: httpx.AsyncClient, name: str) -> None:
    """A header's name is never URL-decoded, and may be UTF-8; a path's is percent-encoded, slashes or not."""
    expected = OTHER.expected(ROWS)
    response = await client.post("/invocations", content=csv(ROWS), headers=as_bytes(name.encode()))
    assert np.array_equal(floats(response.text.replace(",", "\n").split()), expected)
    for safe in ("", "/"):
        path = "/models/" + quote(name, safe)
        response = await client.post(f"{path}/invoke", content=csv(ROWS), headers=CSV)
        assert np.array_equal(floats(response.json()), expected)
        assert (await client.get(path)).json() == {"modelName": name, "modelUrl": name}


async def test_a_name_in_latin_1(client: httpx.AsyncClient) -> None:
    """A header that is no UTF-8 is Latin-1, as HTTP used to say."""
    headers = as_bytes("Zürich".encode("latin-1"))
    response = await client.post("/invocations", content=csv(ROWS), headers=headers)
    assert response.status_code == 200


# Failures


@pytest.mark.parametrize(
    ("model", "body", "headers", "status", "kind"),
    [
        ("missing", b"1,2,3,4,5,6", {}, 404, "ModelNotFoundError"),
        ("../secret", b"1,2,3,4,5,6", {}, 400, "InvalidModelNameError"),
        ("damaged", b"1,2,3,4,5,6", {}, 422, "CorruptArtifactError"),
        ("Houston_TX", b"1,2,3", {}, 400, "FeatureMismatchError"),
        ("Houston_TX", b"1,2,x,4,5,6", {}, 400, "InvalidInputError"),
        ("Houston_TX", b"1,2,3,4,5,6", {"content-type": "image/png"}, 415, "UnsupportedMediaTypeError"),
        ("Houston_TX", b"1,2,3,4,5,6", {"accept": "image/png"}, 406, "NotAcceptableError"),
        ("Houston_TX", b"1,2,3,4,5,6", {"content-encoding": "br"}, 415, "UnsupportedMediaTypeError"),
        ("Houston_TX", b"1,2,3,4,5,6", {"content-encoding": "gzip"}, 400, "RequestError"),
        ("Houston_TX", b"1" * 6_291_457, {}, 413, "PayloadTooLargeError"),
        ("", b"1,2,3,4,5,6", {}, 400, "RequestError"),
    ],
)
async def test_a_client_s_mistake_is_never_the_server_s(
    client: httpx.AsyncClient, *, model: str, body: bytes, headers: dict[str, str], status: int, kind: str
) -> None:
    """What is wrong with a request is a 4xx of its own kind; the runtime wraps what a container says in ModelError."""
    headers = {**CSV, **headers, TARGET: model}
    response = await client.post("/invocations", content=body, headers=headers)
    told = response.json()
    assert (response.status_code, told["code"], told["type"]) == (status, status, kind)
    runtime = await client.post("/endpoints/e/invocations", content=body, headers=headers)
    error = runtime.headers["x-amzn-errortype"]
    if error == "ModelError":
        assert runtime.status_code == 424
        assert runtime.json()["OriginalStatusCode"] == status
        original = runtime.json()["OriginalMessage"]  # each form prefers another type, and lists that first
        assert sorted(original) == sorted(told["message"])
        assert f"client error ({status})" in runtime.json()["Message"]
    else:
        assert error == "ValidationError"
        assert runtime.status_code == (413 if status == 413 else 400)
        assert runtime.json() == {"Message": told["message"]}


async def test_a_missing_target_says_which_header_to_send(client: httpx.AsyncClient) -> None:
    """Who names no model is told where to name it."""
    response = await client.post("/endpoints/e/invocations", content=csv(ROWS), headers=CSV)
    assert response.headers["x-amzn-errortype"] == "ValidationError"
    assert "X-Amzn-SageMaker-Target-Model" in response.json()["Message"]


async def test_unknown_routes_and_methods(client: httpx.AsyncClient) -> None:
    """They are refused in the dialect of their path, with bodies of JSON."""
    response = await client.get("/nowhere")
    assert (response.status_code, response.json()["code"], response.json()["type"]) == (404, 404, "NotFound")
    response = await client.get("/invocations")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    response = await client.get("/endpoints/e/invocations")
    assert (response.status_code, response.json()) == (405, {"Message": "Method Not Allowed"})


async def test_no_request_is_odd_enough_for_a_5xx(client: httpx.AsyncClient) -> None:
    """Damaged bodies of all content types, names and headers of any bytes: each is answered, and never by a 5xx."""
    random = Random(0)
    npy = io.BytesIO()
    np.save(npy, ROWS)
    bodies = {
        "text/csv": csv(ROWS),
        "text/libsvm": b"0 0:1 5:2\n",
        "application/json": b'{"instances": [[1, 2, 3, 4, 5, 6]]}',
        "application/x-npy": npy.getvalue(),
    }
    statuses = set()
    for _ in range(600):
        content_type, body = random.choice(list(bodies.items()))
        damaged = bytearray(body)
        for _ in range(random.randrange(3)):
            at = random.randrange(len(damaged))
            damaged[at : at + random.randrange(2)] = random.randbytes(random.randrange(2))
        odd = random.randbytes(3).translate(None, b"\r\n")
        name = random.choice([b"Houston_TX", b"Houston_TX", b"classes", odd])
        headers = {
            TARGET.encode(): name,
            b"content-type": random.choice([content_type] * 9 + list(codecs.CONTENT_TYPES)).encode(),
            b"accept": random.choice([b"*/*", b"*/*", b"text/csv", b"application/json;q=0.5", b"*/*;q=x", odd]),
        }
        path = random.choice(["/invocations", "/endpoints/e/invocations", f"/models/{quote(name)}/invoke"])
        response = await client.post(path, content=bytes(damaged), headers=headers)
        assert response.status_code < 500, (path, headers, damaged)
        statuses.add(response.status_code)
    assert statuses >= {200, 400, 404, 406, 424}


@pytest.mark.parametrize(
    ("error", "container", "runtime", "kind"),
    [
        (StoreUnavailableError("x"), 502, 503, "ServiceUnavailable"),
        (StoreAccessDeniedError("x"), 403, 400, "ValidationError"),
        (ModelTooLargeError("x"), 507, 424, "ModelError"),
        (BudgetTimeoutError("x"), 507, 503, "ServiceUnavailable"),
        (LoadTimeoutError("x", retry_after=2.1), 504, 429, "ModelNotReadyException"),
        (PredictTimeoutError("x", retry_after=2.1), 504, 424, "ModelError"),
        (OverloadedError("x", retry_after=2.1), 503, 503, "ServiceUnavailable"),
        (RegistryClosedError("x"), 503, 503, "ServiceUnavailable"),
        (WorkerCrashedError("x"), 500, 424, "ModelError"),
        (ModelCacheError("x"), 500, 424, "ModelError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_the_server_s_failures(
    shared: ModelRegistry,
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    *,
    error: ModelCacheError,
    container: int,
    runtime: int,
    kind: str,
) -> None:
    """Each has its status in both dialects, and says when to come back where that can help."""

    async def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(shared, "predict", fail)
    response = await client.post("/models/Houston_TX/invoke", content=csv(ROWS), headers=CSV)
    assert (response.status_code, response.json()["type"]) == (container, type(error).__name__)
    again = "3" if error.retry_after else "1" if container == 503 else None
    assert response.headers.get("retry-after") == again
    response = await call(client)
    assert (response.status_code, response.headers["x-amzn-errortype"]) == (runtime, kind)
    assert response.headers.get("retry-after") == (None if runtime in (400, 424) else "3" if error.retry_after else "1")


def test_each_error_has_its_line() -> None:
    """The table says what becomes of every error there is, but for the kinds of those that it names."""
    table = sagemaker_errors.__doc__ or ""
    for name in errors.__all__:
        listed = [base.__name__ for base in getattr(errors, name).__mro__ if f"\n{base.__name__} " in table]
        assert listed or name in ("ModelCacheError", "MissingDependencyError"), name


async def test_a_bug_is_an_internal_failure(
    shared: ModelRegistry, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody has foreseen is a 500 that tells the client nothing, in both dialects."""

    async def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(shared, "predict", fail)
    response = await call(client)
    assert (response.status_code, response.headers["x-amzn-errortype"]) == (500, "InternalFailure")
    assert "secret" not in response.text
    response = await client.post("/models/a/invoke", content=csv(ROWS), headers=CSV)
    assert (response.status_code, response.json()["type"]) == (500, "InternalServerError")
    assert "secret" not in response.text


# The container's routes


async def test_ping_and_execution_parameters(client: httpx.AsyncClient) -> None:
    """The platform's two questions before it sends anything."""
    response = await client.get("/ping")
    assert (response.status_code, response.content) == (200, b"")
    assert (await client.get("/execution-parameters")).json() == {
        "MaxConcurrentTransforms": 1, "BatchStrategy": "MULTI_RECORD", "MaxPayloadInMB": 6,
    }  # fmt: skip


async def test_a_model_is_loaded_described_and_unloaded(make_registry: MakeRegistry) -> None:
    """POST loads and DELETE frees, each once: the second time they are 409 and 404."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    async with client_of(registry) as client:
        load = {"model_name": "Houston_TX.tar.gz", "url": "Houston_TX.tar.gz"}
        path = "/models/Houston_TX.tar.gz"
        assert (await client.get(path)).status_code == 404
        assert (await client.delete(path)).status_code == 404
        assert (await client.post("/models", json=load)).status_code == 200
        assert (await client.post("/models", json=load)).status_code == 409
        described = {"modelName": load["model_name"], "modelUrl": load["url"]}
        assert (await client.get(path)).json() == described
        assert (await client.get("/models")).json() == {"models": [described]}
        assert (await client.delete(path)).status_code == 200
        assert registry.stats().bytes_resident == registry.stats().bytes_unloading == 0
        assert (await client.delete(path)).status_code == 404
        assert (await client.get("/models")).json() == {"models": []}


async def test_a_name_may_be_another_than_the_artifact_s(make_registry: MakeRegistry) -> None:
    """The platform calls models by hashes: a name is given by POST, outlives an eviction, and ends with DELETE."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    async with client_of(registry, store_url="s3://bucket/models/") as client:
        load = {"model_name": "5e2a/x", "url": "s3://bucket/models/tenant a/New York, NY.tar.gz"}
        assert (await client.post("/models", json=load)).status_code == 200
        assert (await client.get("/models/5e2a/x")).json()["modelUrl"] == load["url"]
        assert [model["modelName"] for model in (await client.get("/models")).json()["models"]] == ["5e2a/x"]
        invoked = await client.post("/models/5e2a/x/invoke", content=csv(ROWS), headers=CSV)
        assert np.array_equal(floats(invoked.json()), OTHER.expected(ROWS))
        await registry.unload("tenant a/New York, NY.tar.gz")
        assert (await client.get("/models/5e2a/x")).status_code == 404
        assert (await client.post("/models/5e2a/x/invoke", content=csv(ROWS), headers=CSV)).status_code == 200
        assert (await client.delete("/models/5e2a/x")).status_code == 200
        assert (await client.post("/models/5e2a/x/invoke", content=csv(ROWS), headers=CSV)).status_code == 404


class Unlisted(MemoryStore):
    """A store that cannot list its models."""

    names: Any = None


async def test_the_name_of_another_artifact_is_not_given(make_registry: MakeRegistry) -> None:
    """By that name TargetModel asks the other model, and the two would differ; its own name an artifact may have."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    async with client_of(registry) as client:
        for name in ("Zürich", "Zürich.ubj"):
            for _ in ("cold", "resident"):
                refused = await client.post("/models", json={"model_name": name, "url": "Houston_TX"})
                assert (refused.status_code, refused.json()["type"]) == (400, "RequestError")
                await registry.load("Zürich")
            await registry.unload("Zürich")
        for name, url in (("Zürich", "Zürich.ubj"), ("Houston_TX.tar.gz", "Houston_TX")):
            assert (await client.post("/models", json={"model_name": name, "url": url})).status_code == 200


async def test_a_given_name_goes_before_an_artifact_s(make_registry: MakeRegistry) -> None:
    """A store that cannot list does not tell that the name is an artifact's: the list then has it once."""
    registry = await make_registry(Unlisted(ARTIFACTS))
    async with client_of(registry) as client:
        load = {"model_name": "Zürich", "url": "Houston_TX"}
        assert (await client.post("/models", json=load)).status_code == 200
        await registry.load("Zürich")
        invoked = await client.post("/models/Zürich/invoke", content=csv(ROWS), headers=CSV)
        assert np.array_equal(floats(invoked.json()), MODEL.expected(ROWS))
        assert (await client.get("/models")).json() == {"models": [{"modelName": "Zürich", "modelUrl": "Houston_TX"}]}
        assert (await client.delete("/models/Zürich")).status_code == 200
        assert (await client.post("/models", json=load)).status_code == 400, "it is resident, so it is known now"


async def test_one_artifact_s_name_hides_no_other_of_its_stem(make_registry: MakeRegistry) -> None:
    """A name for m.json leaves m in the list, which is m.ubj."""
    registry = await make_registry(MemoryStore({"m.ubj": MODEL.ubj, "m.json": OTHER.json}))
    await registry.load("m")
    async with client_of(registry) as client:
        assert (await client.post("/models", json={"model_name": "x", "url": "m.json"})).status_code == 200
        listed = (await client.get("/models")).json()["models"]
        assert {model["modelName"]: model["modelUrl"] for model in listed} == {"m": "m", "x": "m.json"}


async def test_a_page_looks_at_no_more_names_than_it_shows(
    shared: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many names there are, a page of them costs the event loop the same."""
    monkeypatch.setattr(sagemaker_models, "PAGE", 2)
    registry = Mock(spec=ModelRegistry, peek=Mock(side_effect=shared.peek), loaded=Mock(return_value=[]))
    registry.names = shared.names
    registry.load = shared.load
    models = sagemaker_models.Models(registry, "")
    await shared.unload("Houston_TX")
    names = [f"name {place}" for place in range(9)]
    for name in names:
        await models.load(name, "Houston_TX")
    registry.peek.reset_mock()
    seen: list[str] = []
    token: Any = None
    while token is not None or not seen:
        page: Any = models.page(token)
        seen += [model["modelName"] for model in page["models"]]
        token = page.get("nextPageToken")
        assert registry.peek.call_count <= 3
        registry.peek.reset_mock()
    assert seen == names


async def test_a_name_is_given_again(make_registry: MakeRegistry) -> None:
    """A name whose model was evicted may be loaded anew, from another artifact; if that fails it stays what it was."""
    registry = await make_registry(MemoryStore(ARTIFACTS))
    async with client_of(registry) as client:
        for url, status in (("Houston_TX.tar.gz", 200), ("damaged", 422), ("missing", 404)):
            assert (await client.post("/models", json={"model_name": "m", "url": url})).status_code == status
            await registry.unload("Houston_TX")
        invoked = await client.post("/models/m/invoke", content=csv(ROWS), headers=CSV)
        assert np.array_equal(floats(invoked.json()), MODEL.expected(ROWS))
        await registry.unload("Houston_TX")
        assert (await client.post("/models", json={"model_name": "m", "url": "Zürich"})).status_code == 200
        invoked = await client.post("/models/m/invoke", content=csv(ROWS), headers=CSV)
        assert np.array_equal(floats(invoked.json()), OTHER.expected(ROWS))
        assert (await client.post("/models", json={"model_name": "n", "url": "damaged"})).status_code == 422
        assert (await client.delete("/models/n")).status_code == 404


async def test_a_model_that_is_being_loaded_is_loaded_already(make_registry: MakeRegistry) -> None:
    """A second POST while the first is under way is a 409; so is one for a name that was used before any POST."""
    store = GatedStore({"a.ubj": MODEL.ubj})
    registry = await make_registry(store)
    async with client_of(registry) as client:
        load = {"model_name": "m", "url": "a"}
        first = asyncio.create_task(client.post("/models", json=load))
        await store.fetched(1)
        assert (await client.post("/models", json=load)).status_code == 409
        store.open("a")
        assert (await first).status_code == 200
        assert (await client.post("/models", json={"model_name": "a", "url": "a"})).status_code == 409


async def test_a_model_without_room_is_a_507(make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large for the budget, or one name more than are kept: the platform unloads something and tries again."""
    registry = await make_registry(MemoryStore(ARTIFACTS), memory_budget=1000)
    async with client_of(registry) as client:
        load = {"model_name": "m", "url": "Houston_TX"}
        response = await client.post("/models", json=load)
        assert (response.status_code, response.json()["type"]) == (507, "ModelTooLargeError")
        monkeypatch.setattr(sagemaker_models, "_MOST_NAMES", 0)
        response = await client.post("/models", json=load)
        assert (response.status_code, response.json()["type"]) == (507, "TooManyNamesError")
        own = {"model_name": "Houston_TX", "url": "Houston_TX"}  # which takes none of the names
        assert (await client.post("/models", json=own)).json()["type"] == "ModelTooLargeError"


@pytest.fixture
def grant() -> Iterator[Callable[[Grant], object]]:
    """Sets what the caller may use."""
    before = access.current.set(access.NOTHING)
    yield access.current.set
    access.current.reset(before)


async def test_a_registry_may_keep_models_from_a_caller(
    make_registry: MakeRegistry, grant: Callable[[Grant], object]
) -> None:
    """A name and its artifact have to be the caller's: others are a 403 that names no other's, and in no list."""
    models = {"a/m.ubj": MODEL.ubj, "a/x.ubj": MODEL.ubj, "b/m.ubj": OTHER.ubj}
    registry: Any = GuardedRegistry(await make_registry(MemoryStore(models)))
    async with client_of(registry) as client:
        grant(access.EVERYTHING)
        given = {"a/2": "a/m", "b/2": "b/m", "a/b": "b/m", "hash": "a/x"}
        for name, url in given.items():
            assert (await client.post("/models", json={"model_name": name, "url": url})).status_code == 200
        grant(Grant(("a/*",)))
        assert (await client.get("/models")).json() == {
            "models": [{"modelName": "a/2", "modelUrl": "a/m"}, {"modelName": "a/x", "modelUrl": "a/x"}]
        }
        for name in ("b/m", "b/2", "a/b", "hash"):
            refused = [
                await client.get(f"/models/{name}"),
                await client.delete(f"/models/{name}"),
                await client.post(f"/models/{name}/invoke", content=csv(ROWS), headers=CSV),
                await client.post("/models", json={"model_name": name, "url": "a/m"}),
            ]
            assert {answer.status_code for answer in refused} == {403}
            assert not any("b/m" in answer.text for answer in refused if name != "b/m")
        assert (await client.post("/models", json={"model_name": "a/3", "url": "b/m"})).status_code == 403
        foreign = await call(client, "b/m")
        assert (foreign.status_code, foreign.headers["x-amzn-errortype"]) == (403, "AccessDeniedException")
        grant(access.EVERYTHING)
        listed = (await client.get("/models")).json()["models"]
        assert {model["modelName"]: model["modelUrl"] for model in listed} == given


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'{"model_name": "m"}', b'{"model_name": 1, "url": "Houston_TX"}',
        b'{"model_name": "../m", "url": "Houston_TX"}', b'{"model_name": "m", "url": "/opt/ml/models/m/model"}',
        b'{"model_name": "m", "url": "s3://elsewhere/m.tar.gz"}', b'{"model_name": "m", "url": ""}',
        b'{"model_name": "%b", "url": "Houston_TX"}' % (b"m" * 257),
    ],
)  # fmt: skip
async def test_a_load_that_makes_no_sense(client: httpx.AsyncClient, body: bytes) -> None:
    """A body that is none, or a url that is not of this store, is a 400."""
    assert (await client.post("/models", content=body)).status_code == 400


async def test_pages_end_where_the_models_do(make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is on one page, whatever leaves between two; after the last there is no token, be that one full."""
    monkeypatch.setattr(sagemaker_models, "PAGE", 2)
    registry = await make_registry(MemoryStore({f"{name}.ubj": MODEL.ubj for name in "abcde"}))
    await registry.preload(list("dacb"))
    async with client_of(registry) as client:
        first = (await client.get("/models")).json()
        await registry.unload("a")
        second = (await client.get("/models", params={"next_page_token": first["nextPageToken"]})).json()
        assert [model["modelName"] for page in (first, second) for model in page["models"]] == list("abcd")
        assert "nextPageToken" not in second
        await registry.load("e")
        second = (await client.get("/models", params={"next_page_token": first["nextPageToken"]})).json()
        third = (await client.get("/models", params={"next_page_token": second["nextPageToken"]})).json()
        assert third == {"models": [{"modelName": "e", "modelUrl": "e"}]}
        for token in ("x", "é", base64.b64encode(b"\xff").decode()):
            assert (await client.get("/models", params={"next_page_token": token})).status_code == 400


async def test_without_management_nothing_is_loaded_or_unloaded_by_request(shared: ModelRegistry) -> None:
    """The routes that load and unload can be left out; calls and lists stay."""
    async with client_of(shared, management=False) as client:
        assert (await client.post("/models", json={"model_name": "m", "url": "Houston_TX"})).status_code == 405
        assert (await client.delete("/models/Houston_TX")).status_code == 405
        assert (await call(client)).status_code == 200
        assert (await client.get("/models")).status_code == 200


async def test_below_a_path_of_another_app(shared: ModelRegistry) -> None:
    """Mounted in an app of yours it answers, and fails, as it does alone."""
    app = Starlette(routes=[Mount("/sagemaker", sagemaker(shared))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server/sagemaker") as client:
        assert (await call(client)).status_code == 200
        assert (await call(client, "missing")).headers["x-amzn-errortype"] == "ValidationError"
        assert (await client.get("/models/missing")).json()["type"] == "NotLoadedError"
        assert (await client.get("/nowhere")).json()["type"] == "NotFound"


# Waiting


async def test_a_cold_model_blocks_nobody(make_registry: MakeRegistry) -> None:
    """While a model loads, /ping and warm calls are answered; who has waited long enough is told to try again."""
    store = GatedStore({"cold.ubj": OTHER.ubj, "warm.ubj": MODEL.ubj})
    registry = await make_registry(store)
    store.open("warm")
    async with client_of(registry) as client, client_of(registry, timeout=0) as impatient:
        assert (await call(client, "warm")).status_code == 200
        first = asyncio.create_task(call(client, "cold"))
        await store.fetched(2)
        assert (await client.get("/ping")).status_code == 200
        assert (await call(client, "warm")).status_code == 200
        late = await call(impatient, "cold")
        assert (late.status_code, late.headers["x-amzn-errortype"]) == (429, "ModelNotReadyException")
        assert int(late.headers["retry-after"]) >= 1
        sparse = await call(impatient, "cold", content_type="text/libsvm")
        assert (sparse.status_code, sparse.headers["x-amzn-errortype"]) == (429, "ModelNotReadyException")
        late = await impatient.post("/models/cold/invoke", content=csv(ROWS), headers=CSV)
        assert (late.status_code, late.json()["type"]) == (504, "LoadTimeoutError")
        store.open("cold")
        assert np.array_equal(floats((await first).json()), OTHER.expected(ROWS))
        assert store.fetches == ["warm", "cold"]


# Verification


async def test_requests_are_verified_where_that_is_asked_for(shared: ModelRegistry) -> None:
    """A verifier sees every request but pings, may read its body, and refuses in the words of AWS."""
    seen: list[bytes] = []

    async def verify(request: Request) -> None:
        seen.append(await request.body())
        if "authorization" not in request.headers:
            raise HTTPException(403, "The request is not signed.")

    async with client_of(shared, verify=verify, max_body_bytes=1000) as client:
        assert (await client.get("/ping")).status_code == 200
        refused = await call(client)
        assert (refused.status_code, refused.headers["x-amzn-errortype"]) == (403, "AccessDeniedException")
        assert refused.json() == {"Message": "The request is not signed."}
        for method, path in (
            ("GET", "/models"),
            ("DELETE", "/models/a"),
            ("POST", "/models"),
            ("POST", "/invocations"),
        ):
            response = await client.request(method, path)
            assert (response.status_code, response.json()["type"]) == (403, "Forbidden")
        assert (await call(client, authorization="AWS4-HMAC-SHA256 ...")).status_code == 200
        assert seen == [csv(ROWS), b"", b"", b"", b"", csv(ROWS)]
        response = await client.post("/invocations", content=b"1" * 1001)
        assert response.status_code == 413
