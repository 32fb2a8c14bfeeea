"""What stands before the apps: who may come in, and what every answer carries.

Plain ASGI, and one pass over the headers: a request of which nothing is asked pays for a request id alone.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from modelcache.serving import access

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from modelcache.serving.access_log import AccessLog
    from modelcache.serving.tokens import Tokens

    Headers = Iterable[tuple[bytes, bytes]]
    Refusal = tuple[int, str, *tuple[tuple[bytes, bytes], ...]]

logger = logging.getLogger("modelcache.serving")

request_id: ContextVar[str] = ContextVar("modelcache_request_id", default="")
"""The id of the request that is being answered, for logs; "" outside of one."""

_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_LIVE = "/v2/health/live"
_READY = frozenset({"/ping", "/v2/health/ready"})
_OPEN = _READY | {_LIVE}
"""What load balancers and orchestrators ask, who have no token; it tells nothing but that the server is there."""
_COME_BACK = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


class Guard:
    """ASGI middleware: bearer tokens, request ids, Retry-After, and what is not ready while it drains.

    Without ``tokens`` everybody may use everything. The token comes as ``Authorization: Bearer``; clients of AWS, whose
    Authorization is a signature, send it as their session token. ``draining`` says whether the server is about to end.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Tokens | None = None,
        draining: Callable[[], bool] = lambda: False,
        access_log: AccessLog | None = None,
    ) -> None:
        self.tokens = tokens
        self._app = app
        self._draining = draining
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; only HTTP is let through."""
        if scope["type"] != "http":
            return
        began = time.monotonic()
        given, token = _read(scope["headers"])
        answer = _Answer(send, given or b"%032x" % random.getrandbits(128))
        request_id.set(answer.id.decode())
        refusal = self._admit(scope, token)
        try:
            if refusal is None:
                await self._app(scope, receive, answer.send)
            else:
                await answer_error(answer.send, *refusal)
        except ClientDisconnect:
            logger.debug("%s %s: the client has gone (request %s)", scope["method"], scope["path"], request_id.get())
        except Exception:
            logger.exception("%s %s failed (request %s)", scope["method"], scope["path"], request_id.get())
            if answer.complete:
                return
            if answer.status:
                raise  # the server has to break the connection off: what was announced will not come
            await answer_error(answer.send, 500, "The server failed; its log says why, under this request's id.")
        finally:
            if self._access_log is not None:
                self._access_log.log(scope, answer.status, time.monotonic() - began, request_id.get())

    def _admit(self, scope: Scope, token: bytes | None) -> Refusal | None:
        """Grant the request what it may use; or return the answer it gets instead."""
        path = scope["path"]
        if path in _READY and self._draining():
            return 503, "The server is about to end: it finishes what it has, and takes no more."
        if self.tokens is None or path in _OPEN:
            access.current.set(access.EVERYTHING if self.tokens is None else access.NOTHING)
            return None
        if not token:
            return 401, _MISSING, (b"www-authenticate", _CHALLENGE)
        grant = self.tokens.grant_of(token)
        if grant is None:
            return 401, _UNKNOWN, (b"www-authenticate", _CHALLENGE + b', error="invalid_token"')
        access.current.set(grant)
        return None


_CHALLENGE = b'Bearer realm="modelcache"'
_MISSING = "A token is needed: send it as 'Authorization: Bearer TOKEN', or as the session token of AWS credentials."
_UNKNOWN = "The token is not known here."


class _Answer:
    """What is sent to the client, with what every answer carries."""

    def __init__(self, send: Send, id: bytes) -> None:  # noqa: A002 - what it is called on the wire
        self.id = id
        self.status = 0
        self.complete = False
        self._send = send

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.id)]
            if status in _COME_BACK and not any(name.lower() == b"retry-after" for name, _ in headers):
                headers.append((b"retry-after", b"1"))
            message["headers"] = headers
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        return self._send(message)


async def answer_error(send: Send, status: int, reason: str, *headers: tuple[bytes, bytes]) -> None:
    """Answer with an error, in words that clients of both protocols read."""
    body = json.dumps({"error": reason, "message": reason}).encode()
    described = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": described})
    await send({"type": "http.response.body", "body": body})


def _read(headers: Headers) -> tuple[bytes | None, bytes | None]:
    """Return the request id, if it can be taken over, and the token."""
    given = token = session = None
    for name, value in headers:
        if name == b"x-request-id":
            given = value if _SANE_ID.fullmatch(value) else None
        elif name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            token = credentials.strip() if scheme.lower() == b"bearer" else token
        elif name == b"x-amz-security-token":
            session = value.strip()
    return given, token or session
