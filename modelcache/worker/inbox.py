"""What a lane has received, taken apart into frames."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from modelcache.pool import wire
from modelcache.worker.waiting import Arrival

if TYPE_CHECKING:
    from struct import Struct


class Inbox:
    """Bytes received and not yet taken apart; ``header`` is the layout of what begins a frame, the length first."""

    def __init__(self, sock: socket.socket, header: Struct) -> None:
        self._sock = sock
        self._header = header
        self._start = self._end = 0
        self._view = memoryview(bytearray(wire.PAYLOAD_LIMIT + (256 << 10)))
        self._wanted = header.size
        self._arrival = Arrival(sock)

    def fill(self, *, wait: bool, awake: bool = False) -> bool:
        """Receive what is there, waiting for the first byte if asked to, ``awake`` or not; False at end of file."""
        self._make_room()
        if wait:
            self._arrival.wait(awake=awake)
        try:
            received = self._sock.recv_into(self._view[self._end :], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        self._end += received
        return received > 0

    def frames(self) -> list[tuple[tuple[int, ...], memoryview]]:
        """Return the complete frames; their payloads are valid until the next ``fill``."""
        header_size, unpack = self._header.size, self._header.unpack_from
        found, start, end, view = [], self._start, self._end, self._view
        self._wanted = header_size
        while end - start >= header_size:
            header = unpack(view, start)
            after = start + header_size + header[0]
            if after > end:
                self._wanted = after - start
                break
            found.append((header, view[start + header_size : after]))
            start = after
        self._start = start
        return found

    def _make_room(self) -> None:
        """Move an incomplete frame to the front when the rest of it would not fit behind."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + self._wanted > len(self._view):
            rest = self._view[self._start : self._end]
            if self._wanted > len(self._view):
                self._view = memoryview(bytearray(self._wanted))
            self._view[: len(rest)] = rest  # also right where they overlap
            self._start, self._end = 0, len(rest)
