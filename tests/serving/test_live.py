"""The server that the tests of serving use."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serving import live

if TYPE_CHECKING:
    from starlette.requests import Request


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"hello {request.query_params['name']}")


def get(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:
        return bytes(response.read())


async def test_an_app_is_served_on_a_free_port() -> None:
    """Two apps are served at once, and a client that blocks is answered from a thread."""
    app = Starlette(routes=[Route("/hello", hello)])
    async with live.serving(app) as one, live.serving(app) as other:
        assert one != other
        assert await asyncio.to_thread(get, f"{one}/hello?name=a") == b"hello a"
        assert await asyncio.to_thread(get, f"{other}/hello?name=b") == b"hello b"
