"""What a client of either dialect of SageMaker is told when a request fails.

The runtime's client (boto3) picks the exception class by the header ``x-amzn-errortype``; the container's reads the
status, and a body as Multi Model Server writes it: ``{"code", "type", "message"}``.

========================== ========= ======================================================================
error                      container runtime
========================== ========= ======================================================================
InvalidModelNameError      400       ValidationError 400
InvalidInputError          400       ModelError 424
ModelNotFoundError         404       ValidationError 400: as SageMaker, when it cannot download the model
NotLoadedError             404       (no such route)
StoreAccessDeniedError     403       ValidationError 400: as SageMaker, whose S3 hides what is not there
StoreError                 502       ServiceUnavailable 503
ModelLoadError             422       ModelError 424
ModelTooLargeError         507       ModelError 424: it never fits, so that trying again is no use
BudgetTimeoutError         507       ServiceUnavailable 503: leases and pins end
LoadTimeoutError           504       ModelNotReadyException 429
PredictTimeoutError        504       ModelError 424
OverloadedError            503       ServiceUnavailable 503
WorkerCrashedError         500       ModelError 424: boto3 repeats a 500 by itself, and would crash eight more
RegistryClosedError        503       ServiceUnavailable 503
other ModelCacheError      its own   ModelError 424; AccessDeniedException if its own is 403
RequestError               400       ValidationError 400
PayloadTooLargeError       413       ValidationError 413
UnsupportedMediaTypeError  415       ModelError 424
NotAcceptableError         406       ModelError 424
AlreadyLoadedError         409       (no such route)
TooManyNamesError          507       (no such route)
anything else              500       InternalFailure 500; the server's log has the traceback
========================== ========= ======================================================================

A ModelError has the container's status as ``OriginalStatusCode`` and its message as ``OriginalMessage``. 429, 503 and
504 come with ``Retry-After`` where the error knows when to come back, 429 and 503 always.
"""

from __future__ import annotations

from http import HTTPStatus
from math import ceil
from typing import TYPE_CHECKING

import orjson
from starlette.responses import Response

from modelcache.errors import (
    BudgetTimeoutError,
    InvalidModelNameError,
    LoadTimeoutError,
    ModelCacheError,
    ModelNotFoundError,
    OverloadedError,
    RegistryClosedError,
    StoreAccessDeniedError,
    StoreError,
)
from modelcache.serving.errors import (
    NotAcceptableError,
    PayloadTooLargeError,
    RequestError,
    UnsupportedMediaTypeError,
)

if TYPE_CHECKING:
    from starlette.exceptions import HTTPException


class AlreadyLoadedError(RequestError):
    """A model of this name is loaded already."""

    http_status = 409


class NotLoadedError(RequestError):
    """No model of this name is loaded."""

    http_status = 404


class TooManyNamesError(ModelCacheError):
    """As many names as are kept have been given to models; unload some."""

    http_status = 507


_VALIDATION = ("ValidationError", HTTPStatus.BAD_REQUEST)
_MODEL = ("ModelError", HTTPStatus.FAILED_DEPENDENCY)
_UNAVAILABLE = ("ServiceUnavailable", HTTPStatus.SERVICE_UNAVAILABLE)
_INTERNAL = ("InternalFailure", HTTPStatus.INTERNAL_SERVER_ERROR)
_RUNTIME: dict[type, tuple[str, HTTPStatus]] = {
    BudgetTimeoutError: _UNAVAILABLE,
    InvalidModelNameError: _VALIDATION,
    LoadTimeoutError: ("ModelNotReadyException", HTTPStatus.TOO_MANY_REQUESTS),
    ModelCacheError: _MODEL,
    ModelNotFoundError: _VALIDATION,
    NotAcceptableError: _MODEL,
    OverloadedError: _UNAVAILABLE,
    PayloadTooLargeError: ("ValidationError", HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    RegistryClosedError: _UNAVAILABLE,
    RequestError: _VALIDATION,
    StoreAccessDeniedError: _VALIDATION,
    StoreError: _UNAVAILABLE,
    UnsupportedMediaTypeError: _MODEL,
}
_REFUSALS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "MissingAuthenticationTokenException",
    HTTPStatus.FORBIDDEN: "AccessDeniedException",
}
"""What AWS calls a request whose signature is missing, or wrong: these have no class of their own in boto3."""

_LONGEST = 2048
"""Characters of a message, as the runtime's service model says."""
_BRIEFLY = 1.0
"""Seconds after which to try again, when nobody knows better."""
_LATER = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_PERHAPS_LATER = (*_LATER, HTTPStatus.GATEWAY_TIMEOUT)


def runtime_error(error: Exception) -> Response:
    """Return what boto3 raises as an exception class of its own."""
    if not isinstance(error, ModelCacheError):
        return _runtime_response(*_INTERNAL, "The server failed: its log says why.")
    kind, status = next(_RUNTIME[base] for base in type(error).__mro__ if base in _RUNTIME)
    message = str(error)
    if kind == "ModelError" and error.http_status in _REFUSALS:
        kind, status = _REFUSALS[error.http_status], HTTPStatus(error.http_status)
    if kind != "ModelError":
        return _runtime_response(kind, status, message, _retry_after(status, error))
    side = "client" if error.http_status < HTTPStatus.INTERNAL_SERVER_ERROR else "server"
    facts: dict[str, str | int] = {
        "OriginalStatusCode": error.http_status,
        "OriginalMessage": message[:_LONGEST],
        "LogStreamArn": "",
    }
    told = f'Received {side} error ({error.http_status}) from {error.model or "the model"} with message "{message}"'
    return _runtime_response(kind, status, told, {}, facts)


def container_error(error: Exception) -> Response:
    """Return what the platform, or an operator, reads."""
    if not isinstance(error, ModelCacheError):
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        return _container_response(status, "InternalServerError", "The server failed: its log says why.")
    headers = _retry_after(error.http_status, error)
    return _container_response(error.http_status, type(error).__name__, str(error), headers)


def runtime_refusal(error: HTTPException) -> Response:
    """Return what boto3 is told by a route that does not exist, or by whoever verifies requests."""
    kind = _REFUSALS.get(error.status_code, "")
    return _runtime_response(kind, error.status_code, error.detail, dict(error.headers or {}))


def container_refusal(error: HTTPException) -> Response:
    """Return the same to a client of the container."""
    kind = HTTPStatus(error.status_code).phrase.replace(" ", "")
    return _container_response(error.status_code, kind, error.detail, dict(error.headers or {}))


def _runtime_response(
    kind: str,
    status: int,
    message: str,
    headers: dict[str, str] | None = None,
    facts: dict[str, str | int] | None = None,
) -> Response:
    body = orjson.dumps({"Message": message[:_LONGEST], **(facts or {})})
    named = {"x-amzn-errortype": kind} if kind else {}
    return Response(body, status, {**(headers or {}), **named}, "application/json")


def _container_response(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    body = orjson.dumps({"code": status, "type": kind, "message": message})
    return Response(body, status, headers, "application/json")


def _retry_after(status: int, error: ModelCacheError) -> dict[str, str]:
    """Return the header that says when to come back, in whole seconds, if that can help."""
    seconds = error.retry_after
    if seconds is None and status in _LATER:
        seconds = _BRIEFLY
    if seconds is None or status not in _PERHAPS_LATER:
        return {}
    return {"retry-after": str(max(1, ceil(seconds)))}
