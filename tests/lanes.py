"""A lane's transport that goes nowhere."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from modelcache.pool.shared import Arena, Slots, map_memory, shared_memory


def both_ends() -> tuple[Slots, Arena]:
    """Return memory as the parent and as its worker see it."""
    descriptor = shared_memory()
    try:
        return Slots(map_memory(descriptor)), Arena(map_memory(descriptor))
    finally:
        os.close(descriptor)


class FakeTransport(asyncio.Transport):
    """Takes down each write by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        pass


@dataclass(eq=False)
class Line:
    """The calls for one model that wait for a worker."""

    number: int
    waiting: int = 0
