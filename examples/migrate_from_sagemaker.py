"""From a SageMaker multi-model endpoint to ``modelcache serve``: boto3, the calls, the errors and the artifacts stay.

``predict_value`` and ``predict_houses`` are code as it runs against SageMaker. All that changes is where their client
sends to: see ``main``.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import numpy as np
import xgboost as xgb

HOUSE = [1990, 3047, 5, 1.0, 1.11, 2]


def predict_value(runtime: Any, model: str, features: list[float]) -> float:
    response = runtime.invoke_endpoint(
        EndpointName="houses", ContentType="text/csv", TargetModel=model, Body=",".join(map(str, features))
    )
    return float(json.loads(response["Body"].read())[0])


def predict_houses(runtime: Any, artifacts: Path) -> None:
    for model in ("Chicago_IL.tar.gz", "Houston_TX.tar.gz", "Chicago_IL.tar.gz", "Houston_TX.tar.gz"):
        print(f"{model}: {predict_value(runtime, model, HOUSE):,.0f}")
    try:
        predict_value(runtime, "Dallas_TX.tar.gz", HOUSE)
    except runtime.exceptions.ValidationError as error:
        print("Dallas_TX.tar.gz:", error.response["Error"]["Code"])
    # A new city needs no new deployment: copying its artifact to the others is enough.
    shutil.copy(artifacts / "Houston_TX.tar.gz", artifacts / "Austin_TX.tar.gz")
    print(f"Austin_TX.tar.gz: {predict_value(runtime, 'Austin_TX.tar.gz', HOUSE):,.0f}")


def main(artifacts: Path) -> None:
    with serve(artifacts) as url:
        # before: runtime = boto3.client("sagemaker-runtime")
        runtime = boto3.client("sagemaker-runtime", endpoint_url=url)
        predict_houses(runtime, artifacts)


@contextmanager
def serve(artifacts: Path) -> Iterator[str]:
    """Run ``modelcache serve``, as a container or a unit of systemd would, and give its address."""
    command = [sys.executable, "-m", "modelcache", "serve", str(artifacts), "--port", "0", "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603 - ours
        assert server.stdout is not None
        try:
            yield "http://" + server.stdout.readline().split(" on http://")[1].split()[0]
        finally:
            server.terminate()  # it answers what it has accepted, and ends


def train(artifact: Path, factor: float) -> None:
    """Make an artifact as SageMaker's training jobs do: a tar.gz with the member ``xgboost-model``."""
    houses = np.array(HOUSE) * np.random.default_rng(0).uniform(0.5, 1.5, (300, 6))
    prices = factor * houses[:, 1]
    xgb.train({"nthread": 1}, xgb.DMatrix(houses, prices), 20).save_model(artifact.with_name("model.ubj"))
    with tarfile.open(artifact, "w:gz") as tar:
        tar.add(artifact.with_name("model.ubj"), "xgboost-model")
    artifact.with_name("model.ubj").unlink()


# boto3 signs each request, also for a server that does not ask who it is; yours has all this in its configuration.
os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
os.environ.setdefault("AWS_ACCESS_KEY_ID", "none")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "none")

with tempfile.TemporaryDirectory() as folder:
    train(Path(folder, "Chicago_IL.tar.gz"), 150)
    train(Path(folder, "Houston_TX.tar.gz"), 120)
    main(Path(folder))
