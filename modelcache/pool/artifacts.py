"""The artifact lane, parent side: artifacts on their way into a worker, and models on their way out."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from modelcache.errors import (
    CorruptArtifactError,
    ModelCacheError,
    UnsafeArtifactError,
    UnsupportedArtifactError,
)
from modelcache.pool import wire
from modelcache.pool.channel import Channel
from modelcache.pool.lost import WorkerLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from modelcache.pool.blackbox import BlackBox
    from modelcache.pool.lost import Epitaph

    Matrix = NDArray[np.float32]

_REFUSALS: dict[str, type[ModelCacheError]] = {
    "corrupt": CorruptArtifactError,
    "unsupported": UnsupportedArtifactError,
    "unsafe": UnsafeArtifactError,
    "fault": ModelCacheError,  # of the predictor: the artifact may be as good as any
}


_FACTS_SHARED, _LONGEST_SHARED = 1024, 4 << 10
"""Models of one fleet are alike: thousands have the same columns, and few differ in anything else but their size. What
is said of them is remembered, if it is no longer than this."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model is, whatever its size; equal ones are shared as far as they are met often."""

    format: str
    container: str
    n_features: int
    feature_names: tuple[str, ...] | None
    n_outputs: int
    objective: str | None
    booster: str | None
    n_trees: int | None
    best_iteration: int | None

    def is_steady(self, size: int) -> bool:
        """Say whether each reading of the ``size`` of such a model says about the same.

        What XGBoost keeps of its columns' names, for the thread that loads it, is there already at times.
        """
        return len(self.feature_names or ()) * _NAME <= size * _SCATTER


_NAME, _SCATTER = 100, 0.1
"""Bytes of a name, about, and the share of a model's bytes by which readings differ otherwise."""


@lru_cache(_FACTS_SHARED)
def _shared_names(names: tuple[str, ...]) -> tuple[str, ...]:
    return names


def _read_facts(said: bytes) -> ModelFacts:
    facts = json.loads(said)
    facts["feature_names"] = _shared_names(tuple(facts["feature_names"])) if facts["feature_names"] else None
    return ModelFacts(**facts)


_shared_facts = lru_cache(_FACTS_SHARED)(_read_facts)


@dataclass(frozen=True, slots=True)
class LoadedFacts:
    """What a worker says of a model it has loaded."""

    size: int
    """Heap it takes, measured."""
    seconds: float
    unpacked_bytes: int
    model: ModelFacts

    @classmethod
    def from_frame(cls, size: int, payload: bytes) -> LoadedFacts:
        """Read a LOADED frame."""
        seconds, unpacked = wire.TOOK.unpack_from(payload)
        said = payload[wire.TOOK.size :]
        read = _shared_facts if len(said) <= _LONGEST_SHARED else _read_facts
        return cls(size, seconds, unpacked, read(said))


@dataclass(frozen=True, slots=True)
class Saved:
    """A model that a worker has written to a file."""

    size: int
    digest: str = ""
    error: str | None = None
    """Why it could not be written."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of an order to give a model a second engine."""

    size: int
    """Bytes it takes."""
    refusal: str | None
    """Why the model stays as it is."""


class Loading:
    """One artifact on its way into a worker; ``head`` is the frame that announces it, sent with what comes first."""

    def __init__(self, channel: ArtifactChannel, model: int, head: bytes) -> None:
        self._channel = channel
        self._head = head
        self.model = model
        self.saved: asyncio.Future[Saved | None] | None = None
        """What was written, None if nothing was; there only if it was ordered."""
        self.needed = 0
        """Unpacked bytes that the artifact has at least, beyond what is reserved; 0 when that is enough."""
        self.asked = 0
        """Unpacked bytes that the worker would have reserved for it."""
        self.blame = 0.0
        """Its share in a crash of the worker, set when there has been one."""
        self.answer: Matrix | None = None
        """What the model predicts for the rows that it was finished with."""
        self.result: LoadedFacts | None = None
        self.error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def decided(self) -> bool:
        """True once it is loaded, refused or lost."""
        return self.result is not None or self.error is not None

    @property
    def parsing(self) -> bool:
        """True while the worker's parser is at it, or was when the worker ended."""
        return self._channel.parsing() is self

    async def feed(self, chunk: bytes) -> None:
        """Send the next bytes, as fast as the worker takes them.

        Others have their turn after each frame: a store may have its chunks at hand and never wait for anything.
        """
        view = memoryview(chunk)
        for start in range(0, max(len(view), 1), wire.PAYLOAD_LIMIT):
            self._send(_frame(wire.CHUNK, self.model, 0, view[start : start + wire.PAYLOAD_LIMIT]))
            await self._channel.writable()
            await asyncio.sleep(0)

    def finish(self, last: bytes = b"", rows: Matrix | None = None) -> None:
        """Send the ``last`` bytes, and say that the artifact is complete.

        ``rows`` are to be predicted as soon as it has loaded.
        """
        chunk = _frame(wire.CHUNK, self.model, 0, last) if last else b""
        count, cells = (len(rows), rows.tobytes()) if rows is not None else (0, b"")
        self._send(chunk, _frame(wire.END, self.model, count, cells))

    def grant(self, allowed: int) -> None:
        """Answer ``needed``: the reservation covers ``allowed`` unpacked bytes now."""
        if self.needed <= allowed:  # it may have grown while bytes were claimed for it
            self.needed = 0
        self._send(_frame(wire.GRANT, self.model, allowed))

    def _send(self, *frames: bytes) -> None:
        head, self._head = self._head, b""
        self._channel.send(b"".join((head, *frames)))

    async def news(self) -> None:
        """Wait until it is decided or more bytes are needed."""
        while not self.decided and not self.needed:
            self._news.clear()
            await self._news.wait()

    def tell(self) -> None:
        """Wake whoever waits for news."""
        self._news.set()


class ArtifactChannel(Channel):
    """Sends artifacts and orders to unload, and takes what the worker reports.

    ``hello`` is called when the worker is up, ``unloaded(model)`` when a model's bytes are free.
    """

    def __init__(
        self,
        lost: Callable[[], None],
        box: BlackBox,
        *,
        hello: Callable[[dict[str, Any]], None],
        unloaded: Callable[[int], None],
    ) -> None:
        super().__init__(wire.ARTIFACT, lost)
        self._box = box
        self._hello = hello
        self._unloaded = unloaded
        self._loadings: dict[int, Loading] = {}
        self._saving: dict[int, asyncio.Future[Saved | None]] = {}
        self._converting: dict[int, asyncio.Future[Converted]] = {}
        self._measuring: list[asyncio.Future[int]] = []

    @property
    def loading(self) -> bool:
        """True while an artifact is on its way into the worker."""
        return bool(self._loadings)

    def begin(self, model: int, allowed: int, digest: str | None = None, save: str | None = None) -> Loading:
        """Announce an artifact whose reservation covers ``allowed`` unpacked bytes, and its SHA-256 if known.

        ``save`` is a path at which the worker makes a file of the model when it has loaded.
        """
        facts = json.dumps({"digest": digest, "save": save}).encode() if digest or save else b""
        loading = self._loadings[model] = Loading(self, model, _frame(wire.BEGIN, model, allowed, facts))
        if save is not None:
            loading.saved = self._saving[model] = self._loop.create_future()
        return loading

    def open(self, model: int, allowed: int, path: str, digest: str, known: int) -> Loading:
        """Announce a local copy, as :meth:`begin` does with what is sent; nothing is to be fed.

        ``known`` are the bytes of heap that it took before; 0: nobody knows, and it is to be weighed.
        """
        copy = wire.COPY.pack(bytes.fromhex(digest), known) + os.fsencode(path)
        loading = self._loadings[model] = Loading(self, model, _frame(wire.OPEN, model, allowed, copy))
        return loading

    def unload(self, model: int) -> None:
        """Order the bytes of a model, or of an artifact on its way, to be freed."""
        self.send(_frame(wire.UNLOAD, model))

    def convert(self, model: int, allowed: int, rows: bytes) -> asyncio.Future[Converted]:
        """Order a second engine, of ``allowed`` bytes at most, that answers ``rows`` (float32) as the first does.

        The future is cancelled if the model leaves, or the worker ends, before there is one.
        """
        future = self._converting[model] = self._loop.create_future()
        self.send(_frame(wire.CONVERT, model, allowed, rows))
        return future

    def measure(self) -> asyncio.Future[int]:
        """Ask for the bytes in use on the worker's heap."""
        future: asyncio.Future[int] = self._loop.create_future()
        self._measuring.append(future)
        self.send(_frame(wire.MEASURE, 0))
        return future

    def forget(self, loading: Loading) -> None:
        """Listen no more to a load; it has to be unloaded like a model, whatever has become of it in the worker."""
        self._loadings.pop(loading.model, None)

    def parsing(self) -> Loading | None:
        """Return the load that the worker's parser is at: the one to suspect if it crashes or hangs."""
        return self._loadings.get(self._box.parsing)

    def fail_all(self, epitaph: Epitaph) -> None:
        """The worker is gone: wake everyone who waits for it."""
        for loading in self._loadings.values():
            loading.error = WorkerLostError(epitaph, parsing=loading.parsing)
            loading.tell()
        self._loadings = {}
        for model in tuple(self._saving):
            self._end_saving(model, None)
        for future in self._measuring:
            future.cancel()
        for model in tuple(self._converting):
            self._converting.pop(model).cancel()

    def frame_received(self, header: tuple[Any, ...], data: memoryview, start: int, end: int) -> None:
        """Take one report."""
        _, kind, dimensions, _, model, number = header
        payload = bytes(data[start:end])
        if kind == wire.HELLO:
            self._hello(json.loads(payload))
        elif kind == wire.UNLOADED:
            self._end_saving(model, None)
            if converting := self._converting.pop(model, None):
                converting.cancel()
            self._unloaded(model)
        elif kind == wire.HEAP:
            measuring = self._measuring.pop(0)
            if not measuring.done():
                measuring.set_result(number)
        elif kind == wire.CONVERTED:
            self._converting.pop(model).set_result(Converted(number, **json.loads(payload)))
        elif kind == wire.SAVED:
            self._end_saving(model, Saved(number, **json.loads(payload)))
        elif kind == wire.ANSWER:
            self._take_answer(model, number, dimensions, payload)
        elif loading := self._loadings.get(model):
            self._advance(loading, kind, number, payload)

    def _end_saving(self, model: int, saved: Saved | None) -> None:
        future = self._saving.pop(model, None)
        if future is not None and not future.done():
            future.set_result(saved)

    def _take_answer(self, model: int, rows: int, dimensions: int, payload: bytes) -> None:
        loading = self._loadings.get(model)
        if loading is not None:
            values = np.frombuffer(bytearray(payload), np.float32)  # so that the caller's array is writable
            loading.answer = values.reshape(rows, -1) if dimensions > 1 else values

    def _advance(self, loading: Loading, kind: int, number: int, payload: bytes) -> None:
        if kind == wire.NEED:
            loading.needed, loading.asked = number, json.loads(payload)["asked"]
        elif kind == wire.LOADED:
            loading.result = LoadedFacts.from_frame(number, payload)
        elif kind == wire.FAILED:
            refusal = json.loads(payload)
            loading.error = _REFUSALS[refusal["kind"]](refusal["message"], **refusal["facts"])
            self._end_saving(loading.model, None)
        if loading.decided:
            del self._loadings[loading.model]
        loading.tell()


def _frame(kind: int, model: int, number: int = 0, payload: bytes | memoryview = b"") -> bytes:
    return b"".join((wire.ARTIFACT.pack(len(payload), kind, 0, 0, model, number), payload))
