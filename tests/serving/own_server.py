"""Our server in the test's own event loop, and clients that write what they like to it."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast
from unittest.mock import AsyncMock

from modelcache.serving.config import Limits
from modelcache.serving.listening import bind
from modelcache.serving.server import Options, Server, configure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp

    from modelcache.serving.connections import Connection


class Client:
    """A client that sends bytes, and reads answers with a content length."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body, as clients do who have been told to go on."""
        status, headers = await self.head()
        while status == 100:
            status, headers = await self.head()
        return status, headers, await self.part(int(headers["content-length"]))

    async def head(self) -> tuple[int, dict[str, str]]:
        """Return status and headers."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.strip().split("\r\n")
        return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines)

    async def part(self, size: int) -> bytes:
        """Return so many bytes of a body."""
        return await self._reader.readexactly(size)

    def buffer(self, size: int) -> None:
        """Have the kernel keep no more than about ``size`` bytes until they are read."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    async def rest(self) -> bytes:
        """Return what comes until the server closes the connection."""
        return await self._reader.read()

    async def end(self) -> None:
        """Send no more, and read on."""
        self._writer.write_eof()

    async def close(self, *, reset: bool = False) -> None:
        """Go, as a client that has read all, or as one that is killed with something unread."""
        if reset:
            at_once = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self._writer.close()


class OwnServer:
    """A server that listens."""

    def __init__(self, app: ASGIApp, limits: Limits, drain_seconds: float) -> None:
        self.registry = AsyncMock()
        config = configure(app, limits)
        options = Options(limits=limits, drain_seconds=drain_seconds)
        self.server = Server(config, self.registry, options, started=lambda: None)
        self._listeners = [bind("127.0.0.1", 0)]
        self._clients: list[Client] = []
        self._ending: asyncio.Task[None] | None = None

    async def start(self) -> None:
        config = self.server.config
        config.load()
        self.server.lifespan = config.lifespan_class(config)
        await self.server.startup(self._listeners)

    async def connect(self) -> Client:
        """Return a client whose connection the server has accepted."""
        before = len(self.server.server_state.connections)
        self._clients.append(Client(*await asyncio.open_connection(*self._listeners[0].getsockname())))
        while len(self.server.server_state.connections) == before:
            await asyncio.sleep(0)
        return self._clients[-1]

    async def connections(self, count: int) -> list[Connection]:
        """Return the connections when there are ``count`` of them."""
        while len(self.server.server_state.connections) != count:
            await asyncio.sleep(0)
        return cast("list[Connection]", list(self.server.server_state.connections))

    def later(self, seconds: float) -> None:
        """Have the deadlines looked at as they will be in ``seconds``."""
        now = asyncio.get_running_loop().time() + seconds
        for connection in list(self.server.server_state.connections):
            cast("Connection", connection).check(now)

    def end(self) -> asyncio.Task[None]:
        """Begin to drain, as at SIGTERM."""
        if self._ending is None:
            self.server.begin_to_drain()
            self._ending = asyncio.create_task(self.server.shutdown(self._listeners))
        return self._ending

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self.end()


@asynccontextmanager
async def running(app: ASGIApp, limits: Limits | None = None, *, drain_seconds: float = 30) -> AsyncIterator[OwnServer]:
    """Serve ``app`` on a free port of loopback."""
    server = OwnServer(app, limits or Limits(), drain_seconds)
    await server.start()
    try:
        yield server
    finally:
        await server.close()
