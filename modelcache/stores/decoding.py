"""Bytes that a server has compressed although it was asked not to."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Self

from modelcache.errors import StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from modelcache.stores.downloading import Download

CODINGS = frozenset({"gzip", "x-gzip", "deflate"})

_PIECE = 256 << 10
"""Bytes of one chunk, however much the next bytes of the download expand to."""
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_GZIP_MAGIC = b"\x1f\x8b"


class Decoded:
    """An async iterator over what the bytes of ``download`` were before they were compressed.

    ``is_archive``: what is expected is compressed itself. Servers that know files by their last suffix announce an
    archive's own compression as one for the transfer: if nothing compressed is below it, it is left as it is.
    """

    def __init__(self, download: Download, *, model: str | None, is_archive: bool) -> None:
        self._download = download
        self._model = model
        self._is_archive = is_archive
        self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._waiting = b""
        """Received, and not decompressed yet."""
        self._as_it_is: bool | None = None
        """None until it is known."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._as_it_is is None:
            self._as_it_is = self._is_archive and await self._below() != _GZIP_MAGIC
        while self._waiting or await self._receive():
            if piece := self._piece():
                return piece
        if piece := self._rest():
            return piece
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Let go of the download."""
        await self._download.aclose()

    async def _receive(self) -> bool:
        chunk = await anext(self._download, b"")
        self._waiting += chunk
        return bool(chunk)

    async def _below(self) -> bytes:
        """Return the first bytes, decompressed; what has been received for that goes on waiting."""
        below, seen, trial = b"", 0, zlib.decompressobj(_GZIP_OR_ZLIB)
        while len(below) < len(_GZIP_MAGIC) and await self._receive():
            below += self._decompress(trial, self._waiting[seen:], len(_GZIP_MAGIC) - len(below))
            seen = len(self._waiting)
        return below

    def _piece(self) -> bytes:
        """Return what the bytes that wait begin with, perhaps nothing yet."""
        if self._as_it_is:
            piece, self._waiting = self._waiting, b""
            return piece
        if self._inflate.eof:  # compressed in several members
            self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
        piece = self._decompress(self._inflate, self._waiting, _PIECE)
        self._waiting = self._inflate.unconsumed_tail or self._inflate.unused_data
        return piece

    def _rest(self) -> bytes:
        """Return what has been held back at the end of the download."""
        if self._as_it_is or self._inflate.eof:
            return b""
        piece = self._decompress(self._inflate, b"", _PIECE)
        if not piece and not self._inflate.eof:
            raise StoreUnavailableError(
                "The server compresses, and what it sent ends in the middle.", model=self._model
            )
        return piece

    def _decompress(self, inflate: zlib._Decompress, data: bytes, limit: int) -> bytes:
        try:
            return inflate.decompress(data, limit)
        except zlib.error as error:
            raise StoreError(
                f"The server says that it compresses, and sends something else: {error}.", model=self._model
            ) from error
