"""FastAPI: typed rows in, prices out, and a status of its own for each error.

::

    modelcache demo                                              # makes demo/models
    MODELS=demo/models uvicorn --app-dir examples fastapi_app:app
    curl localhost:8000/prices/Chicago_IL --json '[{"year_built": 1990, "square_feet": 3047, "bedrooms": 5,
        "bathrooms": 1.0, "lot_acres": 1.11, "garage_spaces": 2}]'
"""

import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from modelcache import ModelCacheError, ModelRegistry

registry = ModelRegistry(os.environ.get("MODELS", "demo/models"), memory_budget="1 GiB")  # starts nothing yet


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with registry:  # in each of uvicorn's workers, if there are several
        yield


app = FastAPI(lifespan=lifespan)


class House(BaseModel):
    """In the order of the model's columns."""

    year_built: int
    square_feet: float
    bedrooms: float
    bathrooms: float
    lot_acres: float | None = None  # missing is fine: XGBoost knows what to do
    garage_spaces: float


class Prices(BaseModel):
    city: str
    prices: list[float]
    was_loaded: bool


@app.post("/prices/{city}")
async def prices(city: str, houses: list[House]) -> Prices:
    rows = [list(house.model_dump().values()) for house in houses]
    answer = await registry.invoke(city, rows, timeout=10)
    return Prices(city=city, prices=answer.predictions.tolist(), was_loaded=answer.tier == "memory")


@app.exception_handler(ModelCacheError)
async def refuse(_: Request, error: ModelCacheError) -> JSONResponse:
    """404 for a city without a model, 400 for bad rows, 503 with Retry-After when there are too many calls, ..."""
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    return JSONResponse({"error": type(error).__name__, "message": str(error)}, error.http_status, headers)


@app.exception_handler(RequestValidationError)
async def reject(_: Request, error: RequestValidationError) -> JSONResponse:
    """422 for a body of another form, and without the input: JSON has no NaN, with which this would be a 500."""
    found = [{key: part[key] for key in ("type", "loc", "msg")} for part in error.errors()]
    return JSONResponse({"detail": found}, 422)
