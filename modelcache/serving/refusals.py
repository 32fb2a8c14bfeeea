"""Requests that are refused before an app sees them."""

from __future__ import annotations

import json
from http import HTTPStatus


class RefusedError(Exception):
    """Stops the parser at a request that is understood, and not taken."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason

    def answer(self) -> bytes:
        """Return the answer, which is the connection's last, in words that clients of both protocols read."""
        body = json.dumps({"error": self.reason, "message": self.reason}).encode()
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + body
