"""The endpoints of SageMaker's protocols: a request in, rows to the registry, an answer out."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import orjson
from starlette.responses import Response

from modelcache.errors import LoadTimeoutError, ModelCacheError
from modelcache.serving import codecs
from modelcache.serving.access_log import note_model
from modelcache.serving.bodies import fields_of, read_command, receive_body
from modelcache.serving.bounds import FEW_ROWS, check_answer, check_rows
from modelcache.serving.errors import RequestError
from modelcache.serving.short_way import Answer

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope

    from modelcache import ModelInfo
    from modelcache.registry import ModelRegistry
    from modelcache.serving.bodies import Fields
    from modelcache.serving.codecs import Decoder, Encoder
    from modelcache.serving.sagemaker_models import Models

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

    async def invoke_endpoint(self, scope: Scope, receive: Receive) -> Answer:
        """Answer boto3's ``invoke_endpoint``."""
        fields = fields_of(scope)
        answer = await self._answer(scope, receive, fields, _target(fields), _MULTI)
        answer.headers.append((b"x-amzn-invoked-production-variant", fields.get(_VARIANT, _ONLY_VARIANT)))
        _echo(fields, answer.headers)
        return answer

    async def invoke(self, scope: Scope, receive: Receive) -> Answer:
        """Answer as a container of one model; which one, a header says."""
        fields = fields_of(scope)
        answer = await self._answer(scope, receive, fields, _target(fields), _SINGLE)
        _echo(fields, answer.headers)
        return answer

    async def invoke_model(self, scope: Scope, receive: Receive) -> Answer:
        """Answer as a container of many models."""
        fields = fields_of(scope)
        name = self._models.artifact(scope["path_params"]["model_name"])
        answer = await self._answer(scope, receive, fields, name, _MULTI)
        _echo(fields, answer.headers)
        return answer

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

    async def _answer(self, scope: Scope, receive: Receive, fields: Fields, name: str, form: _Form) -> Answer:
        note_model(scope, name)
        body = await receive_body(receive, fields, self.max_body_bytes)
        if not body:
            return Answer(204, [], b"")
        content_type, accept = fields.get(b"content-type", b"text/csv"), fields.get(b"accept", b"")
        decoder, encoder, described = _codecs(content_type, self._index_base, accept, form)
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
        if predictions.nbytes < _LARGE:
            written = encoder.encode(predictions)
        else:
            written = await asyncio.to_thread(encoder.encode, predictions)
        return Answer(200, [(b"content-length", b"%d" % len(written)), described], written)

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


@lru_cache(256)
def _codecs(
    content_type: bytes, index_base: int, accept: bytes, form: _Form
) -> tuple[Decoder, Encoder, tuple[bytes, bytes]]:
    """Return what reads the body, what writes the answer, and the field that says so: its own media type.

    Kept by what clients send, byte for byte: of the same few headers nothing is decoded or parsed again.
    """
    decoder = codecs.decoder_for(content_type.decode("latin-1"), index_base)
    encoder = codecs.encoder_for(accept.decode("latin-1"), form.default, bare_json=form.bare_json)
    return decoder, encoder, (b"content-type", encoder.media_type.encode("latin-1"))


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


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
    headers += [(field, fields[field]) for field in _ECHOED if field in fields]


def _read_load(body: bytes) -> tuple[str, str]:
    """Return name and url of the model to load."""
    try:
        match orjson.loads(body):
            case {"model_name": str(name), "url": str(url)}:
                return name, url
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is no JSON: {error}.") from error
    raise RequestError('The body has to be {"model_name": "...", "url": "..."}.')
