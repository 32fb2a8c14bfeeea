"""What a network and a struggling server do to S3Store: the right bytes or a typed error, in time, and nothing left."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest

import oracle
from modelcache import Artifact, ArtifactChangedError, StoreUnavailableError
from modelcache.stores.backoff import Backoff
from modelcache.stores.downloading import Parallel
from servers import s3
from servers.fault_proxy import FaultProxy, answer, call, cut, rewrite, slow_down, stall, truncate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from modelcache import NotModified, S3Store
    from servers.fault_proxy import Fault, Head

SMALL, LARGE = bytes(range(256)) * 12, bytes(range(251)) * 16_000
"""3 KB, and 4 MB, which no buffer on the way holds."""
OTHER = bytes(reversed(LARGE))
WHOLE, PARTS = Parallel(), Parallel(threshold=1_000_000, part=500_000)


@pytest.fixture(scope="module")
def bucket(rclone: s3.S3Server) -> str:
    return s3.fill(rclone, {"small.ubj": SMALL, "large.ubj": LARGE, "both.tar.gz": LARGE, "both.ubj": LARGE})


@pytest.fixture
async def proxy(rclone: s3.S3Server, pauses: list[float]) -> AsyncIterator[FaultProxy]:
    """Between a store and rclone. After the test, no connection, task or descriptor is left."""
    descriptors = oracle.open_descriptors()
    async with FaultProxy(rclone.url) as proxy:
        yield proxy
        await proxy.quiet()
    gc.collect(1)  # the young: an answer that was dropped with its connection complains here
    assert oracle.open_descriptors() <= descriptors
    oracle.check_no_tasks_left()


@pytest.fixture(params=["first call", "later call"])
async def store(
    request: pytest.FixtureRequest, proxy: FaultProxy, bucket: str, open_s3: s3.Open
) -> AsyncIterator[S3Store]:
    """One that has asked for nothing, or has learnt how boto's client asks, and does so by itself."""
    stalls = "how" in request.fixturenames and request.node.callspec.params["how"] in ("stalls", "no answer")
    store = impatient(open_s3(proxy, bucket, read_timeout=0.3 if stalls else 20.0))
    if request.param == "later call":
        await read(await store.fetch("small.ubj"))
        proxy.requests.clear()
    yield store
    await store.close()


def impatient(store: S3Store, parallel: Parallel = WHOLE) -> S3Store:
    store._backoff = Backoff(draw=lambda: 0.0)
    store._parallel = parallel
    return store


async def read(artifact: Artifact | NotModified) -> bytes:
    assert isinstance(artifact, Artifact)
    try:
        return b"".join([chunk async for chunk in artifact.chunks])
    finally:
        await close(artifact)


async def close(artifact: Artifact) -> None:
    chunks: Any = artifact.chunks
    await chunks.aclose()


def of_range(request: Head) -> bool:
    return "range" in request


# A body that breaks

BREAKS: dict[str, Callable[[int], Fault]] = {
    "is cut": lambda at: cut(after=at),
    "is reset": lambda at: cut(after=at, reset=True),
    "stalls": lambda at: stall(after=at),
}


@pytest.mark.parametrize("parallel", [WHOLE, PARTS], ids=["whole", "in parts"])
@pytest.mark.parametrize("how", BREAKS)
async def test_a_body_that_breaks_goes_on(proxy: FaultProxy, store: S3Store, how: str, parallel: Parallel) -> None:
    """S1: from the byte where it broke, whether in the first answer or in one that goes on; the bytes are right."""
    impatient(store, parallel)
    for name, data in (("small.ubj", SMALL), ("large.ubj", LARGE)):
        proxy.next(BREAKS[how](1000))
        proxy.next(BREAKS[how](500), when=of_range)
        assert await read(await store.fetch(name)) == data
        assert len([request for request in proxy.requests if of_range(request)]) >= 2
        proxy.requests.clear()


async def test_a_body_that_always_breaks_is_given_up(proxy: FaultProxy, store: S3Store) -> None:
    """S1: five times in a row without a byte; the error says at which byte and why."""
    proxy.next(cut(after=1000))
    proxy.next(cut(after=0), when=of_range, times=None)
    with pytest.raises(StoreUnavailableError, match=r"small\.ubj broke off at byte 1,000 of 3,072, 5 times in"):
        await read(await store.fetch("small.ubj"))
    assert len(proxy.requests) == 5


async def test_a_body_that_was_shortened_on_the_way_is_noticed(proxy: FaultProxy, store: S3Store) -> None:
    """A4: the length is as announced, and only the checksum tells."""
    proxy.next(truncate(to=1000))
    with pytest.raises(StoreUnavailableError, match=r"small\.ubj was damaged on its way"):
        await read(await store.fetch("small.ubj"))


# A request that fails

FAILURES: dict[str, Callable[[], Fault]] = {
    "connection cut": lambda: cut(after=None),
    "connection reset": lambda: cut(after=None, reset=True),
    "no answer": stall,
    "500": lambda: answer(500),
    "503 SlowDown": slow_down,
}


@pytest.mark.parametrize("how", FAILURES)
async def test_a_request_that_fails_is_made_again(
    proxy: FaultProxy, store: S3Store, how: str, pauses: list[float]
) -> None:
    """S1: the caller never hears of it, be it the first request or one for a range. aiohttp repeats some by itself."""
    proxy.next(FAILURES[how](), times=2)
    proxy.next(cut(after=1000))
    proxy.next(FAILURES[how](), when=of_range)
    assert await read(await store.fetch("small.ubj")) == SMALL
    assert len(proxy.requests) >= 5
    assert len(pauses) in ((1, 2) if "connection" in how else (3,))


@pytest.mark.parametrize("how", FAILURES)
async def test_a_store_that_is_down_is_a_typed_error(proxy: FaultProxy, store: S3Store, how: str) -> None:
    """S1: after as many attempts as were asked for."""
    proxy.next(FAILURES[how](), times=None)
    with pytest.raises(StoreUnavailableError) as raised:
        await store.fetch("small.ubj")
    assert raised.value.model == "small.ubj"
    assert len(proxy.requests) == (8 if "connection" in how else 4)  # aiohttp repeats each at once
    proxy.clear()
    assert await read(await store.fetch("small.ubj")) == SMALL


async def test_retry_after_is_heeded_and_reported(proxy: FaultProxy, store: S3Store, pauses: list[float]) -> None:
    """S1: as a pause where it is short, and to the caller in any case."""
    proxy.next(slow_down(retry_after=7), times=3)
    assert await read(await store.fetch("small.ubj")) == SMALL
    assert pauses == [7.0, 7.0, 7.0]
    proxy.next(slow_down(retry_after=600), times=4)
    with pytest.raises(StoreUnavailableError, match="503 SlowDown") as raised:
        await store.fetch("small.ubj")
    assert raised.value.retry_after == 600
    assert max(pauses) == 7.0


# An object that changes


@pytest.mark.parametrize("parallel", [WHOLE, PARTS], ids=["whole", "in parts"])
@pytest.mark.parametrize("becomes", [OTHER, None], ids=["replaced", "deleted"])
@pytest.mark.parametrize("server", ["rclone", "moto"], indirect=True)
async def test_an_object_that_changes_between_two_ranges_is_noticed(
    server: s3.S3Server, open_s3: s3.Open, parallel: Parallel, becomes: bytes | None
) -> None:
    """A4: bytes of two versions are never mixed, also by a server that knows no If-Match, as rclone."""
    place = s3.fill(server, {"m.ubj": LARGE})

    def change() -> None:
        if becomes is None:
            server.client.delete_object(Bucket=place, Key="m.ubj")
        else:
            server.put(place, "m.ubj", becomes)

    async with FaultProxy(server.url) as proxy:
        store = impatient(open_s3(proxy, place), parallel)
        proxy.next(cut(after=900_000))
        proxy.next(call(lambda: asyncio.to_thread(change)), when=of_range)
        with pytest.raises(ArtifactChangedError, match=r"m\.ubj was replaced or deleted while it was read") as raised:
            await read(await store.fetch("m.ubj"))
        assert raised.value.model == "m.ubj"
        await store.close()
        await proxy.quiet()


async def test_a_version_is_read_to_its_end(moto: s3.S3Server, open_s3: s3.Open) -> None:
    """A4: in a bucket with versions, what is replaced meanwhile goes on being that which was begun."""
    place = s3.fill(moto, {"m.ubj": LARGE}, versions=True)
    async with FaultProxy(moto.url) as proxy:
        store = impatient(open_s3(proxy, place))
        proxy.next(cut(after=900_000))
        proxy.next(call(lambda: asyncio.to_thread(moto.put, place, "m.ubj", OTHER)), when=of_range)
        assert await read(await store.fetch("m.ubj")) == LARGE
        assert await read(await store.fetch("m.ubj")) == OTHER
        await store.close()


async def test_a_server_that_answers_with_other_bytes_is_found_out(proxy: FaultProxy, store: S3Store) -> None:
    """A4: what is delivered for a range is believed only where it says that it is that range."""
    for wrong in ("bytes 0-3071/3072", "bytes 1000-2000/3072", None):
        proxy.next(cut(after=1000))
        proxy.next(rewrite(answer={"Content-Range": wrong}), when=of_range)
        with pytest.raises(StoreUnavailableError, match="asked for the bytes from 1,000 on"):
            await read(await store.fetch("small.ubj"))


# Large objects


async def test_a_large_object_is_fetched_in_parts(proxy: FaultProxy, store: S3Store) -> None:
    """A few ranges at a time, each of the same version."""
    impatient(store, PARTS)
    assert await read(await store.fetch("large.ubj")) == LARGE
    ranges = [request.get("range") for request in proxy.requests if of_range(request)]
    assert len(ranges) in (7, 8)
    assert all(request.get("if-match") for request in proxy.requests if of_range(request))


# Giving up


@pytest.mark.parametrize("parallel", [WHOLE, PARTS], ids=["whole", "in parts"])
@pytest.mark.parametrize("chunks", [0, 1, 3])
async def test_a_consumer_that_stops_leaves_no_connection(
    proxy: FaultProxy, store: S3Store, parallel: Parallel, chunks: int
) -> None:
    """S4: what has not been read to its end is closed at once, while the store stays open."""
    impatient(store, parallel)
    artifact = await store.fetch("large.ubj")
    assert isinstance(artifact, Artifact)
    for _ in range(chunks):
        await anext(artifact.chunks)
    assert proxy.open_connections >= 1
    await close(artifact)
    await proxy.quiet()


async def test_a_connection_is_used_again(proxy: FaultProxy, store: S3Store) -> None:
    """What has been read to its end leaves its connection to the next."""
    for _ in range(5):
        assert await read(await store.fetch("small.ubj")) == SMALL
    assert proxy.connections == 1


async def test_a_fetch_that_is_cancelled_leaves_no_connection(proxy: FaultProxy, store: S3Store) -> None:
    """F11: before an answer, and while one suffix has answered and another, which would win, has not."""
    await read(await store.fetch("small"))
    await store.close()
    await proxy.quiet()
    for name, answers in (("small.ubj", 0), ("both", 1)):
        proxy.statuses.clear()
        waiting = stall()
        proxy.next(waiting, when=lambda request: "both.ubj" not in request.target)
        fetch = asyncio.create_task(store.fetch(name))
        await waiting.reached.wait()
        while len(proxy.statuses) < answers:
            await asyncio.sleep(0)
        fetch.cancel()
        await asyncio.wait([fetch])
        assert fetch.cancelled()
        await proxy.quiet()
