"""SageMaker's own client, unmodified, and curl, against a real server on a socket."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import boto3  # type: ignore[import-untyped]
import httpx
import numpy as np
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

import zoo
from modelcache import LocalStore, MemoryStore
from modelcache.serving import sagemaker
from modelcache.testing import GatedStore
from servers.required import find_program
from serving import live

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeRegistry

CITIES = ("Chicago_IL", "Houston_TX", "LosAngeles_CA", "NewYork_NY")
MODELS = {city: zoo.model(seed=seed) for seed, city in enumerate(CITIES)}
HOUSE = [1990.0, 3047.0, 5.0, 1.0, 1.11, 2.0]
BODY = ",".join(map(str, HOUSE))


def runtime(url: str) -> Any:
    """The client that an application has, with its endpoint_url changed."""
    keys = {"aws_access_key_id": "id", "aws_secret_access_key": "secret"}
    config = Config(retries={"max_attempts": 0})  # it would sleep between two attempts
    return boto3.client("sagemaker-runtime", region_name="us-east-1", endpoint_url=url, config=config, **keys)


def csv(name: str, **more: Any) -> dict[str, Any]:
    return {"EndpointName": "houses", "ContentType": "text/csv", "TargetModel": name, "Body": BODY, **more}


def floats(numbers: Any) -> Any:
    return np.array(numbers, np.float32)


def expected(model: zoo.Model) -> Any:
    return model.expected([HOUSE])


async def test_the_example_of_sagemaker(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """A client made with endpoint_url invokes four models, and one that is copied in while the server runs."""
    root = tmp_path / "models"
    root.mkdir()
    for city in CITIES[:3]:
        (root / f"{city}.tar.gz").write_bytes(MODELS[city].targz)
    new = tmp_path / "NewYork_NY.tar.gz"
    new.write_bytes(MODELS["NewYork_NY"].targz)

    def run(url: str) -> list[float]:
        client = runtime(url)
        try:
            names = ["Houston_TX.tar.gz", "Chicago_IL.tar.gz", "Houston_TX.tar.gz", "LosAngeles_CA.tar.gz"]
            prices = [json.loads(client.invoke_endpoint(**csv(name))["Body"].read())[0] for name in names]
            shutil.copy(new, root)
            answer = client.invoke_endpoint(**csv("NewYork_NY.tar.gz", Accept="text/csv"))
            return [*prices, float(answer["Body"].read())]
        finally:
            client.close()

    registry = await make_registry(LocalStore(root))
    async with live.serving(sagemaker(registry)) as url:
        prices = await asyncio.to_thread(run, url)
    cities = ("Houston_TX", "Chicago_IL", "Houston_TX", "LosAngeles_CA", "NewYork_NY")
    assert np.array_equal(floats(prices), np.concatenate([expected(MODELS[city]) for city in cities]))
    assert registry.stats().loads == 4


async def test_what_boto3_reads_of_an_answer(make_registry: MakeRegistry) -> None:
    """Content type, variant and custom attributes arrive; names may have spaces and slashes; no rows are no answer."""
    registry = await make_registry(MemoryStore({"tenant a/New York, NY.tar.gz": MODELS["NewYork_NY"].targz}))

    def run(url: str) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
        client = runtime(url)
        try:
            name = "tenant a/New York, NY.tar.gz"
            answer = client.invoke_endpoint(**csv(name, CustomAttributes="trace=1", InferenceId="7", TargetVariant="b"))
            return answer, answer["Body"].read(), client.invoke_endpoint(**csv(name, Body=b""))
        finally:
            client.close()

    async with live.serving(sagemaker(registry)) as url:
        answer, body, empty = await asyncio.to_thread(run, url)
    assert np.array_equal(floats(json.loads(body)), expected(MODELS["NewYork_NY"]))
    assert answer["ContentType"] == "application/json"
    assert (answer["CustomAttributes"], answer["InvokedProductionVariant"]) == ("trace=1", "b")
    assert empty["ResponseMetadata"]["HTTPStatusCode"] == 204
    assert empty["Body"].read() == b""


async def test_boto3_raises_its_own_classes(make_registry: MakeRegistry) -> None:
    """An application's ``except client.exceptions.ModelError`` and its like work, with the attributes they have."""
    store = GatedStore({"a.ubj": zoo.model().ubj, "damaged.ubj": zoo.model().ubj[:-100], "cold.ubj": zoo.model().ubj})
    store.open("a", "damaged", "missing")
    registry = await make_registry(store)

    def fail(client: Any, name: str, **more: Any) -> ClientError:
        with pytest.raises(ClientError) as caught:
            client.invoke_endpoint(**csv(name, **more))
        return caught.value

    def run(url: str, impatient: str) -> None:
        client, hasty = runtime(url), runtime(impatient)
        try:
            error = fail(client, "a", ContentType="image/png")
            assert isinstance(error, client.exceptions.ModelError)
            assert (error.response["OriginalStatusCode"], error.response["LogStreamArn"]) == (415, "")
            assert error.response["OriginalMessage"] in error.response["Error"]["Message"]
            error = fail(client, "damaged")
            assert isinstance(error, client.exceptions.ModelError)
            assert error.response["OriginalStatusCode"] == 422
            assert isinstance(fail(client, "missing"), client.exceptions.ValidationError)
            assert isinstance(fail(client, "../a"), client.exceptions.ValidationError)
            with pytest.raises(client.exceptions.ValidationError, match="X-Amzn-SageMaker-Target-Model"):
                client.invoke_endpoint(EndpointName="houses", ContentType="text/csv", Body=BODY)
            error = fail(hasty, "cold")
            assert isinstance(error, hasty.exceptions.ModelNotReadyException)
            assert error.response["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "1"
        finally:
            client.close()
            hasty.close()

    async with live.serving(sagemaker(registry)) as url, live.serving(sagemaker(registry, timeout=0)) as impatient:
        load = asyncio.create_task(registry.load("cold"))
        await store.fetched(1)
        await asyncio.to_thread(run, url, impatient)
        store.open("cold")
        await load
        await registry.close()

        def run_closed() -> None:
            client = runtime(url)
            try:
                assert isinstance(fail(client, "a"), client.exceptions.ServiceUnavailable)
            finally:
                client.close()

        await asyncio.to_thread(run_closed)
    gc.collect()  # exceptions and their frames keep responses and each other alive


async def test_a_bug_reaches_boto3_as_internal_failure(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody has foreseen is raised by boto3 as InternalFailure."""
    registry = await make_registry()

    async def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    def run(url: str) -> None:
        client = runtime(url)
        try:
            with pytest.raises(client.exceptions.InternalFailure):
                client.invoke_endpoint(**csv("a"))
        finally:
            client.close()

    monkeypatch.setattr(registry, "predict", fail)
    async with live.serving(sagemaker(registry)) as url:
        await asyncio.to_thread(run, url)


async def test_curl(make_registry: MakeRegistry) -> None:
    """An operator's curl loads a model by a name with a slash and a space, invokes it, and unloads it."""
    curl = find_program("curl", "install the package curl.")
    registry = await make_registry(MemoryStore({"tenant a/x.ubj": zoo.model().ubj}))

    async def run(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            curl, "--silent", "--show-error", "--fail", *arguments, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, arguments
        return output.decode()

    async with live.serving(sagemaker(registry)) as url:
        assert await run(f"{url}/ping") == ""
        await run("--data", '{"model_name": "tenant a/x", "url": "tenant a/x.ubj"}', f"{url}/models")
        model = f"{url}/models/{quote('tenant a/x', safe='')}"
        assert json.loads(await run(model)) == {"modelName": "tenant a/x", "modelUrl": "tenant a/x.ubj"}
        answer = await run("--header", "Content-Type: text/csv", "--data", BODY, f"{model}/invoke")
        assert np.array_equal(floats(json.loads(answer)), expected(zoo.model()))
        target = ("--header", "X-Amzn-SageMaker-Target-Model: tenant a/x")
        answer = await run(*target, "--header", "Content-Type: text/csv", "--data", BODY, f"{url}/invocations")
        assert float(answer) == expected(zoo.model())[0]
        await run("--request", "DELETE", model)
        assert json.loads(await run(f"{url}/models")) == {"models": []}


async def test_a_client_that_leaves_in_the_middle_of_its_body(
    make_registry: MakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that is never whole is given up in silence, and the server goes on."""
    registry = await make_registry(MemoryStore({"a.ubj": zoo.model().ubj}))
    async with live.serving(sagemaker(registry)) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        head = ("POST /invocations HTTP/1.1", "Host: x", "X-Amzn-SageMaker-Target-Model: a", "Content-Length: 9")
        writer.write("\r\n".join((*head, "", "1,2,3")).encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/ping")).status_code == 200
    assert not caplog.records
