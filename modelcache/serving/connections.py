"""One client's connection: uvicorn's, with limits on what a client may send and how slowly, and a good end.

uvicorn's parser takes headers of any number and size, and waits for ever for the rest of a request, or for a client to
read. It goes on with a request whose client has gone. When it is told to end, it closes connections that wait for their
next request without looking whether that has come already.
"""

from __future__ import annotations

import asyncio
import socket
from math import inf
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from modelcache.serving.heads import HeadHolder
from modelcache.serving.refusals import RefusedError

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from modelcache.serving.config import ServerConfig

_PARTING = 2.0
"""Seconds in which a client that is refused in the middle of its request may read why, before the connection goes."""
_UNREAD_AT_THE_END = 10.0
"""Seconds for which a client may read nothing of its answer when the server ends."""
_VERSIONS = frozenset({"1.0", "1.1"})
_PIPELINED = 100
"""Requests that one client may have sent ahead, and be answered, when the server ends."""


class Connection(HttpToolsProtocol):
    """One connection. ``check`` has to be called every now and then: deadlines cost a request no timer."""

    config: ServerConfig

    def __init__(self, config: ServerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.app = self._answer
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
        self._answered: RequestResponseCycle = None  # type: ignore[assignment]
        """The request that is being answered, or was last; ``cycle`` is the last that has come."""
        self._answering: asyncio.Task[None] | None = None
        """What answers it, from its first step to the end of the answer."""
        self._ended = False
        """The client has ended its side: it has gone, or waits for its answers alone."""
        self._last: RequestResponseCycle | None = None
        """The request whose answer says that no more are taken."""

    # What the client sends

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the client has been refused or its headers, or trailers, have no end."""
        if self._over:
            return
        self._size += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._refuse_nonsense(error)
        else:
            limits = self._limits
            if self._partial and (self._size > limits.header_bytes or len(self.headers) > limits.headers):
                self._refuse(self._too_many_headers())

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

    def on_headers_complete(self) -> None:
        """All headers of a request are here; it is begun, unless there are too many of them."""
        if len(self.headers) > self._limits.headers or (
            self._size > self._limits.header_bytes and self._header_bytes() > self._limits.header_bytes
        ):
            raise self._too_many_headers()
        if self.parser.get_http_version() not in _VERSIONS:
            raise RefusedError(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
        self._size = 0
        self._upgrading = self.parser.get_method() if self.parser.should_upgrade() else b""
        if self._upgrading == b"CONNECT":
            raise RefusedError(400, "This is no proxy.")
        if self._upgrading:
            self._heading = False
            return
        super().on_headers_complete()  # which may find that the URL is none
        self.cycle.transport = cast("asyncio.Transport", HeadHolder(self.transport, self.loop))
        self._heading = False
        self.headers = []  # trailers go here: they are none of those by which the request was let in
        if not self.pipeline:
            self._answered = self.cycle
        if self._drain.begun:
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
        if self.flow.read_paused and not self.pipeline:
            self.flow.resume_reading()  # the end of the client would not be seen

    # What it is answered

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Let the app answer a request as long as its client is there."""
        cycle, self._answering = self._answered, asyncio.current_task()
        if cycle.disconnected:
            return
        try:
            await self.config.loaded_app(scope, receive, send)
        except asyncio.CancelledError:
            if not cycle.disconnected:
                raise

    def on_response_complete(self) -> None:
        """Go on with the next request, as uvicorn does, but without a timer: ``check`` ends idle connections."""
        self._release_head()  # of an answer without a body
        self.server_state.total_requests += 1
        self._answering = None
        if not self._partial:
            self._since = self.loop.time()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._answered, app = self.pipeline.pop()
            task = self.loop.create_task(self._answered.run_asgi(app))
            task.add_done_callback(self.tasks.discard)
            self.tasks.add(task)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Go on if there is something to answer: some clients end their side, and read on.

        Those that have gone end theirs, too, but then reset the connection when they are sent something.
        """
        self._release_head()
        if self._idle or self.cycle.more_body:
            return False
        self._ended = True
        self.cycle.keep_alive = False
        if not (self._answered.response_started or self._answered.scope["http_version"] == "1.0"):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended, perhaps the last one; nobody waits for an answer any longer."""
        super().connection_lost(exc)
        if not self._idle:
            self._answered.disconnected = True
            if self._answering is not None:
                self._answering.cancel()
        if self._drain.begun and not self.connections:
            self._drain.gone.set()

    def _release_head(self) -> None:
        """Let nothing overtake what an app has begun to answer."""
        if self._answered is not None:
            cast("HeadHolder", self._answered.transport).release()

    # What is refused

    def check(self, now: float) -> None:
        """End the connection if the client takes too long."""
        waited = now - self._since
        if self._ended and self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()  # nobody was there
        elif self._unread_for(now) > (_UNREAD_AT_THE_END if self._drain.begun else self._limits.idle_seconds):
            self.transport.abort()  # closed politely, it would wait for the client
        elif self._partial and not self._over:
            if self.flow.read_paused:
                self._since = now  # it is us who do not read
            elif waited > self._limits.request_seconds:
                self._refuse(self._too_slow())
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

    def _refuse_nonsense(self, error: httptools.HttpParserError) -> None:
        if isinstance(error.__context__, RefusedError):
            self._refuse(error.__context__)
        else:
            self._refuse(RefusedError(400, "This is no request of HTTP/1.1."))

    def _too_slow(self) -> RefusedError:
        seconds = self._limits.request_seconds
        return RefusedError(408, f"The request was not all here within {seconds:g} s: send it faster, or in parts.")

    def _header_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)

    def _too_many_headers(self) -> RefusedError:
        most, size = self._limits.headers, self._limits.header_bytes
        return RefusedError(431, f"A request may have {most} headers of {size:,} bytes in all, with its first line.")

    def _refuse(self, error: RefusedError) -> None:
        """Read no more, tell the client why, and let it go."""
        if self._over:
            return
        self._over = True
        if self.headers:
            self.headers.clear()  # one read may have brought 60,000 of them
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()  # it has not begun
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answered
        cycle = self.cycle
        if not (self._idle or cycle.more_body):
            cycle.keep_alive = False  # what came before is answered yet, and that ends the connection
            self._since = inf
            return
        self._since = self.loop.time()
        self._release_head()
        if self._heading or not self._partial or not cycle.response_started:
            self.transport.write(error.answer())
        if not self._idle:
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
