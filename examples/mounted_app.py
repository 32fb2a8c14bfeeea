"""The protocols of SageMaker and of Open Inference inside an app of yours, beside your own routes, on one registry.

::

    modelcache demo                                              # makes demo/models
    MODELS=demo/models uvicorn --app-dir examples mounted_app:app
    curl localhost:8000/sagemaker/invocations -H 'content-type: text/csv' \\
        -H 'x-amzn-sagemaker-target-model: Chicago_IL.tar.gz' -d '1990,3047,5,1.0,1.11,2'
    curl localhost:8000/v2/models/Chicago_IL/infer --json '{"inputs": [{"name": "predict", "datatype": "FP32",
        "shape": [1, 6], "data": [1990, 3047, 5, 1.0, 1.11, 2]}]}'

boto3 takes ``endpoint_url="http://localhost:8000/sagemaker"``, and tritonclient ``"localhost:8000"``. With
``management=False`` they cannot load or unload models. What ``modelcache serve`` has besides, such as tokens and limits
of connections, is for your app to decide.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from modelcache import ModelRegistry
from modelcache.serving import open_inference, sagemaker

registry = ModelRegistry(os.environ.get("MODELS", "demo/models"), memory_budget="1 GiB")  # starts nothing yet


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with registry:  # the protocols neither start nor close it
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/cities")
async def cities() -> list[str]:
    return [name async for name in registry.names()]


app.mount("/sagemaker", sagemaker(registry, management=False))
app.mount("/", open_inference(registry, management=False))  # the last, since it takes what is left
