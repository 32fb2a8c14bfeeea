"""What the connections of a server have in common."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from uvicorn import Config


@dataclass(frozen=True)
class Limits:
    """What one client may take."""

    headers: int = 100
    header_bytes: int = 32 << 10
    """All headers of a request, with its first line."""
    request_seconds: float = 30.0
    """From the first byte of a request to its last."""
    idle_seconds: float = 75.0
    """From one request to the next, or without reading any of an answer that waits; more than the 60 s after which load
    balancers close their side."""


@dataclass
class Drain:
    """How far the end of the server has come."""

    begun: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last connection has gone, and when nobody wants to wait for that any longer."""


class ServerConfig(Config):
    """uvicorn's configuration, with what its connections need of ours."""

    def __init__(self, app: Any, limits: Limits, **options: Any) -> None:
        super().__init__(app, **options)
        self.limits = limits
        self.drain = Drain()
