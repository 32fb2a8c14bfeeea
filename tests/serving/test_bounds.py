"""How much one request may ask for, of both apps."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from orjson import OPT_SERIALIZE_NUMPY, dumps
from starlette.applications import Starlette
from starlette.routing import Mount

import zoo
from modelcache import MemoryStore, ModelRegistry
from modelcache.lease import Lease
from modelcache.serving import bounds, open_inference, open_inference_app, sagemaker
from modelcache.serving.codecs import json_text
from modelcache.serving.open_inference_messages import OUTPUTS, encode_response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CSV = {"content-type": "text/csv"}
KINDS = ("regression", "multiclass")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def registry() -> AsyncIterator[ModelRegistry]:
    models = {f"{kind}.ubj": zoo.model(kind).ubj for kind in KINDS} | {"cold.ubj": zoo.model("multiclass").ubj}
    async with ModelRegistry(MemoryStore(models), workers=1, memory_budget="64 MiB") as registry:
        yield registry


def client_of(registry: ModelRegistry, **options: Any) -> httpx.AsyncClient:
    apps = [Mount("/kserve", open_inference(registry, **options)), Mount("/", sagemaker(registry, **options))]
    return httpx.AsyncClient(transport=httpx.ASGITransport(Starlette(routes=apps)), base_url="http://server")


def asking(count: int, *outputs: str) -> dict[str, Any]:
    data = np.zeros(count * zoo.N).tolist()
    tensor = {"name": "x", "shape": [count, zoo.N], "datatype": "FP32", "data": data}
    return {"inputs": [tensor], "outputs": [{"name": output} for output in outputs]}


def csv(count: int) -> str:
    return "1,2,3,4,5,6\n" * count


async def test_rows_have_a_limit(registry: ModelRegistry) -> None:
    """One row more than the app takes is a 413 that says how many it takes."""
    async with client_of(registry, max_rows=2) as client:
        for count, status in ((2, 200), (3, 413)):
            answers = [
                await client.post("/models/regression/invoke", content=csv(count), headers=CSV),
                await client.post("/kserve/v2/models/regression/infer", json=asking(count)),
            ]
            assert [answer.status_code for answer in answers] == [status, status]
            assert status == 200 or all("the limit here is 2" in answer.text for answer in answers)


async def test_one_row_of_one_dimension_is_one_row(registry: ModelRegistry) -> None:
    """Its features are not counted as rows."""
    async with client_of(registry, max_rows=1) as client:
        request = asking(1)
        request["inputs"][0]["shape"] = [zoo.N]
        assert (await client.post("/kserve/v2/models/regression/infer", json=request)).status_code == 200


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [*((name,) for name in OUTPUTS), tuple(OUTPUTS)])
async def test_an_answer_has_a_limit(
    registry: ModelRegistry, kind: str, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are known before anything is predicted, exactly: as many as are allowed are sent, and no more."""
    count = bounds.FEW_ROWS + 1
    async with client_of(registry) as client:
        path = f"/kserve/v2/models/{kind}/infer"
        answer = (await client.post(path, json=asking(count, *outputs))).json()
        numbers = sum(len(output["data"]) for output in answer["outputs"])
        monkeypatch.setattr(bounds, "MOST_NUMBERS", numbers)
        assert (await client.post(path, json=asking(count, *outputs))).status_code == 200
        monkeypatch.setattr(bounds, "MOST_NUMBERS", numbers - 1)
        monkeypatch.setattr(Lease, "predict", None)
        refused = await client.post(path, json=asking(count, *outputs))
        assert refused.status_code == 413, refused.text
        assert f"Send {count - 1} rows a request" in refused.json()["error"]


async def test_the_answer_of_a_cold_model_has_a_limit(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded first, as nothing else tells how many outputs it has."""
    monkeypatch.setattr(bounds, "MOST_NUMBERS", 60)
    async with client_of(registry) as client:
        for count, status in ((20, 200), (21, 413)):
            await registry.unload("cold")
            answer = await client.post("/models/cold/invoke", content=csv(count), headers=CSV)
            assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    "path",
    ["/models", *(f"/kserve/v2/repository/{what}" for what in ("index", "models/cold/load", "models/cold/unload"))],
)
async def test_commands_are_short(registry: ModelRegistry, path: str) -> None:
    """They are parsed on the event loop: a name, a url and little more are read, however large other bodies may be."""
    body = b'{"model_name": "cold", "url": "cold", "more": [%b]}'
    async with client_of(registry) as client:
        for size, status in (((1 << 14) - len(body) + 2, {200, 409}), ((1 << 14) - len(body) + 3, {413})):
            answer = await client.post(path, content=body % (b" " * size))
            assert answer.status_code in status, answer.text


async def test_a_large_answer_is_written_in_a_thread(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop has others to serve."""
    threads = []

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return encode_response(*arguments)

    monkeypatch.setattr(open_inference_app, "encode_response", noted)
    async with client_of(registry) as client:
        for count in (1, 20_000):
            answer = await client.post("/kserve/v2/models/regression/infer", json=asking(count))
            assert len(answer.json()["outputs"][0]["data"]) == count
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.parametrize("shape", [(1,), (4,), (9,), (8, 3), (2, 9), (1, 9)])
def test_numbers_are_written_piece_by_piece(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the pieces other threads get the GIL, which orjson holds; the text is the same."""
    numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    whole = dumps(numbers, option=OPT_SERIALIZE_NUMPY)[1:-1]
    written: list[int] = []

    def noted(piece: np.ndarray[Any, Any], *options: Any) -> bytes:
        written.append(piece.size)
        return dumps(piece, *options)

    monkeypatch.setattr(json_text, "_PIECE", 4)
    monkeypatch.setattr("modelcache.serving.codecs.json_text.orjson.dumps", noted)
    assert json_text.digits(numbers) == whole
    assert sum(written) == numbers.size
    assert max(written) <= max(4, shape[-1] if len(shape) > 1 else 1)
