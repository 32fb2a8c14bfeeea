"""Litestar: the registry is one of the app's lifespans, and is injected where it is used.

::

    modelcache demo                                              # makes demo/models
    MODELS=demo/models uvicorn --app-dir examples litestar_app:app
    curl localhost:8000/prices/Chicago_IL --json '[{"year_built": 1990, "square_feet": 3047, "bedrooms": 5,
        "bathrooms": 1.0, "lot_acres": 1.11, "garage_spaces": 2}]'
"""

import math
import os
from dataclasses import astuple, dataclass
from typing import Any

from litestar import Litestar, Request, Response, post
from litestar.di import Provide

from modelcache import ModelCacheError, ModelRegistry

REGISTRY = ModelRegistry(os.environ.get("MODELS", "demo/models"), memory_budget="1 GiB")  # starts nothing yet


@dataclass
class House:
    """In the order of the model's columns."""

    year_built: int
    square_feet: float
    bedrooms: float
    bathrooms: float
    lot_acres: float | None  # missing is fine: XGBoost knows what to do
    garage_spaces: float


@dataclass
class Prices:
    city: str
    prices: list[float]
    was_loaded: bool


@post("/prices/{city:str}", status_code=200)
async def prices(city: str, data: list[House], registry: ModelRegistry) -> Prices:
    answer = await registry.invoke(city, [astuple(house) for house in data], timeout=10)
    return Prices(city, answer.predictions.tolist(), answer.tier == "memory")


def refuse(_: Request[Any, Any, Any], error: ModelCacheError) -> Response[dict[str, str]]:
    """404 for a city without a model, 400 for bad rows, 503 with Retry-After when there are too many calls, ..."""
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    body = {"error": type(error).__name__, "message": str(error)}
    return Response(body, status_code=error.http_status, headers=headers)


def refuse_body(_: Request[Any, Any, Any], error: Exception) -> Response[dict[str, str]]:
    """400 for what Litestar would answer with 500: strings that are not UTF-8, and lists nested a thousand deep."""
    return Response({"error": type(error).__name__, "message": "The body is not JSON."}, status_code=400)


app = Litestar(
    [prices],
    lifespan=[REGISTRY],
    dependencies={"registry": Provide(lambda: REGISTRY, sync_to_thread=False)},
    exception_handlers={ModelCacheError: refuse, UnicodeDecodeError: refuse_body, RecursionError: refuse_body},
)
