"""``open_inference(registry)``: the Open Inference Protocol (KServe V2), for clients of Triton, MLServer and KServe.

A name may have slashes in it, and versions may: a path is read from its end, where the verb is, and a slash that is
quoted, as ``%2F``, separates nothing: ``/v2/models/a%2Fversions%2Fb`` is the model ``a/versions/b``::

    /v2/models/{name}[/versions/{version}]                      GET   metadata
    /v2/models/{name}[/versions/{version}]/infer                POST
    /v2/models/{name}[/versions/{version}]/ready|config|stats   GET
    /v2/models/stats                                            GET   of all resident models

Metadata and configuration load a model, as nothing else tells what it takes; readiness and statistics never do.
"""

from __future__ import annotations

import asyncio
import logging
from math import ceil
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from modelcache import (
    LoadTimeoutError,
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    __version__,
)
from modelcache.inputs import column_order
from modelcache.names import split_suffix
from modelcache.serving import open_inference_metadata as about
from modelcache.serving.access_log import note_model
from modelcache.serving.bodies import read_body, read_command
from modelcache.serving.bounds import FEW_ROWS, MOST_ROWS, check_answer, check_rows
from modelcache.serving.errors import RequestError
from modelcache.serving.offering import lists
from modelcache.serving.open_inference_messages import OUTPUTS, decode_request, encode_response, parse_object
from modelcache.serving.open_inference_responses import ERROR_HANDLERS, HEADER_LENGTH, infer_response, json_response
from modelcache.serving.short_way import Answer, Call, ShortWayApp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import numpy as np
    from numpy.typing import NDArray
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.types import Receive, Scope

    from modelcache import ModelInfo, ModelRegistry
    from modelcache.serving.open_inference_messages import InferRequest, WantedOutput

    Predicted = tuple[ModelInfo, list[NDArray[np.float32]]]
    Handler = Callable[[Request, str, str | None], Awaitable[Response]]

logger = logging.getLogger("modelcache.serving")

_EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics", "parameters")
_LARGE = 1 << 16
"""Bytes of a body, or of predictions, from which on a thread converts them: of JSON that takes a millisecond."""
_VERBS = ("infer", "ready", "config", "stats")


def open_inference(
    registry: ModelRegistry, *, management: bool = True, max_body_bytes: int = 64 << 20, max_rows: int = MOST_ROWS
) -> Starlette:
    """Return an app that serves ``registry`` under ``/v2``; it neither starts nor closes it.

    ``management`` is for the routes that load and unload. ``max_body_bytes`` bounds a body, before and after it is
    decompressed, and ``max_rows`` the rows in it.
    """
    app = _App(registry, management=management, max_body_bytes=max_body_bytes, max_rows=max_rows)
    routes = [
        Route("/v2/models/{target:path}", Call(app.model), methods=["GET", "POST"]),  # first: routes are tried in order
        Route("/v2", app.server),
        Route("/v2/health/live", app.live),
        Route("/v2/health/ready", app.ready),
        Route("/v2/repository/index", app.index, methods=["POST"]),
    ]
    if management:
        routes += [
            Route("/v2/repository/models/{name:path}/load", app.load, methods=["POST"]),
            Route("/v2/repository/models/{name:path}/unload", app.unload, methods=["POST"]),
        ]
    return ShortWayApp(routes=routes, exception_handlers=ERROR_HANDLERS)


class _App:
    def __init__(self, registry: ModelRegistry, *, management: bool, max_body_bytes: int, max_rows: int) -> None:
        self._registry = registry
        self._management = management
        self._limit = max_body_bytes
        self._max_rows = max_rows
        self._verbs: dict[str, tuple[str, Handler]] = {
            "infer": ("POST", self._infer),
            "ready": ("GET", self._ready),
            "config": ("GET", self._config),
            "stats": ("GET", self._stats),
            "": ("GET", self._metadata),
        }

    # The server

    async def server(self, _: Request) -> Response:
        """Say who serves, and which parts of the protocol."""
        extensions = [*_EXTENSIONS, *(["model_repository"] if self._management else [])]
        return json_response({"name": "modelcache", "version": __version__, "extensions": extensions})

    async def live(self, _: Request) -> Response:
        """Answer as long as the event loop does."""
        return json_response({"live": True})

    async def ready(self, _: Request) -> Response:
        """Say whether calls are served: the workers are up (they are started if nobody has), and not being closed."""
        await self._registry.start()
        return json_response({"ready": True})

    # One model

    async def model(self, scope: Scope, receive: Receive) -> Answer:
        """Do what the end of the path says."""
        request = Request(scope, receive)
        name, version, verb = split_target(_quoted_target(request))
        note_model(scope, name)
        method, handler = self._verbs[verb]
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            raise HTTPException(405, f"{request.url.path} takes {method}.", headers={"Allow": method})
        response = await handler(request, name, version)
        return Answer(response.status_code, response.raw_headers, bytes(response.body))

    async def _infer(self, request: Request, name: str, version: str | None) -> Response:
        call = await self._read_call(request)
        if version is None and call.columns is None and len(call.outputs) == 1 and call.row_count <= FEW_ROWS:
            output = OUTPUTS[call.outputs[0].name]
            done = await self._registry.invoke(name, call.rows, output=output, timeout=call.timeout)
            info, answers = done.model, [done.predictions]
        else:
            info, answers = await self._infer_in_time(call, name, version)
        head = {"model_name": name, "model_version": about.version_of(info)}
        if call.id is not None:
            head["id"] = call.id
        text, length = await _encoded(head, list(zip(call.outputs, answers, strict=True)))
        return await infer_response(text, length, request.headers.get("accept-encoding"))

    async def _read_call(self, request: Request) -> InferRequest:
        body = await read_body(request, self._limit)
        length = request.headers.get(HEADER_LENGTH)
        if len(body) > _LARGE:
            call = await asyncio.to_thread(decode_request, body, length)
        else:
            call = decode_request(body, length)
        check_rows(call.row_count, self._max_rows)
        return call

    async def _infer_in_time(self, call: InferRequest, name: str, version: str | None) -> Predicted:
        try:
            async with asyncio.timeout(call.timeout) as limit:
                return await self._infer_with(call, name, version)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise LoadTimeoutError(
                f"The {call.timeout:g} s that the request's parameter 'timeout' gives {name} have passed.", model=name
            ) from error

    async def _infer_with(self, call: InferRequest, name: str, version: str | None) -> Predicted:
        """Answer by one version of the model, whatever is loaded meanwhile."""
        async with self._registry.acquire(name) as lease:
            info = _check_version(lease.model, name, version)
            check_answer(call.row_count, info, [OUTPUTS[wanted.name] for wanted in call.outputs])
            rows = call.rows if call.columns is None else _in_order(call.rows, call.columns, info)
            return info, [await lease.predict(rows, output=OUTPUTS[wanted.name]) for wanted in call.outputs]

    async def _metadata(self, _: Request, name: str, version: str | None) -> Response:
        info = _check_version(await self._registry.load(name), name, version)
        return json_response(about.metadata(name, info))

    async def _config(self, _: Request, name: str, version: str | None) -> Response:
        info = _check_version(await self._registry.load(name), name, version)
        return json_response(about.config(name, info))

    async def _stats(self, _: Request, name: str, version: str | None) -> Response:
        """Return the statistics of a resident model, none of a cold one; those of all for the name ""."""
        if not name:
            return json_response({"model_stats": [about.statistics(info) for info in self._registry.loaded()]})
        info = self._registry.peek(name)
        found = [] if info is None else [about.statistics(_check_version(info, name, version))]
        return json_response({"model_stats": found})

    async def _ready(self, _: Request, name: str, version: str | None) -> Response:
        """Say whether a call would be answered: a cold model is ready, since its first call loads it.

        Programs ask this before they call: were only resident models ready, nobody would ever call a cold one. So the
        store is asked for its name, and nothing is loaded or evicted.
        """
        failure = self._registry.failure(name)
        info = self._registry.peek(name)
        if info is not None:
            _check_version(info, name, version)
        else:
            await self._check_offered(name)
        if failure is not None and not isinstance(failure, ModelNotFoundError):
            raise HTTPException(503, str(failure), headers={"Retry-After": str(ceil(failure.retry_after or 1))})
        return json_response({"name": name, "ready": True})

    async def _check_offered(self, name: str) -> None:
        """Raise ModelNotFoundError if the store lists its models, and not ``name``; else a call will tell."""
        if await lists(self._registry, name) is False:
            raise ModelNotFoundError(f"The store lists no model {name!r}.", model=name)

    # The repository

    async def index(self, request: Request) -> Response:
        """List what is resident and, unless ``ready`` is true, what else the store offers, if it can list that."""
        ready = parse_object(await read_command(request, self._limit)).get("ready", False)
        if type(ready) is not bool:
            raise RequestError("'ready' has to be true or false.")
        resident = self._registry.loaded()
        items = [about.resident_item(info) for info in resident]
        if not ready:
            known = {split_suffix(info.name)[0] for info in resident}
            items += [item async for item in self._cold_items(known)]
        return json_response(items)

    async def _cold_items(self, known: set[str]) -> AsyncIterator[dict[str, str]]:
        try:
            async for name in self._registry.names():
                if name not in known:
                    yield about.cold_item(name, self._registry.failure(name))
                    await asyncio.sleep(0)  # there may be a million, and others are to be served
        except (StoreUnavailableError, StoreAccessDeniedError):
            raise
        except StoreError as error:
            logger.debug("the index has only resident models: %s", error)

    async def load(self, request: Request) -> Response:
        """Make a model resident; of a resident one, ask the store for another version, and swap."""
        parameters = parse_object(await read_command(request, self._limit)).get("parameters")
        if parameters:
            raise RequestError("A model is loaded as the store has it: 'parameters' are not taken. Leave them out.")
        await self._registry.refresh(request.path_params["name"])
        return json_response({})

    async def unload(self, request: Request) -> Response:
        """Free a model; answers when its bytes are free, and that is well if there were none."""
        parse_object(await read_command(request, self._limit))
        await self._registry.unload(request.path_params["name"])
        return json_response({})


async def _encoded(
    head: dict[str, str], outputs: list[tuple[WantedOutput, NDArray[np.float32]]]
) -> tuple[bytes, int | None]:
    if sum(values.nbytes for _, values in outputs) > _LARGE:
        return await asyncio.to_thread(encode_response, head, outputs)
    return encode_response(head, outputs)


def _quoted_target(request: Request) -> str:
    """Return what follows ``/v2/models/`` as it was sent; quoted again if that is not known."""
    _, found, target = request.scope.get("raw_path", b"").decode("latin-1").partition("/v2/models/")
    return target if found else quote(request.path_params["target"])


def split_target(target: str) -> tuple[str, str | None, str]:
    """Split what follows ``/v2/models/``, quoted, into the model's name, the version and the verb, "" for metadata.

    No name is all models: their statistics can be asked for together.
    """
    if target == "stats":
        return "", None, target
    head, _, verb = target.rpartition("/")
    if not head or verb not in _VERBS:
        head, verb = target, ""
    name, _, version = head.rpartition("/versions/")
    return (unquote(name), unquote(version), verb) if name else (unquote(head), None, verb)


def _check_version(info: ModelInfo, name: str, version: str | None) -> ModelInfo:
    """Return ``info``; ModelNotFoundError if it is not the version that was asked for."""
    if version is None or about.is_version(info, version):
        return info
    raise ModelNotFoundError(
        f"{name} is served as version {about.version_of(info)}, not {version}: the one that the store has, and no "
        "other. Leave the version out, or ask for the one that the metadata lists.",
        model=name,
    )


def _in_order(rows: NDArray[np.float32], columns: tuple[str, ...], info: ModelInfo) -> NDArray[np.float32]:
    order = column_order(
        len(columns), columns, model=info.name, n_features=info.n_features, feature_names=info.feature_names
    )
    return rows if order is None else rows[:, order]
