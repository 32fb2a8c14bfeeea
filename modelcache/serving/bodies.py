"""The body of a request: whole, decompressed, and never more of it than the limit."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from modelcache.serving.errors import PayloadTooLargeError, RequestError, UnsupportedMediaTypeError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Message, Receive, Scope

    Fields = dict[bytes, bytes]

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_MOST_OF_A_COMMAND = 1 << 14
"""Bytes: two names of a thousand characters, each of half a dozen bytes as JSON may write it, and a little more."""
_AS_IT_IS = "identity"
_CODINGS = frozenset({"gzip", "x-gzip", "deflate"})
_PIECE = 4 << 10
"""Bytes that are expanded at a time; those of the largest body that is expanded on the event loop."""


def fields_of(scope: Scope) -> Fields:
    """Return the header, by lower-case names; and of a field that comes twice the first, as Starlette does."""
    return dict(reversed(scope["headers"]))


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of ``request``, as `receive_body` does."""
    return await receive_body(request.receive, fields_of(request.scope), limit)


async def receive_body(receive: Receive, fields: Fields, limit: int) -> bytes:
    """Return the body behind ``fields``; neither what is sent nor what it expands to may exceed ``limit`` bytes.

    Raises PayloadTooLargeError, UnsupportedMediaTypeError for a content coding other than gzip and deflate,
    RequestError for bytes that are not what the coding says, and ClientDisconnect.
    """
    coding = _coding(fields)
    announced = fields.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    body = await _received(receive, limit)
    if coding == _AS_IT_IS:
        return body
    if len(body) <= _PIECE:
        return _decompress(body, coding, limit)
    # Not by anyio, whose limit of threads does not count those that are abandoned.
    return await asyncio.to_thread(_decompress, body, coding, limit)


async def read_command(request: Request, limit: int) -> bytes:
    """Return the body of a request that manages models: some KiB at most, as they are parsed on the event loop."""
    return await read_body(request, min(limit, _MOST_OF_A_COMMAND))


def _coding(fields: Fields) -> str:
    sent = fields.get(b"content-encoding")
    if sent is None:
        return _AS_IT_IS
    coding = sent.decode("latin-1").strip().lower()
    if coding not in _CODINGS and coding != _AS_IT_IS:
        raise UnsupportedMediaTypeError(f"Content-Encoding {coding!r} is not read. Send identity, gzip or deflate.")
    return coding


async def _received(receive: Receive, limit: int) -> bytes:
    """Return what the client sends; a body of one message, as most are, is not copied."""
    piece, more = _piece(await receive())
    body = bytearray(piece) if more else piece
    while len(body) <= limit:
        if not more:
            return bytes(body)
        piece, more = _piece(await receive())
        body += piece
    raise _too_large(limit)


def _piece(message: Message) -> tuple[bytes, bool]:
    """Return a part of the body, and whether there are more."""
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


def _decompress(body: bytes, coding: str, limit: int) -> bytes:
    """Expand ``body``, which may be several members in a row.

    It is fed piece by piece: at the end of each member zlib copies what is left of the piece.
    """
    expanded = bytearray()
    inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        for start in range(0, len(body), _PIECE):
            rest = bytes(body[start : start + _PIECE])
            while rest:
                if inflate.eof:
                    inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
                expanded += inflate.decompress(rest, limit + 1 - len(expanded))
                if len(expanded) > limit:
                    raise _too_large(limit)
                rest = inflate.unused_data
    except zlib.error as error:
        raise RequestError(f"The body is said to be compressed by {coding}, and is not: {error}.") from error
    if body and not inflate.eof:
        raise RequestError(f"The body, said to be compressed by {coding}, ends in the middle.")
    return bytes(expanded)


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"The body has more than {limit:,} bytes, which is the limit here. Send less in one request."
    )
