"""A lane as the parent sees it: an ``asyncio.BufferedProtocol`` that writes and reads frames.

Writes are coalesced: the first frame of a loop tick goes out at once, for the sake of the lone caller, and what
follows in the same tick leaves in one write at its end. After a tick of several the first waits as well: it would wake
the worker up for one call, with others right behind it. What is large does not wait that long: only what the transport
holds counts towards back-pressure.

What arrives is read into a buffer of ours: asyncio would make one of 256 KiB for each read.
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
_BUFFER = 256 << 10
"""Bytes that are read at once, unless one frame is larger."""


class Channel(asyncio.BufferedProtocol, ABC):
    """One end of a lane. ``header`` is the layout of what arrives; ``lost`` is called once when it ends."""

    def __init__(self, header: Struct, lost: Callable[[], None]) -> None:
        self._header = header
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._corked = False
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._frames = 0
        """Sent in this tick."""
        self._crowded = False
        """Several were sent in the last tick in which any were."""
        self._buffer = memoryview(bytearray(_BUFFER))
        self._filled = 0
        self._wanted = header.size
        """Bytes that make the frame at the front of the buffer complete, as far as is known."""
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
        self._frames += 1
        if self._corked:
            self._hold(frame)
            return
        self.cork()
        if self._crowded:
            self._hold(frame)
        else:
            self._write(frame)

    def _hold(self, frame: bytes) -> None:
        self._outbox.append(frame)
        self._outbox_bytes += len(frame)
        if self._outbox_bytes > _OUTBOX_LIMIT:
            self._empty_outbox()

    def cork(self) -> None:
        """Hold back what is sent until the end of this tick, to let it leave in one write."""
        if not self._corked:
            self._corked = True
            self._loop.call_soon(self._uncork)

    def _uncork(self) -> None:
        self._corked = False
        if self._frames:
            self._crowded, self._frames = self._frames > 1, 0
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

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the loop's signature
        """Return where the next bytes are to be written (called by the loop)."""
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take the frames apart (called by the loop)."""
        self._filled += nbytes
        if self._filled >= self._wanted:
            self._move_to_front(self._take_frames())

    def _take_frames(self, start: int = 0) -> int:
        """Handle the complete frames from ``start`` on; return where the incomplete one begins."""
        unpack, header_size, buffer = self._header.unpack_from, self._header.size, self._buffer
        filled, self._wanted = self._filled, header_size
        while filled - start >= header_size:
            header = unpack(buffer, start)
            end = start + header_size + header[0]
            if end > filled:
                self._wanted = end - start
                break
            self.frame_received(header, buffer, start + header_size, end)
            start = end
        return start

    def _move_to_front(self, start: int) -> None:
        """Keep what follows ``start``, the beginning of a frame, in a buffer that has room for all of it."""
        rest = self._buffer[start : self._filled]
        self._filled = len(rest)
        size = max(_BUFFER, self._wanted)
        if size != len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        if rest:
            self._buffer[: len(rest)] = rest  # also right where they overlap

    @abstractmethod
    def frame_received(self, header: tuple[Any, ...], data: memoryview, start: int, end: int) -> None:
        """Handle one frame, whose payload is ``data[start:end]`` until this returns."""

    def close(self) -> None:
        """End the lane; the worker takes it as the order to leave."""
        self._transport.abort()
