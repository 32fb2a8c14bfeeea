"""Starting a worker process: which interpreter, which environment, which descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from anyio import to_thread

from modelcache.errors import ModelCacheError
from modelcache.pool.blackbox import BlackBox
from modelcache.pool.channel import Channel
from modelcache.pool.shared import Slots, map_memory, shared_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelcache.pool.artifacts import ArtifactChannel
    from modelcache.pool.requests import RequestChannel

_WORKER = Path(__file__).resolve().parent.parent / "worker" / "__main__.py"

_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")
"""All that a worker sees of the parent's environment: what the dynamic loader and the C library need."""

_BYTES_KEPT = 2000
_LAST_WORDS_TIMEOUT = 1.0
_KILL_TIMEOUT = 0.2
"""Seconds for asyncio to see the end of a process that it has killed."""

C = TypeVar("C", bound=Channel)


class _Listener(asyncio.SubprocessProtocol):
    """Hears what a process writes to standard error, and that it has ended.

    It knows nothing of the lanes: the thread in which asyncio waits for the process keeps it alive, and would keep a
    registry alive that nobody has closed.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.said_all: asyncio.Future[None] = loop.create_future()
        self.stderr = b""

    def process_exited(self) -> None:
        """Note that it has ended."""
        self.ended.set_result(None)


class _LastWords(asyncio.Protocol):
    """Keeps the end of standard error; all of it is read, or a talkative worker would block on a full pipe."""

    def __init__(self, listener: _Listener) -> None:
        self._listener = listener

    def data_received(self, data: bytes) -> None:
        """Keep the end of it."""
        self._listener.stderr = (self._listener.stderr + data)[-_BYTES_KEPT:]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop's signature
        """Note that it has said all."""
        self._listener.said_all.set_result(None)


class Lanes:
    """The parent's ends of a worker's two lanes and of the memory they share, from the moment there are any."""

    box: BlackBox
    slots: Slots

    def __init__(self) -> None:
        self.ends: tuple[socket.socket, ...] = ()

    @contextlib.contextmanager
    def open(self) -> Iterator[list[int]]:
        """Open all three, and give the descriptors that the worker started in the block is to have.

        Those are closed after it: an end that is held elsewhere would hide that the worker has ended.
        """
        descriptors: list[int] = []
        with contextlib.ExitStack() as workers:
            for _ in ("requests", "artifacts"):
                end, workers_end = socket.socketpair()
                self.ends += (end,)
                workers.enter_context(workers_end)
                descriptors.append(workers_end.fileno())
            descriptors.append(descriptor := shared_memory())
            workers.callback(os.close, descriptor)
            memory = map_memory(descriptor)
            self.box, self.slots = BlackBox(memory), Slots(memory)
            yield descriptors

    def close(self) -> None:
        """Close both lanes, if they have not become transports, and let go of the memory."""
        for end in self.ends:
            end.close()
        if hasattr(self, "box"):
            self.release_memory()

    def release_memory(self) -> None:
        """Let go of the memory; what the black box has said is kept."""
        self.box.close()
        self.slots.close()

    def abandon(self) -> None:
        """Let go of all without a word to the loop, which may be another process's.

        Something harmless takes the place of each socket: its number must not go to another file, which the transport
        would close when it is collected.
        """
        if hasattr(self, "box"):
            self.release_memory()
        for end in self.ends:
            if end.fileno() >= 0:  # its transport has not closed it
                harmless = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                os.dup2(harmless, end.fileno(), inheritable=False)
                os.close(harmless)


class Process:
    """A worker process with its two lanes."""

    requests: RequestChannel
    artifacts: ArtifactChannel

    def __init__(
        self, transport: asyncio.SubprocessTransport, listener: _Listener, words: asyncio.ReadTransport
    ) -> None:
        self._transport = transport
        self._listener = listener
        self._words = words
        self.killed = ""
        """Why it was killed, as far as a reason was given."""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._transport.get_pid()

    @property
    def exit_code(self) -> int | None:
        """As Python gives it: negative for a signal, None while it runs."""
        return self._transport.get_returncode()

    @property
    def last_words(self) -> str:
        """The end of what the worker wrote to standard error."""
        return self._listener.stderr.decode(errors="replace").strip()

    def cpu_seconds(self) -> float:
        """CPU time it has used so far; 0.0 where the platform does not say."""
        if sys.platform != "linux":
            return 0.0
        # The C library's clock_getcpuclockid(): reading /proc would be file I/O on the event loop.
        with contextlib.suppress(OSError):
            return time.clock_gettime(~self.pid << 3 | 2)
        return 0.0

    def kill(self, reason: str = "") -> None:
        """End it, if it has not ended by itself; the first ``reason`` counts.

        None is given where it is on its way out: the signal may come too late to be what ended it.
        """
        if self.exit_code is None:
            self.killed = self.killed or reason
            # Not Popen.kill(): it polls first, and may take the exit code away from the loop that waits for it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended and its last words are read; False if it has not after ``timeout`` seconds."""
        await asyncio.wait((self._listener.ended,), timeout=timeout)
        if not self._listener.ended.done():
            return False
        # A process that a predictor has started may hold the pipe open for as long as it likes.
        await asyncio.wait((self._listener.said_all,), timeout=_LAST_WORDS_TIMEOUT)
        self._words.close()
        self._transport.close()
        return True


class Settings(NamedTuple):
    """What a worker is told when it starts."""

    threads: int
    """For each prediction."""
    predictor: str
    """``package.module:Class``."""
    stays_awake: bool
    """Between the calls of a lone caller it may use its processor for a moment instead of sleeping."""


async def start_process(
    lanes: Lanes,
    make_requests: Callable[[], RequestChannel],
    make_artifacts: Callable[[], ArtifactChannel],
    settings: Settings,
) -> Process:
    """Start a worker and connect both ``lanes``."""
    process = await _spawn(lanes, settings)
    requests, artifacts = lanes.ends
    try:
        process.requests = await _connect(requests, make_requests)
        process.artifacts = await _connect(artifacts, make_artifacts)
    except BaseException:
        lanes.close()
        process.kill()
        await process.wait()
        raise
    return process


async def _spawn(lanes: Lanes, settings: Settings) -> Process:
    """Start the process, with a pipe of our own: a start that is cancelled hangs in CPython 3.11 with asyncio's."""
    if not sys.executable:
        raise ModelCacheError("sys.executable is empty: set it to a Python interpreter that workers can run in.")
    loop, imports = asyncio.get_running_loop(), await to_thread.run_sync(_imports)
    reading, writing = os.pipe()
    listener = _Listener()
    try:
        words, _ = await loop.connect_read_pipe(lambda: _LastWords(listener), os.fdopen(reading, "rb", 0))
        try:
            transport = await _execute(
                lanes,
                lambda: listener,
                lambda descriptors: _command(descriptors, settings, imports),
                env=_environment(settings.threads),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=writing,
                **_apart(loop),
            )
        except BaseException:
            words.close()
            lanes.close()
            raise
    finally:
        os.close(writing)
    return Process(transport, listener, words)


async def _execute(
    lanes: Lanes,
    make_listener: Callable[[], _Listener],
    command: Callable[[list[int]], list[str]],
    **options: Any,
) -> asyncio.SubprocessTransport:
    """Call the loop's ``subprocess_exec``, which does not always end when it is cancelled.

    It waits for the process that it kills then. But ``asyncio.run`` cancels all tasks in the end, one of its own among
    them: if that had not begun, nobody tells it of the end of the process, and it takes a second cancellation.
    """
    loop = asyncio.get_running_loop()
    try:
        with lanes.open() as descriptors:
            starting = loop.create_task(
                loop.subprocess_exec(make_listener, *command(descriptors), pass_fds=descriptors, **options)
            )
            await asyncio.sleep(0)  # its first step starts the process, which alone is to hold its ends from then on
        await asyncio.wait((starting,))
    except asyncio.CancelledError:
        if not starting.cancelling():
            starting.cancel()
        await asyncio.wait((starting,), timeout=_KILL_TIMEOUT)
        starting.cancel()
        starting.add_done_callback(_end_process)
        raise
    return starting.result()[0]


def _apart(loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """Return what lets Ctrl-C in a terminal reach the parent alone.

    A process group is enough. Sessions share the processor like users do where the kernel has autogroups, whatever the
    priority of a thread in them; but uvloop knows of nothing else.
    """
    return {"process_group": 0} if isinstance(loop, asyncio.BaseEventLoop) else {"start_new_session": True}


def _end_process(started: asyncio.Task[tuple[asyncio.SubprocessTransport, _Listener]]) -> None:
    if not started.cancelled() and started.exception() is None:
        started.result()[0].close()  # it came up in the tick of the cancellation


def _command(descriptors: list[int], settings: Settings, imports: list[str]) -> list[str]:
    # -P: the worker's own folder must not shadow other modules.
    numbers = (*descriptors, settings.threads, int(settings.stays_awake))
    return [sys.executable, "-P", str(_WORKER), *map(str, numbers), settings.predictor, *imports]


def _imports() -> list[str]:
    """Return where the parent imports from, whatever the worker's current folder; anything but text it ignores."""
    return [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]  # noqa: PTH100 - keeps links


def _environment(threads: int) -> dict[str, str]:
    """Build a worker's environment: nothing secret, no more threads than asked for."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return passed_on | {
        # Without these, small loads sometimes take 4 to 8 ms instead of 0.25.
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "OPENBLAS_NUM_THREADS": "1",
    }


async def _connect(sock: socket.socket, make: Callable[[], C]) -> C:
    sock.setblocking(False)
    _, channel = await asyncio.get_running_loop().create_unix_connection(make, sock=sock)
    return channel
