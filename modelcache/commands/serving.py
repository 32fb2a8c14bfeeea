"""``modelcache serve``: the models of a store, for clients of SageMaker and of the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import gc
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcache import ModelCacheError, ModelRegistry, StoreError
from modelcache.commands.terminal import show_size
from modelcache.serving.config import Limits
from modelcache.serving.listening import allow_many_connections, bind, is_loopback, url_of
from modelcache.serving.server import Options, serve
from modelcache.serving.tokens import read_tokens

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from rich.console import Console

__all__ = ["Limits", "Options", "log_to_stderr", "read_tokens", "run"]

_COLLECT_EVERY = 20_000
"""Objects that garbage collection waits for. By itself it looks for cycles after 700, as many as 30 requests in flight
take, and finds none: 5 % of the server's time."""

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def run(
    console: Console,
    store: str,
    *,
    host: str,
    port: int,
    insecure: bool,
    registry_options: dict[str, Any],
    options: Options,
) -> None:
    """Serve until SIGTERM or SIGINT."""
    if not (is_loopback(host) or options.tokens or insecure):
        raise ModelCacheError(
            f"Other hosts could reach {host}, and anybody could use and unload models: give a --token-file, or say "
            "--insecure if the network lets nobody in who should not be."
        )
    if "://" not in store and not Path(store).is_dir():
        raise StoreError(f"The folder {store} does not exist.")
    registry = ModelRegistry(store, **registry_options)
    ports = [port] if options.management_port is None else [port, options.management_port]
    listeners = [bind(host, number) for number in ports]
    allow_many_connections()

    def announce() -> None:
        gc.freeze()  # what is imported and made by now stays, and need not be looked at again
        gc.set_threshold(_COLLECT_EVERY)
        console.print(_describe(store, registry, listeners, options), soft_wrap=True)

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(registry, listeners, options, announce))


def _describe(store: str, registry: ModelRegistry, listeners: list[socket.socket], options: Options) -> str:
    stats, urls = registry.stats(), [url_of(listener) for listener in listeners]
    facts = [f"{show_size(stats.budget)} for models", _counted(len(stats.workers), "worker")]
    if options.tokens:
        facts.append(_counted(len(options.tokens), "token"))
    if not options.management:
        facts.append("no management")
    facts += [f"management on {url}" for url in urls[1:]]
    return f"Serving {store} on {urls[0]} ({', '.join(facts)})"


def log_to_stderr(level: str, *, access: bool, as_json: bool) -> None:
    """Log what happens, and each request if ``access`` says so, to standard error; a line for each record."""
    handler = logging.StreamHandler()
    handler.setFormatter(_json_formatter() if as_json else logging.Formatter(_LOG_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if access:
        logging.getLogger("modelcache.access").setLevel(logging.INFO)


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415 - used on demand

    names = {"levelname": "level", "name": "logger"}
    return JsonFormatter("{levelname}{name}{message}", style="{", rename_fields=names, timestamp="time")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if find_spec("uvloop") is None:
        return None
    import uvloop  # noqa: PLC0415 - used where it is installed

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
