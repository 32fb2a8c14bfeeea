"""A worker process without a pool: tests speak to it over two sockets that they hold themselves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelcache.pool import wire
from modelcache.pool.blackbox import BlackBox
from modelcache.pool.pool import XGBOOST
from modelcache.pool.shared import Slots, map_memory, shared_memory

MAIN = Path(wire.__file__).parent.parent / "worker" / "__main__.py"
PATIENCE = 20.0


class Report(NamedTuple):
    """A frame of the artifact lane."""

    kind: int
    model: int
    number: int
    facts: dict[str, Any]


class Reply(NamedTuple):
    """A frame of the request lane."""

    kind: int
    number: int
    values: np.ndarray[Any, Any]
    message: str


class LoneWorker:
    """A worker process without a pool."""

    def __init__(self, predictor: str = XGBOOST, *options: str) -> None:
        self.requests, theirs = socket.socketpair()
        self.artifacts, theirs_too = socket.socketpair()
        shared = shared_memory()
        memory = map_memory(shared)
        self.box, self.slots = BlackBox(memory), Slots(memory)
        descriptors = (theirs.fileno(), theirs_too.fileno(), shared)
        imports = map(os.path.abspath, sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", *options, str(MAIN), *map(str, descriptors), "1", "1", predictor, *imports],
            pass_fds=descriptors,
            env={"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        theirs.close()
        theirs_too.close()
        os.close(shared)
        self.requests.settimeout(PATIENCE)
        self.artifacts.settimeout(PATIENCE)
        self.hello = self.report()

    def close(self) -> str:
        """End it, and return what it wrote to standard error."""
        self.requests.close()
        self.artifacts.close()
        self.box.close()
        self.slots.close()
        _, said = self.process.communicate(timeout=PATIENCE)
        return said.decode()

    # The artifact lane

    def command(self, kind: int, model: int, number: int = 0, payload: bytes = b"") -> None:
        self.artifacts.sendall(wire.ARTIFACT.pack(len(payload), kind, 0, 0, model, number) + payload)

    def report(self) -> Report:
        size, kind, _, _, model, number = wire.ARTIFACT.unpack(_read(self.artifacts, wire.ARTIFACT.size))
        return Report(kind, model, number, _facts(kind, _read(self.artifacts, size)))

    def answer(self) -> np.ndarray[Any, Any]:
        """Return the values of an ANSWER."""
        size, kind, dimensions, _, _, rows = wire.ARTIFACT.unpack(_read(self.artifacts, wire.ARTIFACT.size))
        assert kind == wire.ANSWER
        values = np.frombuffer(_read(self.artifacts, size), np.float32)
        return values.reshape(rows, -1) if dimensions > 1 else values

    def send_artifact(self, model: int, data: bytes, *, allowed: int = 1 << 30) -> None:
        self.command(wire.BEGIN, model, allowed)
        self.command(wire.CHUNK, model, 0, data)
        self.command(wire.END, model)

    def load(self, model: int, data: bytes) -> Report:
        """Load an artifact and return LOADED, or FAILED."""
        self.send_artifact(model, data)
        return self.report()

    # The request lane

    def send(self, *frames: bytes) -> None:
        self.requests.sendall(b"".join(frames))

    def reply(self) -> Reply:
        return read_reply(self.requests)

    def replies(self, count: int) -> dict[int, Reply]:
        """Return the next ``count`` replies by call."""
        return {reply.number: reply for reply in (self.reply() for _ in range(count))}

    def values(self, number: int, model: int, rows: Any, **options: Any) -> np.ndarray[Any, Any]:
        """Predict, and return the answer to just that call."""
        self.send(ask(number, model, rows, **options))
        reply = self.reply()
        assert (reply.kind, reply.number) == (wire.RESULT, number), reply.message
        return reply.values


def _facts(kind: int, payload: bytes) -> dict[str, Any]:
    took: dict[str, Any] = {}
    if kind == wire.LOADED:
        took["seconds"], took["unpacked_bytes"] = wire.TOOK.unpack_from(payload)
        payload = payload[wire.TOOK.size :]
    return took | (json.loads(payload) if payload else {})


def read_reply(sock: socket.socket) -> Reply:
    size, kind, dimensions, _, number, *shape, _ = wire.REPLY.unpack(_read(sock, wire.REPLY.size))
    data = _read(sock, size)
    if kind != wire.RESULT:
        return Reply(kind, number, np.empty(0), data.decode())
    return Reply(kind, number, np.frombuffer(data, np.float32).reshape(shape[:dimensions]), "")


def _read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError(f"{len(data)} of {size} bytes")
        data += part
    return bytes(data)


def ask(number: int, model: int, rows: Any, *, output: str = "value", deadline: float = 0.0) -> bytes:
    """PREDICT."""
    matrix = np.atleast_2d(np.asarray(rows, np.float32))
    code, data = wire.OUTPUTS.index(output), matrix.tobytes()
    return wire.REQUEST.pack(len(data), wire.PREDICT, code, 0, number, model, *matrix.shape, deadline) + data


def bare(kind: int, number: int) -> bytes:
    """CANCEL or PING."""
    return wire.REQUEST.pack(0, kind, 0, 0, number, 0, 0, 0, 0.0)
