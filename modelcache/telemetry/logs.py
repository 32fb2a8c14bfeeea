"""Structured logs: each event of a registry as a log record with its facts beside the message.

The facts travel as ``extra`` of the standard library's ``logging``, which is what formats or ships records anywhere. A
server that logs its requests uses the same names: ``model``, ``version``, ``tier``, ``seconds``.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from modelcache.errors import ModelNotFoundError
from modelcache.records import LoadFailed, ModelEvicted, ModelLoaded, ModelRefreshed, WorkerDied

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.records import Event, ModelInfo
    from modelcache.registry import ModelRegistry

EVENTS = logging.getLogger("modelcache.events")


def log_events(registry: ModelRegistry, logger: logging.Logger = EVENTS) -> Callable[[], None]:
    """Log each event of ``registry`` from now on; call what is returned to stop that.

    Fields beside the message: ``event`` ("loaded", "refreshed", "evicted", "load_failed", "worker_died"), ``model``,
    ``version``, ``seconds`` (of a load), ``bytes``, ``cause`` (of an eviction), ``replaced`` (a version), ``error``
    (its class), ``pid``, ``signal``, ``exit_code``, ``models`` (how many a worker held). Failures and deaths are
    warnings; a name that the store does not have is none. Handlers run on the event loop: put slow ones behind a
    ``QueueHandler``.
    """
    return registry.subscribe(partial(_log, logger))


def _log(logger: logging.Logger, event: Event) -> None:
    match event:
        case ModelLoaded(model):
            logger.info("%s is loaded", model.name, extra=_facts("loaded", model))
        case ModelRefreshed(model, replaced):
            extra = {**_facts("refreshed", model), "replaced": replaced}
            logger.info("%s has another version", model.name, extra=extra)
        case ModelEvicted(name, version, cause, size):
            extra = {"event": "evicted", "model": name, "version": version, "cause": cause, "bytes": size}
            logger.info("%s has left (%s)", name, cause, extra=extra)
        case LoadFailed(name, error):
            level = logging.INFO if isinstance(error, ModelNotFoundError) else logging.WARNING
            extra = {"event": "load_failed", "model": name, "error": type(error).__name__}
            logger.log(level, "%s could not be loaded: %s", name, error, extra=extra)
        case WorkerDied(pid, signal, exit_code, models):
            extra = {
                "event": "worker_died",
                "pid": pid,
                "signal": signal,
                "exit_code": exit_code,
                "models": len(models),
            }
            logger.warning("worker process %d has ended, and %d models with it", pid, len(models), extra=extra)


def _facts(event: str, model: ModelInfo) -> dict[str, Any]:
    return {
        "event": event,
        "model": model.name,
        "version": model.version,
        "seconds": model.load_seconds,
        "bytes": model.size_bytes,
    }
