"""A proxy between an HTTP client and a real server that does to single requests what a network does.

::

    async with FaultProxy(server_url) as proxy:
        proxy.next(cut(after=1000))                                        # the next request
        proxy.next(slow_down(), when=lambda request: "range" in request)   # the next one that asks for a range
        store = HTTPStore(proxy.url)

Faults given together act together on one request, in their order. The proxy passes on ``Host`` as it came, so that
signatures hold, and asks the server over a connection of its own for each request.
"""

# ruff: noqa: N801 - a script reads as a list of verbs: cut(after=1000), stall(), call(replace_it)
from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, replace
from inspect import isawaitable
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
    from types import TracebackType

    Body = AsyncGenerator[bytes]

_PIECE = 64 << 10
_HOP = frozenset({"connection", "keep-alive", "expect"})
_SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message><RequestId>1</RequestId></Error>"""


@dataclass(frozen=True)
class Head:
    """The first line of a request or an answer, and its header fields as they came."""

    first: str
    fields: tuple[tuple[str, str], ...]

    @property
    def method(self) -> str:
        return self.first.split(" ")[0]

    @property
    def target(self) -> str:
        """Path and query, still encoded."""
        return self.first.split(" ")[1]

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, name: str) -> str | None:
        """Return the first value of a field, whatever the case of its name."""
        return next((value for key, value in self.fields if key.lower() == name.lower()), None)

    def with_fields(self, fields: Mapping[str, str | None]) -> Head:
        """Return one where ``fields`` have these values; None removes."""
        kept = tuple(field for field in self.fields if field[0].lower() not in {name.lower() for name in fields})
        return replace(self, fields=kept + tuple((name, value) for name, value in fields.items() if value is not None))

    def encode(self) -> bytes:
        lines = [self.first, *(f"{name}: {value}" for name, value in self.fields), "", ""]
        return "\r\n".join(lines).encode("latin-1")


@dataclass(frozen=True)
class Answer:
    """What is sent instead of asking the server."""

    head: Head
    body: bytes


class Fault:
    """What happens to one request; on its own: nothing."""

    at: int | None = None
    """Bytes of the body, counted without framing, after which ``on_body`` is awaited; None: never."""

    async def on_request(self, request: Head) -> Head | Answer:
        """Return the request to pass on, or what to answer without asking the server."""
        return request

    async def on_head(self, head: Head) -> Head:
        """Return the head to answer with."""
        return head

    async def on_body(self) -> None:
        """Act when ``at`` bytes of the body have been sent; CutError and DoneError end it there."""


class CutError(Exception):
    """Raised where the connection to the client is to end: ``reset`` by RST, else by FIN."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__(reset)
        self.reset = reset


class DoneError(Exception):
    """Raised where the body is to end as if it were complete."""


class cut(Fault):
    """End the connection after ``after`` bytes of the body; None: before the head.

    By FIN exactly these bytes arrive. By RST (``reset``) a client may see less: unread bytes may be lost.
    """

    def __init__(self, *, after: int | None, reset: bool = False) -> None:
        self.at, self.reset = after, reset

    async def on_head(self, head: Head) -> Head:
        if self.at is None:
            raise CutError(reset=self.reset)
        return head

    async def on_body(self) -> None:
        raise CutError(reset=self.reset)


class stall(Fault):
    """Stop after ``after`` bytes of the body, or before the head (None), until the test calls ``release()``."""

    def __init__(self, *, after: int | None = None) -> None:
        self.at = after
        self.reached = asyncio.Event()
        """Set when a request has come so far."""
        self._released = asyncio.Event()

    def release(self) -> None:
        self._released.set()

    async def on_head(self, head: Head) -> Head:
        if self.at is None:
            await self.on_body()
        return head

    async def on_body(self) -> None:
        self.reached.set()
        await self._released.wait()


class truncate(Fault):
    """Deliver the first ``to`` bytes as if they were all: the framing is right, and Content-Length says ``to``."""

    def __init__(self, *, to: int) -> None:
        self.at = to

    async def on_head(self, head: Head) -> Head:
        return head.with_fields({"Content-Length": str(self.at)}) if "content-length" in head else head

    async def on_body(self) -> None:
        raise DoneError


class answer(Fault):
    """Answer this without asking the server."""

    def __init__(self, status: int, body: bytes = b"", **fields: str) -> None:
        """Underscores in the names of ``fields`` stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        head = Head(f"HTTP/1.1 {status} Scripted", (*named.items(), ("Content-Length", str(len(body)))))
        self._answer = Answer(head, body)

    async def on_request(self, request: Head) -> Answer:
        return self._answer


def slow_down(retry_after: float | None = None) -> answer:
    """Return the answer of a throttling S3: 503, SlowDown, and Retry-After in seconds unless it is None."""
    fields = {} if retry_after is None else {"Retry_After": f"{retry_after:g}"}
    return answer(503, _SLOW_DOWN, Content_Type="application/xml", **fields)


class call(Fault):
    """Call ``function`` when the request has come, and await what it returns, before the server is asked."""

    def __init__(self, function: Callable[[], Awaitable[object] | object]) -> None:
        self._function = function

    async def on_request(self, request: Head) -> Head:
        result = self._function()
        if isawaitable(result):
            await result
        return request


class rewrite(Fault):
    """Set header fields of the request, or of its answer, on the way; None removes one."""

    def __init__(
        self, *, request: Mapping[str, str | None] | None = None, answer: Mapping[str, str | None] | None = None
    ) -> None:
        self._request, self._answer = request or {}, answer or {}

    async def on_request(self, request: Head) -> Head:
        return request.with_fields(self._request)

    async def on_head(self, head: Head) -> Head:
        return head.with_fields(self._answer)


@dataclass
class _Rule:
    faults: tuple[Fault, ...]
    when: Callable[[Head], bool]
    left: int | None


class FaultProxy:
    """Listens on a free loopback port and passes on to ``target``, an http:// URL; use as ``async with``.

    An error of the proxy itself, such as a server that cannot be reached, is raised at the end of the block.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname and parts.port, "the target has to be http://host:port"
        self._target = (parts.hostname, parts.port)
        self._path = parts.path
        self._rules: list[_Rule] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self.requests: list[Head] = []
        """The heads of all requests, in the order in which they came."""
        self.statuses: list[int] = []
        """The statuses of all answers whose heads were sent."""
        self.connections = 0
        """All connections that clients have opened."""
        self.url = ""

    def next(self, *faults: Fault, when: Callable[[Head], bool] = lambda _: True, times: int | None = 1) -> None:
        """Do this to the next ``times`` requests that ``when`` agrees to, None: to all; after what was scripted before.

        A request meets the first rule that agrees to it, and no other.
        """
        self._rules.append(_Rule(faults, when, times))

    def clear(self) -> None:
        """Forget what is scripted and has not happened."""
        self._rules.clear()

    @property
    def open_connections(self) -> int:
        """Connections of clients that are open now."""
        return len(self._tasks)

    async def quiet(self, within: float = 5) -> None:
        """Wait until no client is connected; AssertionError after ``within`` seconds."""
        try:
            async with asyncio.timeout(within):
                while self._tasks:
                    await asyncio.wait(set(self._tasks), return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.sleep(0)
        except TimeoutError:
            raise AssertionError(f"{self.open_connections} connections are still open") from None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}{self._path}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        await asyncio.sleep(0)  # the transports close in the next step of the loop
        if self._errors and error is None:
            raise BaseExceptionGroup("the proxy failed", self._errors)

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(_ClientReader(), self._accept)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, _ClientReader)
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer), name=f"proxied connection {self.connections}")
        self._tasks.add(task)
        reader.on_gone = task.cancel  # nobody waits for an answer any more
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, ConnectionError):
            self._errors.append(error)

    async def _serve(self, reader: _ClientReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        try:
            while True:
                head = await _read_head(reader)
                self.requests.append(head)
                await self._exchange(head, reader, writer)
        except CutError as fault:
            if fault.reset:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
        except asyncio.IncompleteReadError:
            pass  # between two requests, or in the middle of one: the client is gone
        finally:
            reader.on_gone = _nothing  # from here on it is this end that closes
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def _faults(self, head: Head) -> tuple[Fault, ...]:
        rule = next((rule for rule in self._rules if rule.when(head)), None)
        if rule is None:
            return ()
        if rule.left is not None:
            rule.left -= 1
            if not rule.left:
                self._rules.remove(rule)
        return rule.faults

    async def _exchange(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        faults = self._faults(head)
        if head.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        sent = b"".join([piece async for piece in _body(head, reader)])
        request = head
        for fault in faults:
            passed_on = await fault.on_request(request)
            if isinstance(passed_on, Answer):
                await self._send(passed_on.head, _once(passed_on.body), head, faults, writer)
                return
            request = passed_on
        async with AsyncExitStack() as stack:
            server, to_server = await asyncio.open_connection(*self._target)
            stack.callback(to_server.close)
            to_server.write(_for_the_server(request, len(sent)).encode() + sent)
            answered = await _read_answer(server)
            await self._send(answered, _body(answered, server, head), head, faults, writer)

    async def _send(
        self, head: Head, body: Body, request: Head, faults: tuple[Fault, ...], writer: asyncio.StreamWriter
    ) -> None:
        head = head.with_fields(dict.fromkeys(_HOP))
        for fault in faults:
            head = await fault.on_head(head)
        self.statuses.append(head.status)
        has_body = _has_body(head, request)
        chunked = _is_chunked(head) and has_body
        until_end = has_body and not chunked and "content-length" not in head
        writer.write((head.with_fields({"Connection": "close"}) if until_end else head).encode())
        async with aclosing(_faulty(body, faults)) as pieces:
            async for piece in pieces:
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                await writer.drain()
        writer.write(b"0\r\n\r\n" if chunked else b"")
        await writer.drain()
        if until_end:
            raise CutError(reset=False)


def _nothing() -> None:
    pass


class _ClientReader(asyncio.StreamReader):
    """Tells when the client has closed the connection, also while nobody reads from it."""

    on_gone: Callable[[], object] = staticmethod(_nothing)

    def feed_eof(self) -> None:
        super().feed_eof()
        self.on_gone()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.on_gone()


async def _faulty(body: Body, faults: tuple[Fault, ...]) -> Body:
    """Yield the pieces of ``body``, cut where a fault acts; its consumer has sent a piece when it asks for the next."""
    stops = sorted((fault for fault in faults if fault.at is not None), key=_position)
    sent = 0
    async with aclosing(body):
        with suppress(DoneError):
            while stops and _position(stops[0]) == 0:
                await stops.pop(0).on_body()
            async for piece in body:
                left = piece
                while left:
                    part = left[: _position(stops[0]) - sent] if stops else left
                    left = left[len(part) :]
                    sent += len(part)
                    yield part
                    while stops and _position(stops[0]) == sent:
                        await stops.pop(0).on_body()


def _position(fault: Fault) -> int:
    return fault.at or 0


async def _once(data: bytes) -> Body:
    yield data


async def _read_head(reader: asyncio.StreamReader) -> Head:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = text.rstrip("\r\n").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return Head(first, tuple((name, value.strip()) for name, _, value in fields))


async def _read_answer(server: asyncio.StreamReader) -> Head:
    while (head := await _read_head(server)).status < 200:
        pass  # 100 Continue
    return head


def _for_the_server(request: Head, length: int) -> Head:
    """Return the head for a connection that carries one request, whose body has been read whole."""
    if _is_chunked(request):
        request = request.with_fields({"Transfer-Encoding": None, "Content-Length": str(length)})
    return request.with_fields({**dict.fromkeys(_HOP), "Connection": "close"})


def _is_chunked(head: Head) -> bool:
    return "chunked" in (head.get("transfer-encoding") or "").lower()


def _has_body(answer: Head, request: Head) -> bool:
    return request.method != "HEAD" and answer.status not in (204, 304)


async def _body(head: Head, reader: asyncio.StreamReader, request: Head | None = None) -> Body:
    """Yield the body that follows ``head`` without its framing; ``request`` if it is an answer to that."""
    if request is not None and not _has_body(head, request):
        return
    length = head.get("content-length")
    if _is_chunked(head):
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
    elif length is not None:
        left = int(length)
        while left:
            piece = await reader.read(min(left, _PIECE))
            if not piece:
                raise ConnectionResetError("The server ended its answer early.")
            left -= len(piece)
            yield piece
    elif request is not None:
        while piece := await reader.read(_PIECE):
            yield piece
