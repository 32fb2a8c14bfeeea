"""Downloads: all bytes of one version, in order, whatever happens to the connections."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conftest import settle
from modelcache import ArtifactChangedError, StoreAccessDeniedError, StoreUnavailableError
from modelcache.stores.backoff import Backoff
from modelcache.stores.downloading import Download, Parallel

DATA = bytes(range(256)) * 40
BROKEN = StoreUnavailableError("reset", retry_after=2.0)


class Origin:
    """Hands out bodies of ``data``, and counts those that are open.

    ``faults`` maps a position to what happens there, once each: an error to raise, or b"" to end early.
    """

    def __init__(self, data: bytes = DATA, *, chunk: int = 100, **faults: Any) -> None:
        self.data, self.chunk = data, chunk
        self.faults: dict[int, list[Any]] = {}
        self.opened: list[tuple[int, int | None]] = []
        self.open = 0
        self.most_open = 0
        self.pauses: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()

    def body(self, start: int = 0, stop: int | None = None) -> OriginBody:
        self.opened.append((start, stop))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        return OriginBody(self, start, len(self.data) if stop is None else stop)

    async def open_range(self, start: int, stop: int | None) -> OriginBody:
        refusal = self.faults.get(-1)
        if refusal:
            raise refusal.pop(0)
        return self.body(start, stop)

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def download(self, *, size: int | None = len(DATA), checksum: Any = None, **parallel: int) -> Download:
        backoff = Backoff(draw=lambda: 0.5, pause=self.pause)
        return Download(
            self.body(), self.open_range,
            name="m", size=size, backoff=backoff, checksum=checksum, parallel=Parallel(**parallel),
        )  # fmt: skip


class OriginBody:
    def __init__(self, origin: Origin, at: int, stop: int) -> None:
        self.origin, self.at, self.stop = origin, at, stop
        self.closed = False

    async def read(self) -> bytes:
        assert not self.closed
        if self.at:
            await self.origin.gate.wait()
        if faults := self.origin.faults.get(self.at):
            fault = faults.pop(0)
            if isinstance(fault, bytes):
                return fault
            raise fault
        end = min(self.at + self.origin.chunk, self.stop)
        chunk, self.at = self.origin.data[self.at : end], end
        return chunk

    async def aclose(self) -> None:
        self.origin.open -= not self.closed
        self.closed = True


async def read(download: Download) -> bytes:
    try:
        return b"".join([chunk async for chunk in download])
    finally:
        await download.aclose()


@pytest.mark.parametrize("size", [len(DATA), None])
async def test_a_body_is_delivered(size: int | None) -> None:
    """One request, nothing asked for again, the body closed."""
    origin = Origin()
    assert await read(origin.download(size=size)) == DATA
    assert origin.opened == [(0, None)]
    assert (origin.open, origin.pauses) == (0, [])


async def test_an_empty_object_is_delivered() -> None:
    """No bytes are no failure if none were announced."""
    origin = Origin(b"")
    assert await read(origin.download(size=0)) == b""
    assert origin.opened == [(0, None)]


@pytest.mark.parametrize("fault", [BROKEN, b""], ids=["breaks", "ends early"])
async def test_a_broken_body_is_resumed_where_it_broke(fault: Any) -> None:
    """S1: no byte is asked for twice, and bytes in between forgive earlier breaks."""
    origin = Origin()
    origin.faults = {at: [fault] for at in range(100, 2000, 100)}
    assert await read(origin.download()) == DATA
    assert origin.opened[:3] == [(0, None), (100, len(DATA)), (200, len(DATA))]
    assert len(origin.pauses) == 19
    assert origin.open == 0


async def test_a_body_without_a_size_is_resumed() -> None:
    """A server that streams has announced no size; a break is told by the connection."""
    origin = Origin()
    origin.faults = {500: [BROKEN]}
    assert await read(origin.download(size=None)) == DATA
    assert origin.opened == [(0, None), (500, None)]


async def test_breaks_in_a_row_end_a_download() -> None:
    """S1: pauses double with full jitter up to what was asked for; the fifth break at one byte is final, and told."""
    origin = Origin()
    origin.faults = {300: [StoreUnavailableError("reset"), *[StoreUnavailableError("reset")] * 3, BROKEN]}
    with pytest.raises(
        StoreUnavailableError, match="of m broke off at byte 300 of 10,240, 5 times in a row: reset"
    ) as e:
        await read(origin.download())
    assert origin.pauses == [0.05, 0.1, 0.2, 0.4]
    assert (e.value.model, e.value.retry_after, e.value.__cause__) == ("m", 2.0, BROKEN)
    assert origin.open == 0


async def test_retry_after_is_heeded_within_reason() -> None:
    """S1: a store that asks for patience gets it, and one that asks for minutes is reported at once."""
    origin = Origin()
    origin.faults = {300: [BROKEN], 400: [StoreUnavailableError("later", retry_after=600.0)]}
    with pytest.raises(StoreUnavailableError, match="later") as error:
        await read(origin.download())
    assert origin.pauses == [2.0]
    assert error.value.retry_after == 600


@pytest.mark.parametrize("error", [ArtifactChangedError("changed"), StoreAccessDeniedError("no")])
async def test_what_the_store_says_of_a_range_is_final(error: Exception) -> None:
    """A4: a store tries by itself to open a range; that the object has changed, or is refused, ends the download."""
    origin = Origin()
    origin.faults = {300: [BROKEN], -1: [error]}
    with pytest.raises(type(error)) as raised:
        await read(origin.download())
    assert raised.value is error
    assert origin.open == 0


async def test_more_than_was_announced_is_an_error() -> None:
    """A4: bytes beyond the announced size are never passed on."""
    origin = Origin()
    with pytest.raises(StoreUnavailableError, match="more of m than the 1,000 bytes it announced"):
        await read(origin.download(size=1000))
    assert origin.open == 0


async def test_a_download_that_nobody_reads_is_closed() -> None:
    """The connection that the fetch has opened is let go of although nothing was read; closing twice is harmless."""
    origin = Origin()
    download = origin.download()
    assert origin.open == 1
    await download.aclose()
    await download.aclose()
    assert origin.open == 0
    with pytest.raises(StopAsyncIteration):
        await anext(download)


@pytest.mark.parametrize("right", [True, False])
async def test_an_announced_checksum_is_checked(right: bool) -> None:
    """A4: over all bytes, across breaks, before the end is told."""

    class Sum:
        got = b""

        def update(self, chunk: bytes) -> None:
            self.got += chunk

        def check(self) -> None:
            assert self.got == DATA
            if not right:
                raise StoreUnavailableError("damaged")

    origin = Origin()
    origin.faults = {500: [BROKEN]}
    if right:
        assert await read(origin.download(checksum=Sum())) == DATA
    else:
        with pytest.raises(StoreUnavailableError, match="damaged"):
            await read(origin.download(checksum=Sum()))


# In parts

PARTS = {"threshold": 5000, "part": 1000, "ahead": 3}


@pytest.mark.parametrize("size", [5000, 5001, 6050, 10_240])
async def test_a_large_object_is_fetched_in_parts(size: int) -> None:
    """The first answer brings the first part, the others are fetched beside it and delivered in order."""
    origin = Origin(DATA[:size])
    assert await read(origin.download(size=size, **PARTS)) == DATA[:size]
    ranges = [(at, min(at + 1000, size)) for at in range(1100, size, 1000)]
    assert origin.opened == [(0, None), *ranges]
    assert (origin.open, origin.pauses) == (0, [])


async def test_an_object_below_the_threshold_is_one_request() -> None:
    """A small object is never worth a second request."""
    origin = Origin()
    assert await read(origin.download(**{**PARTS, "threshold": len(DATA) + 1})) == DATA
    assert len(origin.opened) == 1


async def test_the_bytes_held_are_bounded() -> None:
    """A consumer that stops reading makes the download stop too, after the parts that it may hold."""
    origin = Origin()
    download = origin.download(**PARTS)
    assert len(await anext(download)) == 100
    await settle()
    assert len(origin.opened) == 1, "nothing is fetched ahead while the first chunk is looked into"
    await anext(download)
    await settle(100)
    assert origin.opened == [(0, None), (1100, 2100), (2100, 3100), (3100, 4100)]
    assert b"".join([chunk async for chunk in download]) == DATA[200:]
    assert origin.most_open <= 4


async def test_a_part_that_breaks_is_resumed() -> None:
    """S1: each part goes on from where it broke, the order stays."""
    origin = Origin()
    origin.faults = {500: [BROKEN], 2300: [BROKEN, b""], 9200: [b""]}
    assert await read(origin.download(**PARTS)) == DATA
    assert {(500, 1100), (2300, 3100)} < set(origin.opened)
    assert (origin.open, len(origin.pauses)) == (0, 4)


async def test_a_part_that_fails_ends_the_download() -> None:
    """A4: a change that is noticed between two parts is told, and nothing of the others is left."""
    origin = Origin()
    origin.faults = {-1: [ArtifactChangedError("changed")]}
    parallel = Parallel(**PARTS)
    download = Download(
        origin.body(), origin.open_range, name="m", size=len(DATA), backoff=Backoff(), parallel=parallel
    )
    with pytest.raises(ArtifactChangedError):
        await read(download)
    assert (origin.open, parallel.places) == (0, 2)


async def test_closing_ends_the_parts_at_once() -> None:
    """F11: connections and tasks of a download that is given up are gone when it is closed."""
    origin = Origin()
    download = origin.download(**PARTS)
    await anext(download)
    origin.gate.clear()
    tasks = asyncio.all_tasks()
    reading = asyncio.create_task(read(download))
    await settle()
    assert origin.open == 4
    assert len(asyncio.all_tasks()) == len(tasks) + 4
    reading.cancel()
    await asyncio.wait([reading])
    assert origin.open == 0
    assert asyncio.all_tasks() == tasks
    with pytest.raises(StopAsyncIteration):
        await anext(download)


async def test_places_are_shared() -> None:
    """Two downloads are fetched in parts at a time; a third begins to be when one of them has ended."""
    parallel = Parallel(**PARTS)
    origins = [Origin() for _ in range(3)]
    downloads = [
        Download(origin.body(), origin.open_range, name="m", size=len(DATA), backoff=Backoff(), parallel=parallel)
        for origin in origins
    ]
    for download in downloads:
        await anext(download)
        await anext(download)
    await settle()
    assert [len(origin.opened) for origin in origins] == [4, 4, 1]
    assert b"".join([chunk async for chunk in downloads[0]]) == DATA[200:]
    assert parallel.places == 1, "a download that is read to its end has given its place back"
    assert await read(downloads[2]) == DATA[200:]
    assert len(origins[2].opened) == 11
    await downloads[1].aclose()
    assert parallel.places == 2
