"""Fakes that make interleavings happen: a clock that stands still, a store that waits for the test."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from modelcache.stores.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelcache.stores.base import Artifact, NotModified


class FakeClock:
    """A clock that moves only when told: pass it as ``ModelRegistry(..., clock=FakeClock())``."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move on."""
        self.now += seconds


class GatedStore(MemoryStore):
    """A memory store of which each fetch finishes when the test says.

    ``fetches`` lists the names asked for, in order. ``open(name)`` lets the fetches of that name through, those that
    wait and, until ``shut(name)``, those to come; ``fail(name, error)`` makes those that wait raise ``error``.
    """

    def __init__(self, artifacts: Mapping[str, bytes] | None = None) -> None:
        super().__init__(artifacts)
        self.fetches: list[str] = []
        self.closed = False
        self._open: set[str] = set()
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._arrivals: list[tuple[int, asyncio.Future[None]]] = []

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact, when the gate of ``name`` opens."""
        self.fetches.append(name)
        self._announce()
        if name not in self._open:
            gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(name, []).append(gate)
            await gate
        return await super().fetch(name, if_version=if_version)

    def open(self, *names: str) -> None:
        """Let fetches of ``names`` through."""
        for name in names:
            self._open.add(name)
            for gate in self._waiting.pop(name, []):
                if not gate.done():
                    gate.set_result(None)

    def shut(self, *names: str) -> None:
        """Let fetches of ``names`` wait again."""
        self._open.difference_update(names)

    def fail(self, name: str, error: Exception) -> None:
        """Make the fetches of ``name`` that wait raise ``error``."""
        for gate in self._waiting.pop(name, []):
            if not gate.done():
                gate.set_exception(error)

    async def fetched(self, count: int) -> None:
        """Wait until there have been ``count`` fetches."""
        if len(self.fetches) < count:
            arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._arrivals.append((count, arrival))
            await arrival

    async def close(self) -> None:
        """Take note of it."""
        self.closed = True

    def _announce(self) -> None:
        for count, arrival in self._arrivals:
            if len(self.fetches) >= count and not arrival.done():
                arrival.set_result(None)
