"""The body of a request: whole, decompressed, and never more of it than the limit."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING

from modelcache.serving.errors import PayloadTooLargeError, RequestError, UnsupportedMediaTypeError

if TYPE_CHECKING:
    from starlette.requests import Request

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_MOST_OF_A_COMMAND = 1 << 14
"""Bytes: two names of a thousand characters, each of half a dozen bytes as JSON may write it, and a little more."""
_CODINGS = frozenset({"gzip", "x-gzip", "deflate"})
_PIECE = 4 << 10
"""Bytes that are expanded at a time; those of the largest body that is expanded on the event loop."""


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of ``request``; neither what is sent nor what it expands to may exceed ``limit`` bytes.

    Raises PayloadTooLargeError, UnsupportedMediaTypeError for a content coding other than gzip and deflate, and
    RequestError for bytes that are not what the coding says.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in _CODINGS and coding != "identity":
        raise UnsupportedMediaTypeError(f"Content-Encoding {coding!r} is not read. Send identity, gzip or deflate.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    if coding == "identity":
        return bytes(body)
    if len(body) <= _PIECE:
        return _decompress(body, coding, limit)
    # Not by anyio, whose limit of threads does not count those that are abandoned.
    return await asyncio.to_thread(_decompress, body, coding, limit)


async def read_command(request: Request, limit: int) -> bytes:
    """Return the body of a request that manages models: some KiB at most, as they are parsed on the event loop."""
    return await read_body(request, min(limit, _MOST_OF_A_COMMAND))


def _decompress(body: bytearray, coding: str, limit: int) -> bytes:
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
