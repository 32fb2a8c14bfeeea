"""The endpoints of SageMaker's protocols: a request in, rows to the registry, an answer out."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import orjson
from starlette.responses import Response

from modelcache.errors import LoadTimeoutError, ModelCacheError
from modelcache.serving import codecs
from modelcache.serving.access_log import note_model
from modelcache.serving.bodies import read_body, read_command
from modelcache.serving.bounds import FEW_ROWS, check_answer, check_rows
from modelcache.serving.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from starlette.requests import Request

    from modelcache import ModelInfo
    from modelcache.registry import ModelRegistry
    from modelcache.serving.codecs import Encoder
    from modelcache.serving.sagemaker_models import Models

    Fields = dict[bytes, bytes]

_TARGET = b"x-amzn-sagemaker-target-model"
_VARIANT = b"x-amzn-sagemaker-target-variant"
_ECHOED = (b"x-amzn-sagemaker-custom-attributes", b"x-amzn-sagemaker-inference-id")
_ONLY_VARIANT = b"AllTraffic"
"""What SageMaker's SDK calls the one variant of an endpoint."""
_LARGE = 1 << 15
"""Bytes of a body, or of predictions, from which on a thread converts them: of CSV that takes a millisecond."""
_MIB = 1 << 20
TIMEOUT = 60.0
"""Seconds that a call may take, as SageMaker's runtime lets it, unless whoever runs the app says another."""


class _Form(NamedTuple):
    """How an answer is written."""

    default: str
    """The media type, if the client does not say."""
    bare_json: bool
    """JSON is an array, and nothing around it."""


_SINGLE = _Form("text/csv", bare_json=False)
_MULTI = _Form("application/json", bare_json=True)


class Calls:
    """The endpoints of one app."""

    def __init__(
        self,
        registry: ModelRegistry,
        models: Models,
        *,
        max_body_bytes: int,
        max_rows: int,
        timeout: float | None = TIMEOUT,
        index_base: int = 0,
    ) -> None:
        self._registry = registry
        self._models = models
        self._max_rows = max_rows
        self._index_base = index_base
        self.max_body_bytes = max_body_bytes
        self._timeout = timeout

    async def invoke_endpoint(self, request: Request) -> Response:
        """Answer boto3's ``invoke_endpoint``."""
        fields = _fields(request)
        response = await self._answer(request, fields, _target(fields), _MULTI)
        headers = response.raw_headers
        headers.append((b"x-amzn-invoked-production-variant", fields.get(_VARIANT, _ONLY_VARIANT)))
        _echo(fields, headers)
        return response

    async def invoke(self, request: Request) -> Response:
        """Answer as a container of one model; which one, a header says."""
        fields = _fields(request)
        response = await self._answer(request, fields, _target(fields), _SINGLE)
        _echo(fields, response.raw_headers)
        return response

    async def invoke_model(self, request: Request) -> Response:
        """Answer as a container of many models."""
        fields = _fields(request)
        name = self._models.artifact(request.path_params["model_name"])
        response = await self._answer(request, fields, name, _MULTI)
        _echo(fields, response.raw_headers)
        return response

    async def list_models(self, request: Request) -> Response:
        """Answer with one page of what is loaded."""
        return _json(self._models.page(request.query_params.get("next_page_token")))

    async def describe_model(self, request: Request) -> Response:
        """Say that a model is loaded, or not."""
        return _json(self._models.describe(request.path_params["model_name"]))

    async def load_model(self, request: Request) -> Response:
        """Load a model."""
        name, url = _read_load(await read_command(request, self.max_body_bytes))
        await self._models.load(name, url)
        return _json({"status": f"Model {name!r} is loaded."})

    async def unload_model(self, request: Request) -> Response:
        """Unload a model, and answer when its bytes are free."""
        name = request.path_params["model_name"]
        await self._models.unload(name)
        return _json({"status": f"Model {name!r} is unloaded."})

    async def execution_parameters(self, request: Request) -> Response:  # noqa: ARG002 - as all endpoints are called
        """Say what batch transform may send."""
        return _json(
            {
                "MaxConcurrentTransforms": max(1, len(self._registry.stats().workers)),
                "BatchStrategy": "MULTI_RECORD",
                "MaxPayloadInMB": self.max_body_bytes // _MIB,
            }
        )

    async def _answer(self, request: Request, fields: Fields, name: str, form: _Form) -> Response:
        note_model(request.scope, name)
        body = await read_body(request, self.max_body_bytes)
        if not body:
            return Response(status_code=204)
        decoder = codecs.decoder_for(fields.get(b"content-type", b"text/csv").decode("latin-1"), self._index_base)
        accept = fields.get(b"accept", b"").decode("latin-1")
        encoder = codecs.encoder_for(accept, form.default, bare_json=form.bare_json)
        began = monotonic()
        width = (await self._model(name, began)).n_features if decoder.needs_width else None
        if len(body) < _LARGE:
            rows = decoder.decode(body, width)
        else:
            rows = await asyncio.to_thread(decoder.decode, body, width)
        count = len(rows)
        check_rows(count, self._max_rows)
        if count > FEW_ROWS:
            check_answer(count, await self._model(name, began), ("value",))
        predictions = await self._registry.predict(name, rows, timeout=self._left(began))
        return await _written(predictions, encoder)

    async def _model(self, name: str, began: float) -> ModelInfo:
        """Return what a body alone does not tell: the columns of sparse rows, and the size of the answer."""
        info = self._registry.peek(name)
        if info is not None:
            return info
        try:
            async with asyncio.timeout(self._left(began)):
                return await self._registry.load(name)
        except TimeoutError as error:
            if isinstance(error, ModelCacheError):
                raise
            raise LoadTimeoutError(f"{name} is not loaded yet: try again in a while.", model=name) from error

    def _left(self, began: float) -> float | None:
        """Return how many seconds a call has that ``began`` then; it has one time for all that it waits for."""
        return None if self._timeout is None else max(0.0, began + self._timeout - monotonic())


async def _written(predictions: NDArray[np.float32], encoder: Encoder) -> Response:
    if predictions.nbytes < _LARGE:
        body = encoder.encode(predictions)
    else:
        body = await asyncio.to_thread(encoder.encode, predictions)
    response = Response(body)
    # Not by media_type: Starlette would add a charset to what begins with text/.
    response.raw_headers.append((b"content-type", encoder.media_type.encode("latin-1")))
    return response


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _fields(request: Request) -> Fields:
    """Return the header, by lower-case names; and of a field that comes twice the first, as Starlette does."""
    return dict(reversed(request.scope["headers"]))


def _target(fields: Fields) -> str:
    name = fields.get(_TARGET, b"")
    if not name:
        raise RequestError(
            "The request does not say which model to ask: send its name as header X-Amzn-SageMaker-Target-Model "
            "(in boto3: TargetModel='Houston_TX.tar.gz')."
        )
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")


def _echo(fields: Fields, headers: list[tuple[bytes, bytes]]) -> None:
    """Send back what the client wants to know its answer by."""
    headers.extend((field, fields[field]) for field in _ECHOED if field in fields)


def _read_load(body: bytes) -> tuple[str, str]:
    """Return name and url of the model to load."""
    try:
        match orjson.loads(body):
            case {"model_name": str(name), "url": str(url)}:
                return name, url
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is no JSON: {error}.") from error
    raise RequestError('The body has to be {"model_name": "...", "url": "..."}.')
