"""What boto raises, said in the terms of the stores: which of our errors it is, and what to do about it."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from modelcache.errors import (
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelcache.errors import ModelCacheError
    from modelcache.stores.s3 import S3Options

TRANSIENT = (
    BotoConnectionError, HTTPClientError, IncompleteReadError, aiohttp.ClientError, TimeoutError, ConnectionError
)  # fmt: skip
"""What a connection raises that breaks, stalls or ends early."""

RAISED = (ClientError, BotoCoreError, ValueError, *TRANSIENT)
"""What a call of boto raises; ValueError for an endpoint that is no URL."""

_NO_KEYS = (
    NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound, SSOError,
    TokenRetrievalError,
)  # fmt: skip

_STALE = "The credentials have expired: renew them (aws sso login, a new session token)."
_WRONG = "The credentials are not known there: check the keys, the profile, and that endpoint_url is theirs."
_REGION = "The bucket is in another region: name it by region=..."
_REMEDIES = {
    "AccessDenied": (
        "Allow s3:GetObject on its objects, s3:ListBucket on the bucket (without which S3 answers so for objects that "
        "do not exist, too) and kms:Decrypt if they are encrypted with a key of yours."
    ),
    "ExpiredToken": _STALE,
    "ExpiredTokenException": _STALE,
    "TokenRefreshRequired": _STALE,
    "RequestExpired": _STALE,
    "InvalidToken": _WRONG,
    "InvalidAccessKeyId": _WRONG,
    "SignatureDoesNotMatch": _WRONG,
    "RequestTimeTooSkewed": "Set the clock of this machine.",
    "NoSuchBucket": "Check its name, endpoint_url, and whose account the credentials are for.",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "": "",
    "InvalidObjectState": "The object is archived: restore it, or keep models in a class that is read at once.",
}
_CERTIFICATE = (
    "Name the file of its certificate authority by AWS_CA_BUNDLE, and check whether endpoint_url begins with the right "
    "one of https:// and http://."
)
_READABLE_LATER = frozenset({"InvalidObjectState"})
_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS,)
_THROTTLED = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout"})
_NOT_THERE = frozenset({"NoSuchKey", "NoSuchVersion", "KeyTooLongError"})


def code_of(error: Exception) -> str:
    """Return the error code of S3, or "" if it has not answered."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks to wait, None if it does not say, or gives a date."""
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None


def explained(error: Exception, options: S3Options, name: str | None) -> ModelCacheError:
    """Return what to raise instead of ``error``, which was met in the bucket of ``options``."""
    if isinstance(error, ClientError):
        return _answered(error, options, name)
    bucket, where = f"s3://{options.bucket}", options.endpoint_url or "S3"
    if isinstance(error, _NO_KEYS):
        return StoreAccessDeniedError(
            f"There are no credentials for {bucket}: {error} Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY; give profile=..., or anonymous=True for a public bucket.",
            model=name,
        )
    if isinstance(error, TRANSIENT):
        remedy = _CERTIFICATE if isinstance(error, SSLError) else "Check endpoint_url, region and the network."
        what = str(error).rstrip(".") or type(error).__name__
        return StoreUnavailableError(f"The connection to {where} failed: {what}. {remedy}", model=name)
    remedy = "Check the name of the bucket." if isinstance(error, ParamValidationError) else ""
    return StoreError(f"The client of {bucket} failed: {error} {remedy}".rstrip(), model=name)


def _answered(error: ClientError, options: S3Options, name: str | None) -> ModelCacheError:
    code, answer = code_of(error), error.response["ResponseMetadata"]
    status, headers = answer.get("HTTPStatusCode", 0), answer.get("HTTPHeaders", {})
    message = error.response["Error"].get("Message", "").rstrip(".")
    remedy = _REMEDIES.get(code) or _REMEDIES["AccessDenied" if status == HTTPStatus.FORBIDDEN else ""]
    said = f"s3://{options.bucket} answered {status} {code}, {message!r}. {remedy}".rstrip()
    if code in _NOT_THERE or (status == HTTPStatus.NOT_FOUND and code != "NoSuchBucket"):
        return ModelNotFoundError(f"There is no model {name!r}: {said}", model=name)
    if code in _THROTTLED or status in _BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return StoreUnavailableError(said, model=name, retry_after=retry_after(headers))
    if (status in _REFUSED or remedy in (_STALE, _WRONG)) and code not in _READABLE_LATER:
        return StoreAccessDeniedError(said, model=name)
    return StoreError(said, model=name)
