"""The server behind ``modelcache serve``: one ASGI app of all there is, run by uvicorn, and ended without a loss."""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import uvicorn
from starlette.responses import JSONResponse

from modelcache.serving import access
from modelcache.serving.access import GuardedRegistry
from modelcache.serving.access_log import AccessLog
from modelcache.serving.bounds import MOST_ROWS
from modelcache.serving.config import Limits, ServerConfig
from modelcache.serving.connections import Connection
from modelcache.serving.guard import Guard, answer_error
from modelcache.serving.listening import accept_the_last
from modelcache.serving.open_inference_app import open_inference
from modelcache.serving.openapi import describe
from modelcache.serving.sagemaker_app import app_of
from modelcache.serving.sagemaker_calls import Calls
from modelcache.serving.sagemaker_models import Models
from modelcache.telemetry.logs import log_events

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterator
    from types import FrameType

    from starlette.types import ASGIApp, Receive, Scope, Send

    from modelcache import ModelRegistry
    from modelcache.serving.tokens import Tokens

logger = logging.getLogger("modelcache.serving")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LINGER = 1.0
"""Seconds for which idle connections stay open when the server ends: requests may be on their way to it."""
_LAST_WORDS = 2.0
"""Seconds for the answers to those who were told that the server cannot wait for them."""


@dataclass(frozen=True)
class Options:
    """How to serve."""

    tokens: Tokens | None = None
    management: bool = True
    """Whether models can be loaded and unloaded."""
    management_port: int | None = None
    """Where they can, if not on the port of all else."""
    store_url: str = ""
    """What the registry's store was opened with: clients that load models may write urls below it."""
    preload: tuple[str, ...] = ()
    """Models to load before anybody can connect."""
    max_body_bytes: int = 6 << 20
    max_rows: int = MOST_ROWS
    log_access: bool = False
    drain_seconds: float = 30.0
    """How long accepted requests may take to finish when the server is to end."""
    limits: Limits = field(default_factory=Limits)


class Server(uvicorn.Server):
    """uvicorn, with an end of its own.

    When it is told to end it accepts whoever has connected, answers whatever they have sent, says with each answer that
    it is the connection's last, and returns, instead of ending the process by the signal. A second SIGINT is obeyed at
    once.
    """

    config: ServerConfig

    def __init__(
        self, config: ServerConfig, registry: ModelRegistry, options: Options, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._registry = registry
        self._options = options
        self._started = started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Begin to drain at SIGINT and SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note that the server is to end."""
        super().handle_exit(sig, frame)
        self.begin_to_drain()
        if self.force_exit:
            self.config.drain.gone.set()

    def begin_to_drain(self) -> None:
        """Let the answers to the requests that have come be the last of their connections."""
        self.config.drain.begun = True
        for connection in self._connections():
            connection.shutdown()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._sweeping = asyncio.create_task(self._sweep())
        self._started()

    async def _sweep(self) -> None:
        loop, limits = asyncio.get_running_loop(), self._options.limits
        while True:
            await asyncio.sleep(min(1.0, limits.request_seconds / 4))
            for connection in self._connections():
                try:
                    connection.check(loop.time())
                except Exception:
                    logger.exception("a connection could not be checked: it is ended")
                    connection.transport.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more clients, and answer those there are."""
        logger.info("ending: %d connections are open", len(self.server_state.connections))
        await accept_the_last(sockets or [])
        for server in self.servers:
            server.close()
        await self._gone(_LINGER)
        for connection in self._connections():
            connection.leave()
        if not await self._gone(self._options.drain_seconds):
            logger.warning("%d connections are open still: their requests are refused", len(self._connections()))
            await self._registry.close(drain=0)
            await self._gone(_LAST_WORDS)
        for connection in self._connections():
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORDS)
        self._sweeping.cancel()

    async def _gone(self, seconds: float) -> bool:
        """Wait until all connections have ended; False if some are left when time, or patience, is up."""
        drain = self.config.drain
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.server_state.connections and not self.force_exit:
                    drain.gone.clear()
                    await drain.gone.wait()
        return not self.server_state.connections

    def _connections(self) -> list[Connection]:
        return cast("list[Connection]", list(self.server_state.connections))


async def serve(
    registry: ModelRegistry, listeners: list[socket.socket], options: Options, started: Callable[[], None]
) -> None:
    """Serve ``registry`` on bound sockets until SIGTERM or SIGINT; the second socket, if any, is the management's.

    The registry is started before anybody can connect, and closed after the last answer. ``started`` is called when the
    server listens.
    """
    ports = [listener.getsockname()[1] for listener in listeners]
    guard = Guard(
        make_app(registry, options, management_port=ports[1] if len(ports) > 1 else None),
        tokens=options.tokens,
        draining=lambda: config.drain.begun,
        access_log=AccessLog(registry) if options.log_access else None,
    )
    config = configure(guard, options.limits)
    async with registry:
        log_events(registry)
        for name, error in (await registry.preload(options.preload)).failed.items():
            logger.warning("%s was not loaded beforehand: %s", name, error)
        await Server(config, registry, options, started).serve(sockets=listeners)


def configure(app: ASGIApp, limits: Limits) -> ServerConfig:
    """Return what uvicorn needs to know; it logs no requests and takes no header for the client's address."""
    return ServerConfig(
        app,
        limits,
        http=Connection,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )


def make_app(registry: ModelRegistry, options: Options, *, management_port: int | None = None) -> ASGIApp:
    """Return the app of all routes; those of the management on ``management_port`` alone, if there is one."""
    shown = registry if options.tokens is None else cast("ModelRegistry", GuardedRegistry(registry))
    metrics = _metrics(registry)
    calls = Calls(
        shown, Models(shown, options.store_url), max_body_bytes=options.max_body_bytes, max_rows=options.max_rows
    )
    public = _Routes(shown, calls, metrics, options, management=options.management and management_port is None)
    if management_port is None:
        return public
    managing = _Routes(shown, calls, metrics, options, management=True)

    def by_port(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        app = managing if scope["server"][1] == management_port else public
        return app(scope, receive, send)

    return by_port


class _Routes:
    """Leads a request to the app whose protocol it speaks."""

    def __init__(
        self, registry: ModelRegistry, calls: Calls, metrics: ASGIApp | None, options: Options, *, management: bool
    ) -> None:
        self._open_inference = open_inference(
            registry, management=management, max_body_bytes=options.max_body_bytes, max_rows=options.max_rows
        )
        self._sagemaker = app_of(calls, management=management)
        self._metrics = metrics
        self._openapi = JSONResponse(describe(management=management, metrics=metrics is not None))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self._app_of(scope["path"])(scope, receive, send)

    def _app_of(self, path: str) -> ASGIApp:
        if path == "/v2" or path.startswith("/v2/"):
            return self._open_inference
        if path == "/metrics" and self._metrics is not None:
            return self._metrics
        if path == "/openapi.json":
            return self._openapi
        return self._sagemaker


def _metrics(registry: ModelRegistry) -> ASGIApp | None:
    """Return the app of ``/metrics``, which is for those who may use all models: its series name them."""
    if find_spec("prometheus_client") is None:
        return None
    from modelcache.telemetry.prometheus import metrics_app  # noqa: PLC0415 - it comes by another extra

    app = metrics_app(registry)

    async def metrics(scope: Scope, receive: Receive, send: Send) -> None:
        if access.current.get().everything:
            await app(scope, receive, send)
        else:
            await answer_error(send, 403, "Figures of all models are for tokens without patterns alone.")

    return metrics
