"""What can be wrong with a request before a model is asked. All are the client's mistakes: 4xx."""

from __future__ import annotations

from modelcache.errors import ModelCacheError


class RequestError(ModelCacheError):
    """The request cannot be understood."""

    http_status = 400


class UnsupportedMediaTypeError(RequestError):
    """The body is of a type, or compressed in a way, that is not read; the message lists what is."""

    http_status = 415


class NotAcceptableError(RequestError):
    """The client accepts none of the types that predictions are written in; the message lists those."""

    http_status = 406


class PayloadTooLargeError(RequestError):
    """The body, or what it expands to, is larger than the server takes."""

    http_status = 413
