"""The fault proxy does to a request what it was told, and passes on everything else unchanged."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web

import oracle
from servers.fault_proxy import FaultProxy, answer, call, cut, rewrite, slow_down, stall, truncate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_DATA = bytes(range(256)) * 1000


async def _serve(request: web.BaseRequest) -> web.StreamResponse:
    if request.method == "PUT":
        return web.Response(body=await request.read())
    if request.path == "/chunked":
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for start in range(0, len(_DATA), 10_000):
            await response.write(_DATA[start : start + 10_000])
        return response
    if request.path == "/unframed":
        return web.Response(body=_DATA, headers={"Connection": "close"})
    return web.Response(body=_DATA, headers={"X-Range": request.headers.get("Range", "")})


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    descriptors = oracle.open_descriptors()
    runner = web.ServerRunner(web.Server(_serve))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with FaultProxy(f"http://127.0.0.1:{runner.addresses[0][1]}") as proxy:
        yield proxy
    await runner.cleanup()
    await asyncio.sleep(0)
    oracle.check_no_tasks_left()
    assert oracle.open_descriptors() <= descriptors


@pytest.fixture
async def session(proxy: FaultProxy) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(proxy.url, timeout=aiohttp.ClientTimeout(10)) as session:
        yield session


async def _received(response: aiohttp.ClientResponse) -> bytes:
    """Return what arrives before the body breaks off."""
    data = bytearray()
    try:
        async for chunk in response.content.iter_any():
            data += chunk
    except aiohttp.ClientError:
        return bytes(data)
    raise AssertionError("the body did not break off")


@pytest.mark.parametrize("path", ["/sized", "/chunked", "/unframed"])
async def test_it_passes_on_what_nothing_is_scripted_for(
    proxy: FaultProxy, session: aiohttp.ClientSession, path: str
) -> None:
    """Bodies of any framing arrive whole, over one connection that is kept, and are counted."""
    for _ in range(3):
        async with session.get(path, headers={"Range": "bytes=5-"}) as response:
            assert await response.read() == _DATA
    assert [(head.method, head.target, head.get("range")) for head in proxy.requests] == [("GET", path, "bytes=5-")] * 3
    assert (proxy.connections, proxy.open_connections, proxy.statuses) == (1, 1, [200] * 3)


async def test_it_passes_on_bodies_of_requests(proxy: FaultProxy, session: aiohttp.ClientSession) -> None:
    """An upload arrives whole, chunked or sized, also from a client that waits for 100 Continue; HEAD has no body."""

    async def chunks() -> AsyncIterator[bytes]:
        yield _DATA[:1000]
        yield _DATA[1000:]

    async with session.put("/", data=_DATA, expect100=True) as response:
        assert await response.read() == _DATA
    async with session.put("/", data=chunks()) as response:
        assert await response.read() == _DATA
    async with session.head("/") as response:
        assert response.headers["Content-Length"] == str(len(_DATA))
    assert proxy.connections == 1


@pytest.mark.parametrize("path", ["/sized", "/chunked"])
async def test_it_cuts_a_body(proxy: FaultProxy, session: aiohttp.ClientSession, path: str) -> None:
    """By FIN exactly so many bytes arrive, by RST at most; the next request is served again."""
    proxy.next(cut(after=70_000))
    async with session.get(path) as response:
        assert await _received(response) == _DATA[:70_000]
    proxy.next(cut(after=70_000, reset=True))
    async with session.get(path) as response:
        assert len(await _received(response)) <= 70_000
    proxy.next(cut(after=None))
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await session.post(path)  # what aiohttp does not repeat by itself
    async with session.get(path) as response:
        assert await response.read() == _DATA


@pytest.mark.parametrize("path", ["/sized", "/chunked"])
async def test_it_truncates_a_body(proxy: FaultProxy, session: aiohttp.ClientSession, path: str) -> None:
    """A shorter body is framed as if it were whole, so that only a digest could tell."""
    proxy.next(truncate(to=70_000))
    async with session.get(path) as response:
        assert await response.read() == _DATA[:70_000]


async def test_it_stalls_until_it_is_released(proxy: FaultProxy, session: aiohttp.ClientSession) -> None:
    """Before the head, and after so many bytes of the body; nothing more comes until the test says so."""
    before, within = stall(), stall(after=1000)
    proxy.next(before, within)
    request = asyncio.create_task(session.get("/"))
    await before.reached.wait()
    assert not request.done()
    before.release()
    async with await request as response:
        assert await response.content.readexactly(1000) == _DATA[:1000]
        await within.reached.wait()
        within.release()
        assert await response.read() == _DATA[1000:]


async def test_a_client_that_leaves_during_a_stall_is_gone(proxy: FaultProxy) -> None:
    """What a test counts as open is what clients hold open, and a stall does not hide that."""
    fault = stall(after=1000)
    proxy.next(fault)
    async with aiohttp.ClientSession(proxy.url) as session, session.get("/"):
        await fault.reached.wait()
        assert proxy.open_connections == 1
        with pytest.raises(AssertionError, match="1 connections are still open"):
            await proxy.quiet(within=0)
    await proxy.quiet()
    assert proxy.open_connections == 0


async def test_it_answers_without_the_server(proxy: FaultProxy, session: aiohttp.ClientSession) -> None:
    """Scripted answers come in the order they were given, each for the requests that its rule agrees to."""
    proxy.next(slow_down(3), when=lambda request: request.get("range") == "bytes=0-")
    proxy.next(answer(500, b"broken", Retry_After="7"), times=2)
    for path, header, expected in (
        ("/a", {}, (500, "7", "broken")),
        ("/b", {"Range": "bytes=0-"}, (503, "3", "<Code>SlowDown</Code>")),
        ("/c", {}, (500, "7", "broken")),
        ("/d", {"Range": "bytes=0-"}, (200, None, "")),
    ):
        async with session.get(path, headers=header) as response:
            status, retry_after, text = expected
            assert (response.status, response.headers.get("Retry-After")) == (status, retry_after)
            assert text in (await response.read()).decode("latin-1")
    assert (proxy.connections, proxy.statuses) == (1, [500, 503, 500, 200])


async def test_it_calls_the_test_between_two_requests(proxy: FaultProxy, session: aiohttp.ClientSession) -> None:
    """The test can change the object before the server is asked for the next range."""
    seen: list[int] = []

    async def change() -> None:
        seen.append(len(proxy.statuses))

    proxy.next(call(change), call(lambda: seen.append(7)), when=lambda request: request.target == "/second")
    for path in ("/first", "/second", "/third"):
        async with session.get(path) as response:
            await response.read()
    assert seen == [1, 7]


async def test_it_rewrites_heads_for_as_long_as_it_is_told(proxy: FaultProxy, session: aiohttp.ClientSession) -> None:
    """A field can be removed from what the server sees, or put into what the client sees, until clear()."""
    proxy.next(rewrite(request={"range": None}, answer={"ETag": '"1"'}), times=None)
    for _ in range(2):
        async with session.get("/", headers={"Range": "bytes=5-"}) as response:
            assert (response.headers["X-Range"], response.headers["ETag"]) == ("", '"1"')
    proxy.clear()
    async with session.get("/", headers={"Range": "bytes=5-"}) as response:
        assert (response.headers["X-Range"], response.headers.get("ETag")) == ("bytes=5-", None)


async def test_a_script_that_fails_fails_the_test() -> None:
    """An error inside the proxy is raised at the end of its block, with what the client saw of it discarded."""

    def fail() -> None:
        raise KeyError("a mistake of the test")

    async def use_it() -> None:
        async with FaultProxy("http://127.0.0.1:1") as proxy, aiohttp.ClientSession(proxy.url) as session:
            proxy.next(call(fail))
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await session.post("/")

    with pytest.raises(BaseExceptionGroup) as caught:
        await use_it()
    assert caught.group_contains(KeyError, match="a mistake of the test")
