"""A lane as the parent sees it: an ``asyncio.Protocol`` that writes and reads frames.

Writes are coalesced: the first frame of a loop tick goes out at once, for the sake of the lone caller, and what
follows in the same tick leaves in one write at its end. What is large does not wait that long: only what the transport
holds counts towards back-pressure.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from struct import Struct

_HIGH_WATER = 1 << 20
_OUTBOX_LIMIT = 256 << 10
"""Bytes that wait for the end of the tick at most: below the high-water mark, to which only written bytes count."""


class Channel(asyncio.Protocol, ABC):
    """One end of a lane. ``header`` is the layout of what arrives; ``lost`` is called once when it ends."""

    def __init__(self, header: Struct, lost: Callable[[], None]) -> None:
        self._header = header
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._corked = False
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._partial = bytearray()
        self._wanted = header.size
        self._writable: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport

    @property
    def closed(self) -> bool:
        """True once nothing can be sent any more."""
        return self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start (called by the loop)."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no instance of it
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop's signature
        """Report the end of the other side (called by the loop)."""
        self.resume_writing()
        self._lost()

    def send(self, frame: bytes) -> None:
        """Write ``frame`` at the latest at the end of this tick, without waiting; in vain once the lane has ended."""
        if self._corked:
            self._outbox.append(frame)
            self._outbox_bytes += len(frame)
            if self._outbox_bytes > _OUTBOX_LIMIT:
                self._empty_outbox()
            return
        self.cork()
        self._write(frame)

    def cork(self) -> None:
        """Hold back what is sent until the end of this tick, to let it leave in one write."""
        if not self._corked:
            self._corked = True
            self._loop.call_soon(self._uncork)

    def _uncork(self) -> None:
        self._corked = False
        if self._outbox:
            self._empty_outbox()

    def _empty_outbox(self) -> None:
        frames, self._outbox, self._outbox_bytes = self._outbox, [], 0
        self._write(b"".join(frames))

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():  # uvloop raises, asyncio warns
            self._transport.write(data)

    # Back-pressure towards the worker: its socket is full, and it is busy

    def pause_writing(self) -> None:
        """Make :meth:`writable` wait (called by the loop)."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """Let :meth:`writable` return (called by the loop)."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    @property
    def congested(self) -> bool:
        """True while the worker has not taken enough of what was sent."""
        return self._writable is not None

    async def writable(self) -> None:
        """Wait until the worker has taken enough of what was sent."""
        while self._writable is not None:
            await asyncio.shield(self._writable)

    # Frames from the worker

    def data_received(self, data: bytes) -> None:
        """Take the frames apart (called by the loop)."""
        if self._partial:
            self._partial += data
            if len(self._partial) < self._wanted:
                return
            data, self._partial = bytes(self._partial), bytearray()
        taken = self._take_frames(data)
        if taken < len(data):
            self._partial += memoryview(data)[taken:]

    def _take_frames(self, data: bytes) -> int:
        """Handle the complete frames in ``data``; return where the incomplete one begins."""
        unpack, header_size = self._header.unpack_from, self._header.size
        start, size, self._wanted = 0, len(data), header_size
        while size - start >= header_size:
            header = unpack(data, start)
            end = start + header_size + header[0]
            if end > size:
                self._wanted = end - start
                break
            self.frame_received(header, data, start + header_size, end)
            start = end
        return start

    @abstractmethod
    def frame_received(self, header: tuple[Any, ...], data: bytes, start: int, end: int) -> None:
        """Handle one frame, whose payload is ``data[start:end]``."""

    def close(self) -> None:
        """End the lane; the worker takes it as the order to leave."""
        self._transport.abort()
