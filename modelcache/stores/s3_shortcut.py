"""The short way to an object: a request like one that boto's client has made, with another key, and signed anew.

What boto's client does for a request before it is sent and after it is answered takes three times the CPU time of the
request itself; for one object of a bucket and the next, all of it comes out alike but for the key, the time and the
signature. So the client makes the first request, and what it sent is the pattern for those that follow, if it is
understood completely: no header is unknown, and the signature that this module computes for it is the client's own.
Otherwise (S3 Express, access points, signatures of other kinds) the client goes on to make all of them.

The connections are the client's, and so are the credentials, which are renewed as ever. Whatever does not go well is
handed to the client as the outcome of its own first attempt, so that redirects, retries and errors are its business.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from aiobotocore.response import StreamingBody
from botocore.awsrequest import AWSPreparedRequest
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from collections.abc import Mapping

_MESSAGE = re.compile(rb"<Message>([^<&]*)</Message>")
_EVENT = "s3.GetObject"
_KEPT = frozenset({"user-agent", "x-amz-checksum-mode", "x-amz-content-sha256"})
"""Headers that all requests have alike."""
_RENEWED = frozenset({"authorization", "if-none-match", "x-amz-date", "x-amz-security-token"})
_LEFT_OUT = frozenset({"amz-sdk-invocation-id", "amz-sdk-request"})
"""They say which attempt of a call it is. Here all are the first one, and the others are made by the client."""
_SIGNED = re.compile("AWS4-HMAC-SHA256 Credential=[^/]+/[0-9]{8}/([^/]+/s3/aws4_request), ")


@dataclass(slots=True)
class _Call:
    """A call of boto's client."""

    first: Any = None
    """The answer, or the exception, that its first attempt is to have."""
    sent: Any = None
    """The request of its last attempt."""


_STREAM = True  # the body is read by whoever asked

_call: ContextVar[_Call | None] = ContextVar("_call", default=None)


class Shortcut:
    """Asks for the objects of ``bucket``; ``credentials`` are those of ``client``, None if it signs nothing."""

    def __init__(self, client: Any, bucket: str, credentials: Any) -> None:
        self._client = client
        self._bucket = bucket
        self._credentials = credentials
        self._pattern: _Pattern | None = None
        self._connections: Any = None
        client.meta.events.register(f"before-send.{_EVENT}", _before_send)
        client.meta.events.register(f"needs-retry.{_EVENT}", self._find_connections)

    async def get_object(self, key: str, unless: str | None) -> tuple[Mapping[str, str], Any] | None:
        """Return the headers, to be looked up in lower case, and the body; None if the ETag is ``unless`` (in quotes).

        Raises what boto's client raises.
        """
        outcome = await self._try(key, unless) if self._pattern is not None else None
        if isinstance(outcome, BotoCoreError) or outcome is None:
            return await self._have_it_done(key, unless, outcome)
        if outcome.status_code == HTTPStatus.NOT_MODIFIED and unless is not None:
            await outcome.content  # there is none, which makes the connection free for others
            return None
        if outcome.status_code == HTTPStatus.NOT_FOUND:
            _raise_if_no_such_key(outcome, await outcome.content)
        if outcome.status_code != HTTPStatus.OK:
            return await self._have_it_done(key, unless, outcome)
        # Retries are paid from an account, into which each call that went well pays.
        await self._client.meta.events.emit(
            f"after-call.{_EVENT}", http_response=outcome, parsed={}, model=None, context={}
        )
        headers = outcome.raw.headers  # those of boto take ten times as long to look one up
        return headers, StreamingBody(outcome.raw, headers.get("content-length"))

    async def _try(self, key: str, unless: str | None) -> Any:
        """Return the answer to the request, or what went wrong with the connection."""
        assert self._pattern is not None
        credentials = await self._credentials.get_frozen_credentials() if self._credentials else None
        request = self._pattern.request(key, unless, credentials)
        try:
            return await self._connections.send(request)
        except BotoCoreError as error:
            return error

    async def _have_it_done(self, key: str, unless: str | None, first: Any) -> tuple[Mapping[str, str], Any] | None:
        """Have boto's client make the call, whose first attempt had the outcome ``first`` unless that is None."""
        credentials = await self._credentials.get_frozen_credentials() if self._credentials else None
        call = _Call(first)
        token = _call.set(call)
        condition = {} if unless is None else {"IfNoneMatch": unless}
        response = None
        try:
            response = await self._client.get_object(Bucket=self._bucket, Key=key, **condition)
        except ClientError as error:
            if unless is None or error.response["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.NOT_MODIFIED:
                raise
        finally:
            _call.reset(token)
        if call.sent is not None:
            self._pattern = pattern_of(call.sent, key, credentials)
        return (response["ResponseMetadata"]["HTTPHeaders"], response["Body"]) if response is not None else None

    def _find_connections(self, *, endpoint: Any, **_: Any) -> None:
        self._connections = endpoint.http_session


def _raise_if_no_such_key(answer: Any, said: bytes) -> None:
    """Raise what boto's client would: a name without a suffix is looked for in vain at one key or two, each time."""
    if b"<Code>NoSuchKey</Code>" in said:
        message = _MESSAGE.search(said)
        response: Any = {
            "Error": {"Code": "NoSuchKey", "Message": message[1].decode(errors="replace") if message else ""},
            "ResponseMetadata": {"HTTPStatusCode": answer.status_code, "HTTPHeaders": answer.headers},
        }
        raise ClientError(response, "GetObject")


def _before_send(*, request: Any, **_: Any) -> Any:
    """Return the answer that there is already, or let the client send the request."""
    call = _call.get()
    if call is None:
        return None
    first, call.first = call.first, None
    if isinstance(first, BotoCoreError):
        raise first
    if first is None:
        call.sent = request
    return first


@dataclass(slots=True)
class _Pattern:
    """What the requests to a bucket have in common."""

    base: str
    """The URL, without the key."""
    path: str
    host: str
    headers: dict[str, str]
    """Those of _KEPT."""
    scope: str | None
    """What signatures are good for, after the day; None if nothing is signed."""
    signing_key: tuple[str, str, bytes] = "", "", b""
    """The secret and the scope it was derived from, and the key of the signatures: good for a day."""

    def request(self, key: str, unless: str | None, credentials: Any) -> Any:
        """Return the request for the object ``key``."""
        path, now = _quoted(key), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        headers = self.headers if unless is None else self.headers | {"if-none-match": unless}
        signed: Any = self.signed(path, headers, now, credentials)  # a dict, since boto's own kind is slow
        return AWSPreparedRequest("GET", self.base + path, signed, None, _STREAM)

    def signed(self, path: str, headers: dict[str, str], now: str, credentials: Any) -> dict[str, str]:
        """Return the ``headers`` and the signature, Version 4, of a request made ``now``, as in 20260131T235959Z."""
        if self.scope is None:
            return headers
        headers = headers | {"x-amz-date": now}
        if credentials.token:
            headers["x-amz-security-token"] = credentials.token
        covered = headers | {"host": self.host}
        covered.pop("user-agent", None)  # what is on the way may change it
        names = sorted(covered)
        lines = "\n".join([f"{name}:{covered[name]}" for name in names])
        listed = ";".join(names)
        request = f"GET\n{self.path}{path}\n\n{lines}\n\n{listed}\n{covered['x-amz-content-sha256']}"
        scope = f"{now[:8]}/{self.scope}"
        digest = hashlib.sha256(request.encode()).hexdigest()
        key = self._key(credentials.secret_key, scope)
        signature = hmac.digest(key, f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}".encode(), "sha256").hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={listed}, "
            f"Signature={signature}"
        )
        return headers

    def _key(self, secret: str, scope: str) -> bytes:
        if self.signing_key[:2] != (secret, scope):
            key = f"AWS4{secret}".encode()
            for part in scope.split("/"):
                key = hmac.digest(key, part.encode(), "sha256")
            self.signing_key = secret, scope, key
        return self.signing_key[2]


def pattern_of(request: Any, key: str, credentials: Any) -> _Pattern | None:
    """Return the pattern of the ``request`` for ``key``; None if what would be made by it is not just that request."""
    sent = {
        name.lower(): value.decode() if isinstance(value, bytes) else value for name, value in request.headers.items()
    }
    path = _quoted(key)
    signed = _SIGNED.match(sent.get("authorization", ""))
    if sent.keys() - _KEPT - _RENEWED - _LEFT_OUT or not request.url.endswith(f"/{path}") or "?" in request.url:
        return None
    base = request.url.removesuffix(path)
    where = urlsplit(base)
    kept = {name: value for name, value in sent.items() if name in _KEPT}
    pattern = _Pattern(base, where.path, where.netloc, kept, signed.group(1) if signed else None)
    wanted = kept | {name: sent[name] for name in ("if-none-match",) if name in sent}
    made = pattern.signed(path, wanted, sent.get("x-amz-date", ""), credentials)
    return pattern if made == {name: value for name, value in sent.items() if name not in _LEFT_OUT} else None


def _quoted(key: str) -> str:
    return quote(key, safe="/~")
