"""The head of an answer leaves with the first of its body.

uvicorn writes them one after the other. Each is a packet, since small ones are not to be delayed, with a system call on
either side, and the client is woken up by the head, in which there is nothing for it to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

_GO_ON = b"HTTP/1.1 100 "
"""How what is no answer yet begins."""
_COPIED = 64 << 10
"""Bytes of a body that are copied to travel with the head."""


class HeadHolder:
    """The transport of one answer: keeps its head until some of the body is there, or until the end of the tick.

    Whoever writes past it, or ends the connection, calls ``release`` before.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self._begun = False

    def write(self, data: bytes) -> None:
        """Send ``data``, sooner or later."""
        if not self._begun and not data.startswith(_GO_ON):
            self._begun, self._head = True, data
            self._loop.call_soon(self.release)
        elif self._head and len(data) <= _COPIED:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        else:
            self.release()
            self._transport.write(data)

    def release(self) -> None:
        """Send what is kept."""
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)

    def close(self) -> None:
        """End the connection behind what was written."""
        self.release()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
