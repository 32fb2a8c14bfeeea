"""Flask, which has no event loop: the synchronous registry, shared by all threads.

::

    modelcache demo                                              # makes demo/models
    MODELS=demo/models flask --app examples/flask_app.py run
    MODELS=demo/models gunicorn --chdir examples --preload --workers 2 --threads 16 flask_app:app
    curl localhost:5000/prices/Chicago_IL --json '[[1990, 3047, 5, 1.0, 1.11, 2]]'
"""

import atexit
import math
import os
from typing import Any

from flask import Flask, request

from modelcache import ModelCacheError
from modelcache.sync import ModelRegistry

# It starts with the first call, and so after Gunicorn has forked; the budget is for each of its workers.
registry = ModelRegistry(os.environ.get("MODELS", "demo/models"), memory_budget="1 GiB")
atexit.register(registry.close)

app = Flask(__name__)


@app.post("/prices/<city>")
def prices(city: str) -> dict[str, Any]:
    answer = registry.invoke(city, request.get_json(), timeout=10)
    return {"city": city, "prices": answer.predictions.tolist(), "was_loaded": answer.tier == "memory"}


@app.errorhandler(ModelCacheError)
def refuse(error: ModelCacheError) -> tuple[dict[str, str], int, dict[str, str]]:
    """404 for a city without a model, 400 for bad rows, 503 with Retry-After when there are too many calls, ..."""
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    return {"error": type(error).__name__, "message": str(error)}, error.http_status, headers


@app.errorhandler(RecursionError)
def refuse_body(_: RecursionError) -> tuple[dict[str, str], int]:
    """400 for lists nested a thousand deep, which Flask would answer with 500."""
    return {"error": "RecursionError", "message": "The body is nested too deeply."}, 400
