"""The same question over loopback HTTP: to ``modelcache serve``, to an app written by hand, and to an echo.

``python benchmarks/http_rivals.py KEY FOLDER`` asks, and serves orders from standard input as rivals.py does; it starts
the server of its rival in a process of its own. The client speaks just enough HTTP/1.1, over connections that it keeps
open: it must take less of the processors than any server.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from models import as_lists
from rivals import ModelCache, Rival

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

HERE = Path(__file__).resolve().parent
_ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)")
_STATUS = slice(9, 12)
_LENGTH = b"content-length: "


class Connection(asyncio.Protocol):
    """One connection of one client, which asks again when it has its answer."""

    def __init__(self) -> None:
        self._received = b""
        self._answer: asyncio.Future[bytes]
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        if hasattr(self, "_answer") and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("The server closed the connection."))

    async def ask(self, request: bytes) -> bytes:
        """Return the body of the answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        """Resolve the answer when it is complete."""
        received = self._received = self._received + data
        head = received.find(b"\r\n\r\n")
        if head < 0:
            return
        if received[_STATUS] != b"200":
            self._answer.set_exception(RuntimeError(received.decode()))
            return
        start = received.lower().index(_LENGTH, 0, head) + len(_LENGTH)
        end = head + 4 + int(received[start : received.index(b"\r\n", start)])
        if len(received) >= end:
            self._received = received[end:]
            self._answer.set_result(received[head + 4 : end])

    def close(self) -> None:
        """End it."""
        self._transport.close()


class Served(Rival):
    """A server in a process of its own, asked for a row of CSV."""

    takes = "a row of CSV"
    command: ClassVar[tuple[str, ...]]

    async def start(self) -> None:
        """Start the server; returns when it listens."""
        self._port = await asyncio.to_thread(self._launch)
        self._idle: list[Connection] = []

    def _launch(self) -> int:
        """Start it, and return its port."""
        self._server = subprocess.Popen(
            [sys.executable, *self.command, str(self.folder), "--port", "0"], stdout=subprocess.PIPE
        )
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if found := _ADDRESS.search(line):
                return int(found[1])
        raise RuntimeError(f"{self.label} ended with exit code {self._server.wait()}.")

    async def close(self) -> None:
        """End connections and server."""
        for connection in self._idle:
            connection.close()
        self._server.send_signal(signal.SIGTERM)
        assert self._server.stdout is not None
        self._server.stdout.close()
        await asyncio.to_thread(self._server.wait)

    def prepare(self, rows: Matrix) -> bytes:
        """Return the body."""
        return b"\n".join(",".join(map(str, row)).encode() for row in as_lists(rows))

    async def predict(self, name: str, rows: bytes) -> bytes:
        """Ask over a connection that nobody else uses."""
        if self._idle:
            connection = self._idle.pop()
        else:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
        answer = await connection.ask(
            b"POST /endpoints/cities/invocations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/csv\r\n"
            b"Accept: text/csv\r\nX-Amzn-SageMaker-Target-Model: %s\r\nContent-Length: %d\r\n\r\n%s"
            % (name.encode(), len(rows), rows)
        )
        self._idle.append(connection)
        return answer

    def is_correct(self, answer: bytes, rows: bytes, expected: Matrix) -> bool:
        """Compare bit for bit."""
        del rows
        return np.array(answer.split(), np.float32).tobytes() == expected.tobytes()


class Serve(Served):
    """The command, with all options at their defaults."""

    label = "modelcache serve"
    command: ClassVar[tuple[str, ...]] = ("-m", "modelcache", "serve")


class ServeAuto(Serve):
    """The command with a second engine for what is asked often."""

    label = "modelcache serve --engine auto"
    command = (*Serve.command, "--engine", "auto")


class ByHand(Served):
    """What one would write: a dict of boosters, asked in threads."""

    label = "starlette, to_thread(inplace_predict)"
    command = (str(HERE / "http_servers.py"), "by_hand")


class Echo(Served):
    """A route that answers with what it was sent: the floor of any app on this server."""

    label = "starlette echo"
    predicts = False
    command = (str(HERE / "http_servers.py"), "echo")

    def is_correct(self, answer: bytes, rows: bytes, expected: Matrix) -> bool:
        """It predicts nothing."""
        del expected
        return answer == rows


class RelayedEcho(Echo):
    """The echo, which asks another process: the floor of any app whose models are in processes of their own."""

    label = "echo, by way of another process"
    command = (str(HERE / "http_servers.py"), "relayed_echo")


class ByBareWorker(Served):
    """One other process that has nothing but XGBoost's call: the least we know how to write for that."""

    label = "starlette, a bare worker"
    command = (str(HERE / "http_servers.py"), "by_bare_worker")


class GuardedEcho(Echo):
    """The echo, behind the connections and the guard of the command."""

    label = "echo, guarded"
    command = (str(HERE / "http_servers.py"), "guarded_echo")


class Constant(Echo):
    """The command's app for SageMaker's clients, with an answer at hand."""

    label = "SageMaker's protocol, a constant"
    command = (str(HERE / "http_servers.py"), "constant")

    def is_correct(self, answer: bytes, rows: bytes, expected: Matrix) -> bool:
        """It predicts nothing."""
        del rows, expected
        return answer == b"1.5"


class Inside(ModelCache):
    """The registry's own share: the same question in the process, without a server."""

    label = "modelcache, no server"


RIVALS: dict[str, type[Rival]] = {
    "modelcache-serve": Serve,
    "modelcache-serve-auto": ServeAuto,
    "by-hand": ByHand,
    "http-echo": Echo,
    "relayed-echo": RelayedEcho,
    "by-bare-worker": ByBareWorker,
    "guarded-echo": GuardedEcho,
    "constant": Constant,
    "modelcache-inside": Inside,
}
"""By the key they have in commands and results."""


if __name__ == "__main__":
    from harness import serve

    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    asyncio.run(serve(RIVALS[sys.argv[1]](Path(sys.argv[2])), Path(sys.argv[2])))
