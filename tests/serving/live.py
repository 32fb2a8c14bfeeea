"""A real server in the test's own event loop, for clients that want a socket."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from uvicorn import Config, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp


@asynccontextmanager
async def serving(app: ASGIApp, **options: Any) -> AsyncIterator[str]:
    """Serve ``app`` by uvicorn on a free port of loopback; gives the URL, without a slash at the end.

    The server takes requests when this is entered, and those under way are answered before it is left. Clients that
    block belong in a thread (``asyncio.to_thread``). ``options`` are those of ``uvicorn.Config``.
    """
    config = Config(app, **{"log_config": None, "access_log": False, **options})
    config.load()
    server = Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # serve() would poll every 0.1 s for the end, and take the signals of the process.
        await server.startup(sockets=[listener])
        assert server.started, "uvicorn could not start: see its log"
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            connections = server.server_state.connections
            for connection in list(connections):
                connection.shutdown()
            while connections:
                await asyncio.sleep(0)
            await server.shutdown(sockets=[listener])
