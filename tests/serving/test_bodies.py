"""Bodies of requests: whole, decompressed, bounded."""

from __future__ import annotations

import gzip
import random
import zlib
from threading import get_ident
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from starlette.requests import ClientDisconnect, Request

from modelcache.serving.bodies import read_body, receive_body
from modelcache.serving.errors import PayloadTooLargeError, RequestError, UnsupportedMediaTypeError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

TEXT = b"1990,3047,5\n" * 100
GZIPPED = gzip.compress(TEXT, mtime=0)


def request_of(*chunks: bytes, **headers: str) -> Request:
    """Return a request whose body arrives in ``chunks``."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": named}, receive)


async def test_a_body_is_read_whole() -> None:
    """However many chunks it comes in."""
    assert await read_body(request_of(TEXT[:5], TEXT[5:]), len(TEXT)) == TEXT


async def test_a_body_of_one_piece_is_not_copied() -> None:
    """As most are: it may be some megabytes."""

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": TEXT}

    assert await receive_body(receive, {}, len(TEXT)) is TEXT


async def test_a_client_that_goes_in_the_middle_of_its_body_is_not_answered() -> None:
    """Half a body is none."""
    messages: list[MutableMapping[str, Any]] = [
        {"type": "http.request", "body": TEXT, "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0)

    with pytest.raises(ClientDisconnect):
        await receive_body(receive, {}, 2 * len(TEXT))


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", GZIPPED),
        (" X-GZIP ", gzip.compress(TEXT[:7], mtime=0) + gzip.compress(TEXT[7:], mtime=0)),
        ("deflate", zlib.compress(TEXT)),
        ("identity", TEXT),
    ],
    ids=["gzip", "two members", "deflate", "identity"],
)
async def test_a_compressed_body_is_expanded(coding: str, body: bytes) -> None:
    """Both codings that clients use, in one member or several."""
    assert await read_body(request_of(body, content_encoding=coding), len(TEXT)) == TEXT


class Zlib:
    """Notes in which threads, and how many bytes, zlib is fed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed = 0
        self.threads: set[int] = set()
        self._real = zlib.decompressobj
        monkeypatch.setattr(zlib, "decompressobj", self._make)

    def _make(self, *arguments: Any) -> Mock:
        inflate = self._real(*arguments)
        noting = Mock(wraps=inflate, eof=False)

        def decompress(data: bytes, most: int) -> bytes:
            self.fed += len(data)
            self.threads.add(get_ident())
            expanded = inflate.decompress(data, most)
            noting.eof, noting.unused_data = inflate.eof, inflate.unused_data
            return expanded

        noting.decompress = decompress
        return noting


async def test_members_cost_the_same_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many members are twice the work: what is behind a member is not copied to its end for each of them."""
    work = []
    for count in (2_048, 4_096):
        spy = Zlib(monkeypatch)
        assert await read_body(request_of(zlib.compress(b"") * count, content_encoding="deflate"), 1 << 16) == b""
        monkeypatch.undo()
        work.append(spy.fed)
    assert work[1] == 2 * work[0]


async def test_a_large_body_is_not_expanded_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are served meanwhile; a small one is not worth a thread."""
    spy, text = Zlib(monkeypatch), random.Random(1).randbytes(8 << 10)
    for size, here in ((1 << 10, True), (8 << 10, False)):
        spy.threads.clear()
        request = request_of(zlib.compress(text[:size]), content_encoding="deflate")
        assert await read_body(request, 1 << 16) == text[:size]
        assert (spy.threads == {get_ident()}) is here


@pytest.mark.parametrize("compressed", [False, True])
async def test_a_body_above_the_limit_is_refused(compressed: bool) -> None:
    """A bomb is not expanded beyond the limit."""
    bomb = gzip.compress(bytes(1 << 20)) if compressed else bytes(1 << 20)
    request = request_of(bomb, content_encoding="gzip" if compressed else "identity")
    with pytest.raises(PayloadTooLargeError, match=r"more than 65,536 bytes"):
        await read_body(request, 1 << 16)


async def test_a_length_above_the_limit_is_refused_before_anything_is_read() -> None:
    """What is announced need not be received."""
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"101")]})
    with pytest.raises(PayloadTooLargeError):
        await read_body(request, 100)


@pytest.mark.parametrize(
    ("coding", "body", "error", "match"),
    [
        ("br", TEXT, UnsupportedMediaTypeError, "'br' is not read. Send identity, gzip or deflate"),
        ("gzip", TEXT, RequestError, "said to be compressed by gzip, and is not"),
        ("gzip", GZIPPED[:-9], RequestError, "ends in the middle"),
        ("gzip", GZIPPED + b"garbage", RequestError, "is not"),
    ],
    ids=["another coding", "not compressed", "truncated", "garbage behind it"],
)
async def test_a_body_that_is_not_what_it_says_is_refused(
    coding: str, body: bytes, error: type[Exception], match: str
) -> None:
    """It is the client's mistake."""
    with pytest.raises(error, match=match):
        await read_body(request_of(body, content_encoding=coding), 1 << 20)
