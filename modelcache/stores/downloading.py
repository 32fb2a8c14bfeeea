"""The bytes of one version of one object, in order, whatever happens to the connections that bring them.

A store opens a body and hands it to :class:`Download` with a way to open any range of the same version. A body that
breaks or stalls is replaced by one that starts at the byte where it broke. A large object is fetched in parts, a few at
a time: one connection to an object store brings far less than a network card takes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from modelcache.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self

    from modelcache.stores.backoff import Backoff

    OpenRange = Callable[[int, int | None], Awaitable["Body"]]
    """``await open_range(start, stop)`` returns a body with the bytes [start, stop), to the end if ``stop`` is None, of
    the version that the download is of. It tries again by itself where that helps, and raises ArtifactChangedError if
    the store has another version by now."""


class Body(Protocol):
    """The bytes that one request is answered with."""

    async def read(self) -> bytes:
        """Return what has come, at least one byte; b"" at the end.

        StoreUnavailableError means that the connection broke, stalled or ended early: the rest is asked for again.
        Every other error ends the download.
        """
        ...

    async def aclose(self) -> None:
        """Let go of the connection at once; one whose bytes have all been read stays in its pool. May be repeated."""
        ...


class Checksum(Protocol):
    """A checksum that the store has announced of all bytes."""

    def update(self, chunk: bytes) -> None:
        """Add the next bytes."""
        ...

    def check(self) -> None:
        """Raise StoreUnavailableError if the bytes are not those that were announced."""
        ...


@dataclass(slots=True, kw_only=True)
class Parallel:
    """When objects are fetched in parts; one for a whole store, as it bounds the bytes held to 2 x (3 + 1) x 4 MiB."""

    threshold: int = 16 << 20
    """Bytes from which on it pays: at 60 MB/s for each connection and 30 ms until it begins, 16 MB take half."""
    part: int = 4 << 20
    """Bytes of one request."""
    ahead: int = 3
    """Parts that are fetched, or wait, while one is delivered."""
    places: int = 2
    """Downloads that may still begin to do so: with more on their way than that, they are parallel among themselves."""


class Download:
    """An async iterator over all bytes of an object; ``body`` is the answer to a request for the whole of it.

    ``size`` is what the store announced, None if it did not: any other number of bytes is an error.
    """

    def __init__(
        self, body: Body, open_range: OpenRange, *, name: str, size: int | None, backoff: Backoff, parallel: Parallel,
        checksum: Checksum | None = None,
    ) -> None:  # fmt: skip
        self._checksum = checksum
        self._bytes: Body
        if size is None or size < parallel.threshold:
            self._bytes = _Stretch(open_range, 0, size, name=name, backoff=backoff, body=body)
        else:
            self._bytes = _Parts(open_range, size, name=name, backoff=backoff, body=body, parallel=parallel)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._bytes.read()
        if self._checksum is not None:
            self._checksum.update(chunk)
        if not chunk:
            if self._checksum is not None:
                self._checksum.check()
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Let go of all connections at once, whether or not anything was read."""
        await self._bytes.aclose()


class _Stretch:
    """The bytes [start, stop) in order; to the end of the object if ``stop`` is None.

    ``body`` is one that is open already, at ``start``.
    """

    def __init__(
        self, open_range: OpenRange, start: int, stop: int | None, *, name: str, backoff: Backoff,
        body: Body | None = None,
    ) -> None:  # fmt: skip
        self.at = start
        self._stop = stop
        self._open_range = open_range
        self._name = name
        self._backoff = backoff
        self._body = body
        self._goes_on = False
        """Whether the body has more bytes than are wanted of it."""
        self.ended = False
        self._breaks = 0
        """In a row, without a byte between them."""

    def cut(self, stop: int) -> None:
        """End earlier than the body does."""
        self._stop = stop
        self._goes_on = True

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the end."""
        while not self.ended:
            if self._body is None:
                self._body = await self._open_range(self.at, self._stop)
                self._goes_on = False
            try:
                chunk = await self._body.read()
            except StoreUnavailableError as error:
                await self._broke(error)
                continue
            if chunk:
                return await self._taken(chunk)
            await self._end()
        return b""

    async def read_all(self) -> list[bytes]:
        """Return all chunks."""
        chunks = []
        try:
            while chunk := await self.read():
                chunks.append(chunk)
        finally:
            await self.aclose()
        return chunks

    async def aclose(self) -> None:
        """End here, and let go of the connection."""
        self.ended = True
        await self._drop_body()

    async def _taken(self, chunk: bytes) -> bytes:
        self._breaks = 0
        wanted = len(chunk) if self._stop is None else self._stop - self.at
        if len(chunk) > wanted and not self._goes_on:
            raise StoreUnavailableError(
                f"The store delivers more of {self._name} than the {self._stop:,} bytes it announced.",
                model=self._name,
            )
        self.at += min(len(chunk), wanted)
        if self._goes_on and self.at == self._stop:
            await self.aclose()
        return chunk[:wanted]

    async def _end(self) -> None:
        """The body has no more bytes."""
        if self._stop is None or self.at == self._stop:
            await self.aclose()
        else:
            await self._broke(StoreUnavailableError("the connection ended early."))

    async def _broke(self, error: StoreUnavailableError) -> None:
        await self._drop_body()
        self._breaks += 1
        size = "" if self._stop is None else f" of {self._stop:,}"
        report = StoreUnavailableError(
            f"The download of {self._name} broke off at byte {self.at:,}{size}, {self._breaks} times in a row: {error}",
            model=self._name, retry_after=error.retry_after,
        )  # fmt: skip
        report.__cause__ = error
        await self._backoff.after(self._breaks, report)

    async def _drop_body(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            await body.aclose()


class _Parts:
    """All bytes of a large object: while one part is delivered the next ones are fetched.

    It goes over to parts after the first chunk, as soon as there is a place: a load looks into the first chunk, and
    may then wait long for memory.
    """

    def __init__(
        self, open_range: OpenRange, size: int, *, name: str, backoff: Backoff, body: Body, parallel: Parallel
    ) -> None:
        self._stretch = partial(_Stretch, open_range, name=name, backoff=backoff)
        self._first = self._stretch(0, size, body=body)
        """What the first answer delivers: all, or what comes before the parts."""
        self._parallel = parallel
        self._size = size
        self._next = size
        """Where the part starts that is to be fetched next."""
        self._tasks: deque[asyncio.Task[list[bytes]]] = deque()
        self._chunks: deque[bytes] = deque()
        """What is left of the part that is delivered."""
        self._has_place = False

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the end."""
        if self._pays():
            self._go_over()
        if chunk := await self._first.read():
            return chunk
        if not self._chunks:
            await self._next_part()
        return self._chunks.popleft() if self._chunks else b""

    async def aclose(self) -> None:
        """End all fetches, and give the place to another download."""
        self._give_place_back()
        self._next = self._size
        tasks = list(self._tasks)
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await self._first.aclose()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pays(self) -> bool:
        first, parallel = self._first, self._parallel
        undivided = first.at > 0 and not (self._has_place or first.ended)
        return undivided and parallel.places > 0 and self._size - first.at > 2 * parallel.part

    def _go_over(self) -> None:
        """Leave to the first body a part of what is left, and fetch the others beside it."""
        self._has_place = True
        self._parallel.places -= 1
        self._next = self._first.at + self._parallel.part
        self._first.cut(self._next)
        self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        while self._next < self._size and len(self._tasks) < self._parallel.ahead:
            start, self._next = self._next, min(self._next + self._parallel.part, self._size)
            self._tasks.append(asyncio.create_task(self._stretch(start, self._next).read_all()))

    async def _next_part(self) -> None:
        self._fetch_ahead()
        if self._tasks:
            self._chunks.extend(await self._tasks[0])
            self._tasks.popleft()
            self._fetch_ahead()
        else:
            self._give_place_back()

    def _give_place_back(self) -> None:
        self._parallel.places += self._has_place
        self._has_place = False
