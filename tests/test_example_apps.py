"""The examples for web frameworks run under the servers that their first lines name, and answer as they promise."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import boto3  # type: ignore[import-untyped]
import httpx
import pytest

import zoo

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parents[1] / "examples"
HOUSE = {"year_built": 1990, "square_feet": 3047, "bedrooms": 5, "bathrooms": 1.0, "lot_acres": 1.11,
         "garage_spaces": 2}  # fmt: skip
ROW = list(HOUSE.values())

NO_JSON = (b"", b"[[1", b'["\xe9"]', b"\xff\xfe[", b"[" * 99_999, b'[{"year_built": NaN}]', b'"\\ud800"')
"""Bodies whose sender is to hear that it is his mistake, in whatever way the framework comes upon it."""

UVICORN = "-m uvicorn --app-dir {examples} --port 0 {app}:app"


@dataclass(frozen=True)
class Example:
    """How to run it, and what to send."""

    command: str
    house: Any
    bad_house: Any
    """One that the registry refuses, or the framework before it."""
    refusal: int


APPS = {
    "fastapi_app": Example(UVICORN, HOUSE, HOUSE | {"bedrooms": "many"}, 422),
    "litestar_app": Example(UVICORN, HOUSE, HOUSE | {"bedrooms": "many"}, 400),
    "aiohttp_app": Example("-m aiohttp.web -P 0 {app}:make_app", ROW, ROW[1:], 400),
    "flask_app": Example("-m flask --app {examples}/{app}.py run --port 0", ROW, ROW[1:], 400),
}
MOUNTED = {"mounted_app": UVICORN}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for city in ("Chicago_IL", "Dallas_TX"):
        (folder / f"{city}.tar.gz").write_bytes(zoo.model().targz)
    return folder


@contextmanager
def running(app: str, command: str, models: Path) -> Iterator[httpx.Client]:
    """Start an example as its readers do, on a free port; it ends by Ctrl-C, without a complaint."""
    with subprocess.Popen(
        [sys.executable, "-u", *command.format(examples=EXAMPLES, app=app).split()],
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}", "MODELS": str(models)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        try:
            with httpx.Client(base_url=address(server.stdout), timeout=30) as client:
                yield client
            server.send_signal(signal.SIGINT)
            rest = server.stdout.read()
            server.wait(30)
        finally:
            server.kill()
    assert "Traceback" not in rest
    assert "Warning" not in rest


def address(output: IO[str]) -> str:
    """Return the address that a server says it listens on."""
    for line in output:
        if found := re.search(r"unning on (http://[^ ]+:[1-9]\d*)", line):
            return found[1]
    raise AssertionError("the server has ended")


@pytest.mark.parametrize("app", APPS)
def test_an_app_answers(app: str, models: Path, no_processes_left: None) -> None:
    """A cold call, a warm one, 16 at once, a city without a model, a house that is none, and a body that is none."""
    example = APPS[app]
    with running(app, example.command, models) as client:
        check(client, example)


def check(client: httpx.Client, example: Example) -> None:
    expected = [float(price) for price in zoo.model().expected([ROW, ROW])]
    for was_loaded in (False, True):
        answer = client.post("/prices/Chicago_IL", json=[example.house, example.house])
        assert answer.status_code == 200
        assert answer.json() == {"city": "Chicago_IL", "prices": expected, "was_loaded": was_loaded}
    with ThreadPoolExecutor(16) as threads:
        calls = [threads.submit(client.post, "/prices/Dallas_TX", json=[example.house]) for _ in range(64)]
        assert all(call.result().json()["prices"] == expected[:1] for call in calls)
    missing = client.post("/prices/Nowhere", json=[example.house])
    assert (missing.status_code, missing.json()["error"]) == (404, "ModelNotFoundError")
    assert "Nowhere" in missing.json()["message"]
    assert client.post("/prices/Chicago_IL", json=[example.bad_house]).status_code == example.refusal
    assert client.post("/prices/Chicago_IL", json=[]).status_code == 400
    for body in NO_JSON:
        answer = client.post("/prices/Chicago_IL", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), body[:30]


def test_the_protocols_in_an_app(models: Path, no_processes_left: None) -> None:
    """Clients of SageMaker and of Open Inference, and the app's own routes, are answered by one registry."""
    expected = zoo.model().expected([ROW])
    with running("mounted_app", MOUNTED["mounted_app"], models) as client:
        runtime = boto3.client(
            "sagemaker-runtime", endpoint_url=f"{client.base_url}/sagemaker", region_name="us-east-1",
            aws_access_key_id="none", aws_secret_access_key="none",
        )  # fmt: skip
        call = {"EndpointName": "any", "ContentType": "text/csv", "Body": ",".join(map(str, ROW))}
        for _ in ("cold", "warm"):
            answer = runtime.invoke_endpoint(TargetModel="Chicago_IL.tar.gz", **call)
            assert json.loads(answer["Body"].read()) == pytest.approx(expected)
        with pytest.raises(runtime.exceptions.ValidationError):
            runtime.invoke_endpoint(TargetModel="Nowhere.tar.gz", **call)
        tensor = {"name": "predict", "datatype": "FP32", "shape": [1, 6], "data": ROW}
        answer = client.post("/v2/models/Chicago_IL/infer", json={"inputs": [tensor]})
        assert answer.json()["outputs"][0]["data"] == pytest.approx(expected)
        tensor |= {"shape": [1, 5], "data": ROW[1:]}
        assert client.post("/v2/models/Chicago_IL/infer", json={"inputs": [tensor]}).status_code == 400
        assert client.post("/v2/models/Nowhere/infer", json={"inputs": [tensor]}).status_code == 404
        assert client.post("/v2/repository/models/Chicago_IL/unload").status_code in (404, 405)
        assert client.get("/cities").json() == ["Chicago_IL", "Dallas_TX"]
