"""modelcache, and what one would write by hand instead: each in as few lines as its users would need.

Each rival runs in a process of its own: ``python benchmarks/rivals.py KEY FOLDER`` serves orders from standard input
(see harness.py). A rival imports what it needs when it starts, so that its memory is its own.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tarfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from bare_worker import ANSWER, REQUEST
from models import as_lists

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]


class Rival:
    """Something that answers ``await predict(name, rows)`` for the artifacts in a folder."""

    label: ClassVar[str]
    takes: ClassVar[str] = "float32 array, prepared"
    blocks: ClassVar[bool] = False
    """True if a call never lets the event loop go on."""
    predicts: ClassVar[bool] = True
    """False for a floor that moves bytes and predicts nothing."""
    queue_limit: ClassVar[int] = 0
    """Calls that may wait for one of its workers, 0 if there is no limit."""
    refusals: tuple[type[Exception], ...] = ()
    """What is raised where it refuses a call, or gives it up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def start(self) -> None:
        """Import what is needed, and start what has to run before the first call."""
        import xgboost  # noqa: F401

    async def close(self) -> None:
        """End what was started."""

    async def forget(self) -> None:
        """Let all models leave the memory, so that a call of any is a first call again."""
        raise NotImplementedError

    def prepare(self, rows: Matrix) -> Any:
        """Return ``rows`` in the form that this rival likes best; not part of the measured time."""
        return rows

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call, loading the model if this is its first."""
        raise NotImplementedError

    def is_correct(self, answer: Any, rows: Any, expected: Matrix) -> bool:
        """Compare bit for bit with what XGBoost itself predicts."""
        del rows
        same_kind = answer.dtype == expected.dtype and answer.shape == expected.shape
        return bool(same_kind and answer.tobytes() == expected.tobytes())


def load_booster(folder: Path, name: str) -> Any:
    """Read, unpack and parse an artifact."""
    import xgboost

    with tarfile.open(folder / f"{name}.tar.gz") as tar:
        member = tar.extractfile("xgboost-model")
        assert member is not None
        booster = xgboost.Booster({"nthread": 1})
        booster.load_model(bytearray(member.read()))
    return booster


class Direct(Rival):
    """In the process and on the event loop, which stands still meanwhile: the floor without processes or threads."""

    label = "inplace_predict on the loop"
    blocks = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.boosters: dict[str, Any] = {}

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call."""
        booster = self.boosters.get(name)
        if booster is None:
            booster = self.boosters[name] = load_booster(self.folder, name)
        return booster.inplace_predict(rows)


class Threads(Direct):
    """What the documentation of asyncio suggests: the yardstick of all ratios."""

    label = "to_thread(inplace_predict)"
    blocks = False

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call."""
        booster = self.boosters.get(name)
        if booster is None:
            booster = self.boosters[name] = await asyncio.to_thread(load_booster, self.folder, name)
        return await asyncio.to_thread(booster.inplace_predict, rows)


class ThreadsDMatrix(Threads):
    """The call that XGBoost's own introduction shows, in a thread."""

    label = "to_thread(predict, DMatrix)"

    async def start(self) -> None:
        """Import XGBoost."""
        import xgboost

        self._dmatrix = xgboost.DMatrix

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call."""
        booster = self.boosters.get(name)
        if booster is None:
            booster = self.boosters[name] = await asyncio.to_thread(load_booster, self.folder, name)
        return await asyncio.to_thread(lambda: booster.predict(self._dmatrix(rows)))


class Processes(Rival):
    """A process pool, each process with a cache of its own."""

    label = "ProcessPoolExecutor, lru_cache"

    async def start(self) -> None:
        """Start the pool, one process per usable core as modelcache does."""
        await super().start()
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._executor = ProcessPoolExecutor(count)
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._executor, os.getpid) for _ in range(count)))

    async def close(self) -> None:
        """End the pool."""
        self._executor.shutdown()

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, _predict_in_process, self.folder, name, rows
        )


def _predict_in_process(folder: Path, name: str, rows: Matrix) -> Any:
    return _cached_booster(folder, name).inplace_predict(rows)


@lru_cache(maxsize=4096)
def _cached_booster(folder: Path, name: str) -> Any:
    return load_booster(folder, name)


class AsyncLRU(Rival):
    """``async_lru`` so that a model is loaded once, and threads."""

    label = "async_lru, to_thread"

    async def start(self) -> None:
        """Make the cache."""
        from async_lru import alru_cache

        await super().start()

        @alru_cache(maxsize=4096)
        async def load(name: str) -> Any:
            return await asyncio.to_thread(load_booster, self.folder, name)

        self._load: Callable[[str], Awaitable[Any]] = load

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call."""
        booster = await self._load(name)
        return await asyncio.to_thread(booster.inplace_predict, rows)


class Echo(Rival):
    """Bytes to another process and back, and nothing else: the floor of any pool of processes."""

    label = "socketpair echo (no prediction)"
    takes = "bytes of the rows, all of which come back"
    predicts = False
    _CHILD = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
while data := sock.recv(1 << 20):
    sock.sendall(data)
"""

    async def start(self) -> None:
        """Start the process that echoes."""
        mine, others = socket.socketpair()
        command = [sys.executable, "-c", self._CHILD, str(others.fileno())]
        self._child = subprocess.Popen(command, pass_fds=[others.fileno()])  # noqa: ASYNC220 - nothing waits meanwhile
        others.close()
        mine.setblocking(False)
        loop = asyncio.get_running_loop()
        _, self._protocol = await loop.create_unix_connection(_EchoProtocol, sock=mine)

    async def close(self) -> None:
        """End it."""
        self._protocol.transport.close()
        await asyncio.to_thread(self._child.wait)

    def prepare(self, rows: Matrix) -> bytes:
        """Return the bytes of the rows."""
        return rows.tobytes()

    async def predict(self, name: str, rows: Any) -> Any:
        """Send and wait."""
        del name
        return await self._protocol.echo(rows)

    def is_correct(self, answer: Any, rows: Any, expected: Matrix) -> bool:
        """Compare with what was sent."""
        del expected
        return bool(answer == rows)


class _EchoProtocol(asyncio.Protocol):
    """Sends the first message of a loop tick at once, and the others of that tick in one write."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[asyncio.Future[bytes], int]] = deque()
        self._held: list[bytes] | None = None
        self._arrived = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no instance of it

    def echo(self, message: bytes) -> asyncio.Future[bytes]:
        """Send ``message``; the future gives it back."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting.append((future, len(message)))
        if self._held is None:
            self._held = []
            self._loop.call_soon(self._flush)
            self.transport.write(message)
        else:
            self._held.append(message)
        return future

    def _flush(self) -> None:
        held, self._held = self._held, None
        if held:
            self.transport.write(b"".join(held))

    def data_received(self, data: bytes) -> None:
        """Resolve the calls whose message is back in full."""
        self._arrived += data
        while self._waiting and len(self._arrived) >= self._waiting[0][1]:
            future, size = self._waiting.popleft()
            future.set_result(bytes(self._arrived[:size]))
            del self._arrived[:size]


class Bare(Rival):
    """The call of XGBoost's library in one other process: the least that we know how to write for that."""

    label = "a bare worker"

    async def start(self) -> None:
        """Start the worker, and have it import XGBoost."""
        mine, others = socket.socketpair()
        command = [sys.executable, str(Path(__file__).with_name("bare_worker.py")), str(others.fileno())]
        self._child = subprocess.Popen(command, pass_fds=[others.fileno()])  # noqa: ASYNC220 - nothing waits meanwhile
        others.close()
        mine.setblocking(False)
        loop = asyncio.get_running_loop()
        _, self._protocol = await loop.create_unix_connection(_BareProtocol, sock=mine)
        self._paths: dict[str, bytes] = {}
        await self.forget()

    async def close(self) -> None:
        """End it."""
        self._protocol.transport.close()
        await asyncio.to_thread(self._child.wait)

    async def forget(self) -> None:
        """Have the worker drop all models."""
        await self._protocol.ask(REQUEST.pack(0, 0, 0))

    def path(self, name: str) -> Path:
        """Return where an artifact is."""
        return self.folder / f"{name}.tar.gz"

    async def predict(self, name: str, rows: Any) -> Any:
        """Send and wait."""
        path = self._paths.get(name)
        if path is None:
            path = self._paths[name] = bytes(self.path(name))
        return await self._protocol.ask(REQUEST.pack(len(path), *rows.shape) + path + rows.tobytes())


class _BareProtocol(asyncio.BufferedProtocol):
    """Sends each request at once; the answers come in the same order."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[Matrix]] = deque()
        self._buffer = memoryview(bytearray(1 << 18))
        self._filled = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no instance of it

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(exc or ConnectionError("The worker has ended."))

    def ask(self, request: bytes) -> asyncio.Future[Matrix]:
        """Send ``request``; the future gives the predictions."""
        future: asyncio.Future[Matrix] = self._loop.create_future()
        self._waiting.append(future)
        self.transport.write(request)
        return future

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes are to be written."""
        del sizehint
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Resolve the calls whose answers are here in full."""
        import numpy as np

        self._filled += nbytes
        start = 0
        while self._filled - start >= ANSWER.size:
            end = start + ANSWER.size + ANSWER.unpack_from(self._buffer, start)[0]
            if end > self._filled:
                break
            values = bytes(self._buffer[start + ANSWER.size : end])
            self._waiting.popleft().set_result(np.frombuffer(values, np.float32))
            start = end
        rest = bytes(self._buffer[start : self._filled])
        self._buffer[: len(rest)], self._filled = rest, len(rest)


class ModelCache(Rival):
    """``await registry.predict(name, rows)`` with all options at their defaults."""

    label = "modelcache"
    options: ClassVar[dict[str, Any]] = {}
    takes = "list of lists, converted in each call"

    async def start(self) -> None:
        """Start the registry and its workers."""
        from modelcache import ModelRegistry, OverloadedError

        self.refusals = (OverloadedError, TimeoutError)
        self._registry = ModelRegistry(self.folder, **self.options)
        await self._registry.start()

    async def close(self) -> None:
        """Close it."""
        await self._registry.close()

    def prepare(self, rows: Matrix) -> Any:
        """Return what a user would write."""
        return as_lists(rows)

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call."""
        return await self._registry.predict(name, rows)


class ModelCacheArray(ModelCache):
    """The same, given what the other rivals are given."""

    label = "modelcache, array"
    takes = Rival.takes

    def prepare(self, rows: Matrix) -> Any:
        """Return the array."""
        return rows


RIVALS: dict[str, type[Rival]] = {
    "modelcache": ModelCache,
    "modelcache-array": ModelCacheArray,
    "to_thread": Threads,
    "to_thread-dmatrix": ThreadsDMatrix,
    "async_lru": AsyncLRU,
    "process-pool": Processes,
    "direct": Direct,
    "bare": Bare,
    "echo": Echo,
}
"""By the key they have in commands and results."""

YARDSTICK = "to_thread"
"""What ratios are relative to."""


if __name__ == "__main__":
    from harness import serve

    asyncio.run(serve(RIVALS[sys.argv[1]](Path(sys.argv[2])), Path(sys.argv[2])))
