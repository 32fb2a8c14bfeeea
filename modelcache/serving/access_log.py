"""A line for each request; the model that was asked, and its version, are beside it for programs that read logs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

    from modelcache import ModelRegistry

logger = logging.getLogger("modelcache.access")

_MODEL = "modelcache.model"


def note_model(scope: Scope, name: str) -> None:
    """Note which model a request is about."""
    scope[_MODEL] = name


class AccessLog:
    """Logs requests to ``modelcache.access``, at INFO.

    Fields beside the message: ``event`` ("request"), ``client``, ``method``, ``path``, ``status``, ``seconds``,
    ``request_id``, and of the model that was asked ``model`` and ``version``, None if it is not resident any more.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def log(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        """Log one request, which has been answered."""
        client, method, path = (scope.get("client") or ("-",))[0], scope["method"], scope["path"]
        facts = {
            "event": "request", "client": client, "method": method, "path": path, "status": status,
            "seconds": seconds, "request_id": request_id,
        }  # fmt: skip
        name = scope.get(_MODEL)
        if name is not None:
            info = self._registry.peek(name)
            facts |= {"model": name, "version": info.version if info is not None else None}
        line = "%s %s %r %d %.1f ms %s"
        logger.info(line, client, method, path, status, seconds * 1e3, request_id, extra=facts)
