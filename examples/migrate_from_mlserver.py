"""From MLServer, ModelMesh or Triton to ``modelcache serve``: clients of the Open Inference Protocol stay as they are.

Of their two kinds, one sends plain JSON, and one is tritonclient, with tensors as bytes. All that changes is the host.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
import xgboost as xgb

FLATS = [[3.0, 110.0], [5.0, 160.0]]


def post(url: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(url, json.dumps(body or {}).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request) as response:  # noqa: S310
        return json.load(response)


def call_as_clients_of_mlserver(host: str) -> None:
    tensor = {"name": "predict", "shape": [2, 2], "datatype": "FP32", "data": FLATS}
    answer = post(f"http://{host}/v2/models/flats/infer", {"inputs": [tensor]})
    output = answer["outputs"][0]
    print("JSON:", answer["model_name"], output["shape"], *(f"{price:,.0f}" for price in output["data"]))
    print("JSON:", *(f"{model['name']} is {model['state']}" for model in post(f"http://{host}/v2/repository/index")))


def call_as_clients_of_triton(host: str) -> None:
    with triton.InferenceServerClient(host) as client:
        metadata = client.get_model_metadata("flats")
        tensor = triton.InferInput(metadata["inputs"][0]["name"], [2, 2], "FP32")
        tensor.set_data_from_numpy(np.array(FLATS, np.float32))
        result = client.infer("flats", [tensor])
        prices = result.as_numpy(metadata["outputs"][0]["name"])
        print("Triton:", client.is_model_ready("flats"), *(f"{price:,.0f}" for price in prices.ravel()))


@contextmanager
def serve(artifacts: str) -> Iterator[str]:
    """Run ``modelcache serve``, as a container or a unit of systemd would, and give its host and port."""
    command = [sys.executable, "-m", "modelcache", "serve", artifacts, "--port", "0", "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603 - ours
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split(" on http://")[1].split()[0]
        finally:
            server.terminate()  # it answers what it has accepted, and ends


def train(artifact: Path) -> None:
    random = np.random.default_rng(0)
    rooms, area = random.integers(1, 7, 500), random.normal(120, 30, 500)
    flats = xgb.DMatrix(np.column_stack([rooms, area]), 20_000 * rooms + 3_000 * area)
    xgb.train({"nthread": 1}, flats, 30).save_model(artifact)


with tempfile.TemporaryDirectory() as folder:
    train(Path(folder, "flats.ubj"))  # MLServer's flats/model.ubj, under the model's own name
    with serve(folder) as host:
        call_as_clients_of_mlserver(host)
        call_as_clients_of_triton(host)
