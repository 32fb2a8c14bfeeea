"""Starting a worker process: which interpreter, which environment, which descriptors."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from anyio import to_thread

from modelcache.errors import ModelCacheError
from modelcache.pool.channel import Channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.pool.artifacts import ArtifactChannel
    from modelcache.pool.requests import RequestChannel

_WORKER = Path(__file__).resolve().parent.parent / "worker" / "__main__.py"

_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")
"""All that a worker sees of the parent's environment: what the dynamic loader and the C library need."""

_BYTES_KEPT = 2000

C = TypeVar("C", bound=Channel)


class Process:
    """A worker process with its two lanes."""

    def __init__(self, child: asyncio.subprocess.Process, requests: RequestChannel, artifacts: ArtifactChannel) -> None:
        self.child = child
        self.requests = requests
        self.artifacts = artifacts
        self._stderr = b""

    @property
    def last_words(self) -> str:
        """The end of what the worker wrote to standard error."""
        return self._stderr.decode(errors="replace").strip()

    def kill(self) -> None:
        """End it, if it has not ended by itself."""
        if self.child.returncode is None:
            self.child.kill()

    async def wait(self) -> int:
        """Wait until it has ended and its standard error has been read; return the exit code."""
        assert self.child.stderr is not None
        while heard := await self.child.stderr.read(_BYTES_KEPT):
            self._stderr = (self._stderr + heard)[-_BYTES_KEPT:]
        return await self.child.wait()


async def start_process(
    make_requests: Callable[[], RequestChannel],
    make_artifacts: Callable[[], ArtifactChannel],
    *,
    threads: int,
    predictor: str,
) -> Process:
    """Start a worker and connect both lanes."""
    if not sys.executable:
        raise ModelCacheError("sys.executable is empty: set it to a Python interpreter that workers can run in.")
    requests, workers_requests = socket.socketpair()
    artifacts, workers_artifacts = socket.socketpair()
    try:
        child = await _spawn((workers_requests.fileno(), workers_artifacts.fileno()), threads, predictor)
    except BaseException:
        requests.close()
        artifacts.close()
        raise
    finally:
        workers_requests.close()
        workers_artifacts.close()
    return Process(child, await _connect(requests, make_requests), await _connect(artifacts, make_artifacts))


async def _spawn(descriptors: tuple[int, int], threads: int, predictor: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the worker's own folder must not shadow other modules
        str(_WORKER),
        *map(str, descriptors),
        str(threads),
        predictor,
        pass_fds=descriptors,
        env=await to_thread.run_sync(_environment, threads),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone
    )


def _environment(threads: int) -> dict[str, str]:
    """Build a worker's environment: nothing secret, imports as in the parent, no more threads than asked for."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    imports = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100 - without resolving links
    return passed_on | {
        "PYTHONPATH": os.pathsep.join(imports),
        # Without these, small loads sometimes take 4 to 8 ms instead of 0.25.
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "OPENBLAS_NUM_THREADS": "1",
    }


async def _connect(sock: socket.socket, make: Callable[[], C]) -> C:
    sock.setblocking(False)
    _, channel = await asyncio.get_running_loop().create_unix_connection(make, sock=sock)
    return channel
