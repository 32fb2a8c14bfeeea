"""A lane's transport that goes nowhere."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcache.pool.blackbox import BlackBox
from modelcache.pool.shared import Arena, Slots, map_memory, shared_memory

if TYPE_CHECKING:
    from modelcache.pool.channel import Channel


def both_ends() -> tuple[Slots, Arena]:
    """Return memory as the parent and as its worker see it."""
    descriptor = shared_memory()
    try:
        return Slots(map_memory(descriptor)), Arena(map_memory(descriptor))
    finally:
        os.close(descriptor)


def workers_end() -> tuple[Arena, BlackBox]:
    """Return what a request lane is given of the memory."""
    descriptor = shared_memory()
    try:
        memory = map_memory(descriptor)
        return Arena(memory), BlackBox(memory)
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


def deliver(channel: Channel, data: bytes) -> None:
    """Let ``data`` arrive, in pieces as large as the channel has room for."""
    rest = memoryview(data)
    while rest:
        buffer = channel.get_buffer(-1)
        count = min(len(buffer), len(rest))
        buffer[:count] = rest[:count]
        channel.buffer_updated(count)
        rest = rest[count:]
