"""The protocols of SageMaker: the runtime's, which boto3 speaks, and that of multi-model containers.

::

    POST   /endpoints/{EndpointName}/invocations   invoke_endpoint(TargetModel=...); any EndpointName will do
    POST   /invocations                            the single-container form: the model is named by the same header
    POST   /models/{model_name}/invoke             the multi-model form; a model that is not resident is loaded
    GET    /ping                                   200, whatever is loading
    GET    /models, /models/{model_name}           what is loaded
    POST   /models                                 {"model_name", "url"}: see sagemaker_models.py
    DELETE /models/{model_name}                    answers when the bytes are free
    GET    /execution-parameters                   what batch transform may send

Without an Accept header the multi-model forms answer with JSON, the bare array ``[x, ...]``, and the single-container
form with CSV. So do the XGBoost container behind Multi Model Server, whose clients read
``json.loads(response["Body"].read())[0]``, and alone. JSON of the latter is ``{"predictions": [{"score": x}, ...]}``. A
body without a Content-Type is CSV. An empty body is answered by 204 in all forms. sagemaker_errors.py lists what
failures become.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, request_response

from modelcache.errors import ModelCacheError
from modelcache.serving.bounds import MOST_ROWS
from modelcache.serving.errors import PayloadTooLargeError
from modelcache.serving.sagemaker_calls import TIMEOUT, Calls
from modelcache.serving.sagemaker_errors import container_error, container_refusal, runtime_error, runtime_refusal
from modelcache.serving.sagemaker_models import Models
from modelcache.serving.short_way import Call, ShortWayApp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from modelcache.registry import ModelRegistry

    Verify = Callable[[Request], Awaitable[None]]
    Endpoint = Call | Callable[[Request], Awaitable[Response]]


def sagemaker(
    registry: ModelRegistry,
    *,
    management: bool = True,
    max_body_bytes: int = 6_291_456,
    max_rows: int = MOST_ROWS,
    timeout: float | None = TIMEOUT,
    store_url: str = "",
    index_base: int = 0,
    verify: Verify | None = None,
) -> Starlette:
    """Return an app that answers for ``registry`` as SageMaker does; it neither starts nor closes the registry.

    ``management=False`` leaves out the routes that load and unload. ``max_body_bytes`` is SageMaker's limit, and holds
    for what a compressed body expands to; ``max_rows`` bounds the rows in it. A call may take ``timeout`` seconds, its
    model's load included, None for as long as that takes: after that the runtime's client gets ModelNotReadyException
    if the model is still loading (the load goes on), else ModelError. ``store_url`` is what the registry's store was
    opened with: urls that begin with it are understood by POST /models. ``index_base`` is the first index of libsvm, 0
    or 1, in bodies whose content type does not say it. ``verify`` is awaited with each request but GET /ping before
    anything else is done, to check its SigV4 signature or what you like; it refuses by
    ``starlette.exceptions.HTTPException``, and may read ``request.body()``.
    """
    calls = Calls(
        registry,
        Models(registry, store_url),
        max_body_bytes=max_body_bytes,
        max_rows=max_rows,
        timeout=timeout,
        index_base=index_base,
    )
    return app_of(calls, management=management, verify=verify)


def app_of(calls: Calls, *, management: bool, verify: Verify | None = None) -> Starlette:
    """Return an app of these endpoints; several apps of the same know the same names."""
    return ShortWayApp(
        routes=[
            *(
                Route(path, endpoint if verify is None else _Verified(endpoint, verify, calls), methods=[method])
                for method, path, endpoint in _routes(calls, management=management)
            ),
            Route("/ping", _ping),
        ],
        exception_handlers={
            ModelCacheError: _failed,
            HTTPException: _refused,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )


def _routes(calls: Calls, *, management: bool) -> list[tuple[str, str, Endpoint]]:
    """Return the routes that are verified; first the calls, whose way is short only if no other route comes before."""
    routes: list[tuple[str, str, Endpoint]] = [
        ("POST", "/endpoints/{EndpointName}/invocations", Call(calls.invoke_endpoint)),
        ("POST", "/invocations", Call(calls.invoke)),
        ("POST", "/models/{model_name:path}/invoke", Call(calls.invoke_model)),
        ("GET", "/models", calls.list_models),
        ("GET", "/models/{model_name:path}", calls.describe_model),
        ("GET", "/execution-parameters", calls.execution_parameters),
    ]
    if management:
        routes += [
            ("POST", "/models", calls.load_model),
            ("DELETE", "/models/{model_name:path}", calls.unload_model),
        ]
    return routes


async def _ping(request: Request) -> Response:  # noqa: ARG001 - as all endpoints are called
    return Response()


async def _failed(request: Request, error: Exception) -> Response:
    return (runtime_error if _is_runtime(request) else container_error)(error)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return (runtime_refusal if _is_runtime(request) else container_refusal)(error)


async def _gone(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as all handlers are called
    """End a request whose client went away before it was all there; nobody reads this."""
    return Response(status_code=400)


def _is_runtime(request: Request) -> bool:
    return "EndpointName" in request.path_params


class _Verified:
    """An endpoint for requests that ``verify`` lets pass; what that reads of the body is bounded, and read again."""

    def __init__(self, endpoint: Endpoint, verify: Verify, calls: Calls) -> None:
        self._app: ASGIApp = endpoint if isinstance(endpoint, Call) else request_response(endpoint)
        self._verify = verify
        self._max_body_bytes = calls.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, _bounded(receive, self._max_body_bytes))
        await self._verify(request)

        async def receive_again() -> Message:
            return {"type": "http.request", "body": await request.body(), "more_body": False}

        await self._app(scope, receive_again, send)


def _bounded(receive: Receive, limit: int) -> Receive:
    received = 0

    async def receive_bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise PayloadTooLargeError(f"The body has more than {limit:,} bytes, which is the limit here.")
        return message

    return receive_bounded
