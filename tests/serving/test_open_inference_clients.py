"""Clients of Triton and KServe, as they are installed, against the Open Inference app under a real server."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import gevent  # type: ignore[import-untyped]
import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from httpx import HTTPStatusError
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from tritonclient.utils import InferenceServerException

import zoo
from modelcache import MemoryStore, ModelRegistry
from modelcache.serving import open_inference
from serving import live

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ROWS = zoo.rows(3000)
"""Some cells are missing; the answers are worth to be compressed."""
# Triton's clients do not read answers about health, which are empty there: such a connection is left to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:[uU]nclosed:ResourceWarning")

CODINGS = [None, "gzip", "deflate"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def url() -> AsyncIterator[str]:
    models = {
        "plain.ubj": zoo.model().ubj, "tenant_a/big house.tar.gz": zoo.model(seed=1).targz,
        "named.ubj": zoo.model(names=True).ubj, "multi.ubj": zoo.model("multiclass").ubj,
    }  # fmt: skip
    async with (
        ModelRegistry(MemoryStore(models), workers=1, memory_budget="64 MiB") as registry,
        live.serving(open_inference(registry)) as url,
    ):
        yield url


# tritonclient


def matrix(values: np.ndarray[Any, Any], *, binary: bool = True) -> Any:
    tensor = tritonclient.http.InferInput("input", list(values.shape), "FP32")
    return tensor.set_data_from_numpy(values, binary_data=binary)


def columns(values: np.ndarray[Any, Any]) -> list[Any]:
    tensors = [tritonclient.http.InferInput(name, [len(values)], "FP64") for name in zoo.FEATURES]
    return [tensor.set_data_from_numpy(column.astype("f8")) for tensor, column in zip(tensors, values.T, strict=True)]


@pytest.fixture
async def triton(url: str) -> AsyncIterator[Any]:
    async with tritonclient.http.aio.InferenceServerClient(url.removeprefix("http://")) as client:
        yield client
    gc.collect()


@pytest.mark.parametrize("coding", CODINGS)
async def test_triton_gets_bytes_by_default(triton: Any, coding: str | None) -> None:
    """Both ways, compressed or not, bit by bit."""
    result = await triton.infer(
        "plain", [matrix(ROWS)], request_id="7",
        request_compression_algorithm=coding, response_compression_algorithm=coding,
    )  # fmt: skip
    (output,) = result.get_response()["outputs"]
    assert output["parameters"] == {"binary_data_size": 4 * len(ROWS)}
    assert np.array_equal(result.as_numpy("predict"), zoo.model().expected(ROWS))
    assert result.get_response()["id"] == "7"


async def test_triton_sends_and_gets_json(triton: Any) -> None:
    """Missing values are what its JSON writer makes of NaN."""
    wanted = [tritonclient.http.InferRequestedOutput(name, binary_data=False) for name in ("leaf", "predict")]
    result = await triton.infer("multi", [matrix(ROWS, binary=False)], outputs=wanted)
    assert np.array_equal(result.as_numpy("predict"), zoo.model("multiclass").expected(ROWS))
    assert np.array_equal(result.as_numpy("leaf"), zoo.model("multiclass").expected(ROWS, pred_leaf=True))


async def test_triton_sends_columns_by_name(triton: Any) -> None:
    """In any order."""
    result = await triton.infer("named", columns(ROWS)[::-1])
    assert np.array_equal(result.as_numpy("predict"), zoo.model(names=True).expected(ROWS))


async def test_triton_asks_for_everything(triton: Any) -> None:
    """Health, metadata, configuration, statistics, the repository: all by its own methods, also with a version."""
    name = "tenant_a/big house"
    assert await triton.is_server_live() and await triton.is_server_ready() and await triton.is_model_ready(name)
    assert (await triton.get_server_metadata())["name"] == "modelcache"
    await triton.load_model(name)
    (version,) = (await triton.get_model_metadata(name))["versions"]
    assert await triton.is_model_ready(name, version) and not await triton.is_model_ready(name, "7")
    assert (await triton.get_model_metadata(name, version))["name"] == name
    assert (await triton.get_model_config(name, version))["max_batch_size"] == 0
    result = await triton.infer(name, [matrix(ROWS)], model_version=version)
    assert np.array_equal(result.as_numpy("predict"), zoo.model(seed=1).expected(ROWS))
    (stats,) = (await triton.get_inference_statistics(name))["model_stats"]
    assert stats in (await triton.get_inference_statistics())["model_stats"]
    index = {item["name"]: item["state"] for item in await triton.get_model_repository_index()}
    assert index[name] == "READY" and index.keys() >= {"plain", "named", "multi"}
    await triton.unload_model(name)
    index = {item["name"]: item["state"] for item in await triton.get_model_repository_index()}
    assert index[name] == "UNAVAILABLE"


async def test_triton_raises_what_it_is_told(triton: Any) -> None:
    """The status and the message are in its own exception."""
    with pytest.raises(InferenceServerException, match="no model 'nowhere'") as unknown:
        await triton.infer("nowhere", [matrix(ROWS)])
    assert unknown.value.status() == "404"
    with pytest.raises(InferenceServerException, match="takes 6 columns, the rows have 5"):
        await triton.infer("plain", [matrix(ROWS[:, :5].copy())])
    texts = tritonclient.http.InferInput("x", [1, 1], "BYTES").set_data_from_numpy(np.array([[b"a"]], object))
    with pytest.raises(InferenceServerException, match="Send categories as the codes"):
        await triton.infer("plain", [texts])
    assert not await triton.is_model_ready("nowhere")


async def in_a_thread(url: str, use: Callable[[Any], None]) -> None:
    """Use the client that blocks; what gevent has made for the thread is gone after it."""

    def run() -> None:
        try:
            with tritonclient.http.InferenceServerClient(url.removeprefix("http://"), concurrency=2) as client:
                use(client)
        finally:
            gevent.get_hub().destroy(destroy_loop=True)
            gc.collect()

    await asyncio.to_thread(run)


@pytest.mark.parametrize("coding", CODINGS)
async def test_the_triton_client_that_blocks_gets_the_same(url: str, coding: str | None) -> None:
    """It speaks over gevent, from a thread."""

    def use(client: Any) -> None:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("plain")
        options = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
        result = client.infer("plain", [matrix(ROWS)], **options)
        assert np.array_equal(result.as_numpy("predict"), zoo.model().expected(ROWS))
        calls = [client.async_infer("multi", [matrix(ROWS)], **options) for _ in range(4)]
        for call in calls:
            answer = call.get_result().as_numpy("predict")
            assert np.array_equal(answer, zoo.model("multiclass").expected(ROWS))
        with pytest.raises(InferenceServerException, match="no model 'nowhere'"):
            client.get_model_metadata("nowhere")

    await in_a_thread(url, use)


# KServe


@pytest.fixture
async def kserve() -> AsyncIterator[InferenceRESTClient]:
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0)) as client:
        yield client


@pytest.mark.parametrize("binary", [False, True])
async def test_kserve_gets_predictions(url: str, kserve: Any, binary: bool) -> None:
    """By JSON and by bytes."""
    tensor = InferInput("input", list(ROWS.shape), "FP32")
    tensor.set_data_from_numpy(np.nan_to_num(ROWS), binary_data=binary)
    request = InferRequest("plain", [tensor], request_id="7", parameters={"binary_data_output": binary})
    answer = await kserve.infer(url, request, "plain")
    assert np.array_equal(answer.outputs[0].as_numpy(), zoo.model().expected(np.nan_to_num(ROWS)))
    assert (answer.id, answer.model_name, answer.outputs[0].name) == ("7", "plain", "predict")


async def test_kserve_asks_for_health(url: str, kserve: Any) -> None:
    """A cold model is ready, one that is not there is not."""
    assert await kserve.is_server_live(url) is True and await kserve.is_server_ready(url) is True
    assert await kserve.is_model_ready(url, "tenant_a/big house") and not await kserve.is_model_ready(url, "nowhere")


async def test_kserve_raises_what_it_is_told(url: str, kserve: Any) -> None:
    """The message is in its own exception."""
    tensor = InferInput("input", [1, 1], "FP32", data=[1.0])
    with pytest.raises(HTTPStatusError, match="takes 6 columns, the rows have 1"):
        await kserve.infer(url, InferRequest("plain", [tensor]), "plain")
