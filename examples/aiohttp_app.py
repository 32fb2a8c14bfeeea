"""aiohttp: the registry lives as long as the app, in its ``cleanup_ctx``.

::

    modelcache demo                                              # makes demo/models
    MODELS=demo/models PYTHONPATH=examples python -m aiohttp.web aiohttp_app:make_app
    curl localhost:8080/prices/Chicago_IL --json '[[1990, 3047, 5, 1.0, 1.11, 2]]'
"""

import json
import math
import os
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from modelcache import ModelCacheError, ModelRegistry

REGISTRY = web.AppKey("registry", ModelRegistry)


async def registry(app: web.Application) -> AsyncIterator[None]:
    async with ModelRegistry(os.environ.get("MODELS", "demo/models"), memory_budget="1 GiB") as app[REGISTRY]:
        yield


async def prices(request: web.Request) -> web.Response:
    city = request.match_info["city"]
    try:
        rows = json.loads(await request.read())
    except (ValueError, RecursionError):  # not JSON, not UTF-8, nested a thousand deep: with request.json() a 500
        raise web.HTTPBadRequest(text="The body is not JSON.") from None
    answer = await request.app[REGISTRY].invoke(city, rows, timeout=10)
    return web.json_response(
        {"city": city, "prices": answer.predictions.tolist(), "was_loaded": answer.tier == "memory"}
    )


@web.middleware
async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
    """404 for a city without a model, 400 for bad rows, 503 with Retry-After when there are too many calls, ..."""
    try:
        return await handler(request)
    except ModelCacheError as error:
        headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
        body = {"error": type(error).__name__, "message": str(error)}
        return web.json_response(body, status=error.http_status, headers=headers)


def make_app(_: list[str] | None = None) -> web.Application:
    app = web.Application(middlewares=[refuse])
    app.cleanup_ctx.append(registry)
    app.router.add_post("/prices/{city}", prices)
    return app
