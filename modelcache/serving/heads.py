"""The head of an answer leaves with the first of its body.

uvicorn writes them one after the other. Each is a packet, since small ones are not to be delayed, with a system call on
either side, and the client is woken up by the head, in which there is nothing for it to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio


class HeadHolder:
    """The transport of one answer: keeps what is written first until more is, or until the end of the tick."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self._begun = False

    def write(self, data: bytes) -> None:
        """Send ``data``, sooner or later."""
        if self._begun:
            head, self._head = self._head, b""
            self._transport.write(head + data if head else data)
        else:
            self._begun, self._head = True, data
            self._loop.call_soon(self._release)

    def close(self) -> None:
        """End the connection behind what was written."""
        self._release()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _release(self) -> None:
        if self._head:
            self.write(b"")
