"""Responses of the Open Inference Protocol: JSON, or JSON with bytes behind it, and errors as ``{"error": "..."}``."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from http import HTTPStatus
from math import ceil
from typing import TYPE_CHECKING, Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from modelcache import ModelCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.requests import Request

HEADER_LENGTH = "inference-header-content-length"
_WORTH_COMPRESSING = 1 << 14
"""Bytes: clients accept gzip by default, and fewer are sent faster than they are compressed."""
_COMPRESS: Mapping[str, Callable[[bytes, int], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
_FASTEST = 1
_BYTES = "application/octet-stream"


def json_response(content: Any) -> Response:
    """Return ``content`` as JSON."""
    return Response(orjson.dumps(content), media_type="application/json")


async def infer_response(body: bytes, length: int | None, accept: str | None) -> Response:
    """Return predictions, of which the first ``length`` bytes are JSON, compressed if the client accepts that."""
    headers = {} if length is None else {HEADER_LENGTH: str(length)}
    coding = _coding(accept) if len(body) >= _WORTH_COMPRESSING else None
    if coding is not None:
        headers["content-encoding"] = coding
        body = await asyncio.to_thread(_COMPRESS[coding], body, _FASTEST)
    return Response(body, headers=headers, media_type="application/json" if length is None else _BYTES)


def _coding(accept: str | None) -> str | None:
    """Return the coding to compress a response with, None if the header Accept-Encoding names none that is known."""
    offers = [offer.replace(" ", "").partition(";q=") for offer in (accept or "").lower().split(",")]
    accepted = {coding for coding, _, quality in offers if not quality or quality.strip("0.")}
    return next((coding for coding in _COMPRESS if coding in accepted), None)


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps({"error": message})  # not by orjson: a name in the message may be no Unicode
    return Response(text, status, headers, "application/json")


async def _model_cache_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ModelCacheError)
    status, headers = error.http_status, {}
    if error.retry_after is not None or status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(max(1, ceil(error.retry_after or 0)))
    return _error(status, str(error), headers)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"There is nothing at {request.url.path}, or it is switched off here."
    return _error(error.status_code, message, error.headers)


async def _gone(*_: object) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it


async def _fault(*_: object) -> Response:
    return _error(500, "The server is at fault: its log tells how.")


ERROR_HANDLERS: Mapping[Any, Any] = {
    ModelCacheError: _model_cache_error,
    HTTPException: _http_exception,
    ClientDisconnect: _gone,
    Exception: _fault,
}
