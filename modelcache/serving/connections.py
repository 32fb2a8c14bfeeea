"""One client's connection: uvicorn's, with limits on what a client may send and how slowly, and a good end.

uvicorn's parser takes headers of any number and size, and waits for ever for the rest of a request. When it is told to
end, it closes connections that wait for their next request without looking whether that has come already.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from http import HTTPStatus
from math import inf
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_PARTING = 2.0
"""Seconds in which a client that is refused in the middle of its request may read why, before the connection goes."""
_UNREAD_AT_THE_END = 10.0
"""Seconds for which a client may read nothing of its answer when the server ends."""
_VERSIONS = frozenset({"1.0", "1.1"})
_PIPELINED = 100
"""Requests that one client may have sent ahead, and be answered, when the server ends."""


@dataclass(frozen=True)
class Limits:
    """What one client may take."""

    headers: int = 100
    header_bytes: int = 32 << 10
    """All headers of a request, with its first line."""
    request_seconds: float = 30.0
    """From the first byte of a request to its last."""
    idle_seconds: float = 75.0
    """From one request to the next; more than the 60 s after which load balancers close their side."""


@dataclass
class Drain:
    """How far the end of the server has come."""

    begun: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last connection has gone, and when nobody wants to wait for that any longer."""


class ServerConfig(Config):
    """uvicorn's configuration, with what its connections need of ours."""

    def __init__(self, app: Any, limits: Limits, **options: Any) -> None:
        super().__init__(app, http=Connection, **options)
        self.limits = limits
        self.drain = Drain()


class _RefusedError(Exception):
    """Stops the parser at a request that is understood, and not taken."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Connection(HttpToolsProtocol):
    """One connection. ``check`` has to be called every now and then: deadlines cost a request no timer."""

    config: ServerConfig

    def __init__(self, config: ServerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self._limits = config.limits
        self._drain = config.drain
        self._since = self.loop.time()
        """When we began to wait for the client: for its next request, or for the rest of one."""
        self._partial = False
        """A request has begun, and is not all here."""
        self._heading = False
        """Its headers are not all here."""
        self._size = 0
        """Bytes received since it began, or since the last of its body: at least those of its headers or trailers."""
        self._upgrading = b""
        """The method of a request that asks for another protocol than HTTP/1.1, until it is read anew."""
        self._over = False
        """Nothing more is read."""
        self._unread = 0
        """Bytes of answers that wait for the client to read, when last looked at."""
        self._read_at = self._since
        """When there were none, or another number of them."""
        self._last: RequestResponseCycle | None = None
        """The request whose answer says that no more are taken."""

    # What the client sends

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the client has been refused or its headers, or trailers, have no end."""
        if self._over:
            return
        self._size += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._refuse_nonsense(error)
        else:
            if self._partial and self._size > self._limits.header_bytes:
                self._refuse(431, self._header_limits())

    def _parse(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser takes for another protocol what is the body if we go on with this one: so that is read
                # anew, as if we had not been asked. Clients ask by the way; Java's does so for HTTP/2, with its first
                # request.
                (offset,) = upgrade.args
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(self._without_upgrade())
                rest = rest[offset:]
            else:
                return

    def _without_upgrade(self) -> bytes:
        lines = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        return b"%s %s HTTP/1.1\r\n%s\r\n" % (self._upgrading, self.url, b"".join(lines))

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._since = self.loop.time()
        self._partial = self._heading = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. What comes behind a body is none: it was not there when the request was let in."""
        if self._heading:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers of a request are here; it is begun, unless there are too many of them."""
        self._heading = False
        if len(self.headers) > self._limits.headers or (
            self._size > self._limits.header_bytes and self._header_bytes() > self._limits.header_bytes
        ):
            raise _RefusedError(431, self._header_limits())
        if self.parser.get_http_version() not in _VERSIONS:
            raise _RefusedError(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
        self._size = 0
        self._upgrading = self.parser.get_method() if self.parser.should_upgrade() else b""
        if self._upgrading == b"CONNECT":
            raise _RefusedError(400, "This is no proxy.")
        if self._upgrading:
            return
        before = self.cycle
        super().on_headers_complete()
        if self._drain.begun and self.cycle is not before:
            self._make_last()

    def on_body(self, body: bytes) -> None:
        """A part of the body is here."""
        super().on_body(body)
        self._size = 0

    def on_message_complete(self) -> None:
        """A request is all here."""
        if self._upgrading:
            return
        super().on_message_complete()
        self._partial = False
        self._size = 0

    def on_response_complete(self) -> None:
        """An answer is on its way; the client may take its time for the next request."""
        super().on_response_complete()
        if not self._partial:
            self._since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended; perhaps it was the last."""
        super().connection_lost(exc)
        if self._drain.begun and not self.connections:
            self._drain.gone.set()

    # What is refused

    def check(self, now: float) -> None:
        """End the connection if the client takes too long."""
        waited = now - self._since
        if self._unread_for(now) > (_UNREAD_AT_THE_END if self._drain.begun else self._limits.idle_seconds):
            self.transport.abort()  # closed politely, it would wait for the client
        elif self._partial and not self._over:
            if self.flow.read_paused:
                self._since = now  # it is us who do not read
            elif waited > self._limits.request_seconds:
                seconds = self._limits.request_seconds
                self._refuse(408, f"The request was not all here within {seconds:g} s: send it faster, or in parts.")
        elif self._unread:
            self._since = max(now, self._since)  # it reads, however slowly
        elif self._over:
            if waited > _PARTING:
                self.transport.abort()
        elif self._idle and waited > self._limits.idle_seconds:
            self.transport.close()

    def _unread_for(self, now: float) -> float:
        """Return for how many seconds the client has read nothing of what waits for it."""
        unread = self.transport.get_write_buffer_size()
        if unread != self._unread or not unread:
            self._unread, self._read_at = unread, now
        return now - self._read_at

    def timeout_keep_alive_handler(self) -> None:
        """Leave it to ``check``, which sees whether the client is still reading."""

    def _refuse_nonsense(self, error: httptools.HttpParserError) -> None:
        if isinstance(error.__context__, _RefusedError):
            self._refuse(error.__context__.status, error.__context__.reason)
        else:
            self._refuse(400, "This is no request of HTTP/1.1.")

    def _header_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)

    def _header_limits(self) -> str:
        most, size = self._limits.headers, self._limits.header_bytes
        return f"A request may have {most} headers of {size:,} bytes in all, with its first line."

    def _refuse(self, status: int, reason: str) -> None:
        """Read no more, tell the client why, and let it go."""
        if self._over:
            return
        self._over = True
        self._unset_keepalive_if_required()
        cycle = self.cycle
        if not (self._idle or cycle.more_body):
            cycle.keep_alive = False  # what came before is answered yet, and that ends the connection
            self._since = inf
            return
        self._since = self.loop.time()
        if self._idle or not (cycle.response_started or self.pipeline):
            self.transport.write(_error(status, reason))
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        # Closed at once, with bytes unread, the connection would be reset, and the answer lost on its way.
        self.transport.write_eof()

    # How it ends

    @property
    def _idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def shutdown(self) -> None:
        """Let the answer to the last request that has come be the last; one may be on its way yet."""
        if not (self._idle or self.cycle.response_started):
            self._make_last()

    def leave(self) -> None:
        """Close a connection on which nothing has come for long enough."""
        if self._idle and not self._partial:
            self.transport.close()

    def _make_last(self) -> None:
        """Say with the newest request's answer, not with that of one sent ahead of it, that no more are taken.

        What was sent behind it may be waiting in the kernel, where nobody looks as long as one waits here.
        """
        if self._last is not None and not self._last.response_started:
            self._last.keep_alive = True
        if self.cycle.keep_alive:
            self.cycle.keep_alive = False
            self._last = self.cycle
        if len(self.pipeline) < _PIPELINED:
            self.flow.resume_reading()


def _error(status: int, reason: str) -> bytes:
    body = json.dumps({"error": reason, "message": reason}).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
