"""The artifact lane: unpack artifacts as their bytes arrive, load them, measure them, free them.

Runs in a thread of its own. Unpacking (zlib) and parsing (XGBoost) release the GIL, so that the main thread goes on
predicting. Several artifacts may be arriving at once; they are loaded one at a time, which is what makes the heap
readings before and after belong to one model.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from select import POLLIN, poll
from threading import get_native_id
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelcache.pool import wire
from modelcache.worker.arriving import Arriving, new_hash, read_copy
from modelcache.worker.artifact import ArtifactError
from modelcache.worker.bound import growing_by, most_bytes
from modelcache.worker.converting import Conversions
from modelcache.worker.describing import facts_of
from modelcache.worker.heap import Scales, Slack
from modelcache.worker.inbox import Inbox
from modelcache.worker.models import LoadedModel
from modelcache.worker.predictors import PredictorFaultError, XGBoostPredictor, described, no_message
from modelcache.worker.threads import run_in_thread_of_its_own

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from modelcache.pool.blackbox import BlackBox
    from modelcache.worker.artifact import Unpacked
    from modelcache.worker.heap import Heap
    from modelcache.worker.models import Models
    from modelcache.worker.predictors import Matrix, Predictor

_PAUSE, _REST = 20, 1000
"""Milliseconds without a frame after which there is time for a reading, and for returning what is free."""

_NICE = 5
"""A third of the weight of threads that answer calls: a load may take longer on a busy machine, but the GIL has to come
back from a loader that does not run."""

_LEAST_PLAUSIBLE, _MOST_PLAUSIBLE = 0.5, 4.0
"""Heap per unpacked byte of the models seen lies between 0.98 and 1.63."""

_FIXED_HEAP = 256 << 10
"""What even a tiny model may take beyond its bytes."""

_ESTIMATED_HEAP = 1.65
"""Heap per unpacked byte where the allocator tells nothing."""


_LEFT_OF_EACH, _LEFT_OF_EACH_NAME = 512, 64
"""Bytes that XGBoost keeps of a booster for a thread that has asked it, and of each of its columns' names."""
_MOST_LEFT = 1 << 20
"""Bytes with which a thread goes on: to begin another takes as long as an unload."""


class _Parsed(NamedTuple):
    predictor: Predictor
    facts: bytes
    answer: Matrix | None
    """To the rows that came with the artifact."""


class ArtifactLane:
    """Serve loads and unloads from ``sock`` into ``models`` until the parent closes the other end."""

    def __init__(self, sock: socket.socket, models: Models, *, heap: Heap, box: BlackBox, threads: int) -> None:
        self._sock = sock
        self._inbox = Inbox(sock, wire.ARTIFACT)
        self._waiting = poll()  # not select(): the parent may have thousands of descriptors, and this is one of them
        self._waiting.register(sock, POLLIN)
        self._models = models
        self._heap = heap
        self._scales = Scales(heap)
        self._box = box
        self._threads = threads
        self._predictor: type[Predictor]
        self._sample: bytes | None = None
        """A model to be loaded first, if the predictor has one."""
        self._arriving: dict[int, Arriving] = {}
        self._slack = Slack(heap)
        self._conversions = Conversions(models, heap, self._report_conversion)
        self._prepared = False
        """True while the next load can begin without a reading, and with a booster that is there already."""
        self._left = 0
        """Bytes that XGBoost keeps for the thread that loads, about."""

    def run(self, find_predictor: Callable[[], type[Predictor]]) -> None:
        """Report that the worker is up, or why it cannot be; then serve until end of file."""
        try:
            self._predictor = find_predictor()
            self._warm_up()
        except (ImportError, PredictorFaultError) as error:
            reason = "missing" if isinstance(error, ImportError) else "fault"
            self._send(wire.HELLO, 0, os.getpid(), {"kind": reason, "message": str(error)})
            return
        # What is there now stays: no collection needs to walk through it, while predictions stand still.
        gc.freeze()
        self._send(wire.HELLO, 0, os.getpid(), {"exact_heap": self._heap.exact})
        while run_in_thread_of_its_own(self._serve):
            self._left = 0
            self._scales.pass_over()  # what the thread has left is free; and the next one begins with the sample
            self._prepared = False

    def _serve(self) -> bool:
        """Serve until end of file; True: until this thread has too much to leave behind.

        XGBoost keeps what it has last said of each booster for the thread that asked, and forgets it when that thread
        frees the booster, or ends. But models are freed by others.
        """
        self._load_sample()
        _give_way()
        while self._inbox.fill(wait=not self._has_chores()):
            frames = self._inbox.frames()
            for (_, kind, _, _, model, number), payload in frames:
                self._take(kind, model, number, payload)
            if not frames:
                self._do_a_chore()
            elif self._slack.is_pressing:
                self._slack.give_back()
            if self._left > _MOST_LEFT:
                return True
        return False

    def _warm_up(self) -> None:
        """Pay the library's one-time costs now: the first model would be charged for them, in time and bytes."""
        predictor = self._predictor
        sample = getattr(predictor, "sample", None)
        if sample is None:
            return
        try:
            self._sample = run_in_thread_of_its_own(sample)
            self._load_sample()
        except ImportError:  # of a package that is imported when it is needed
            raise
        except Exception as error:
            raise PredictorFaultError(
                f"The predictor {predictor} cannot load its sample ({described(error)})."
            ) from error

    def _load_sample(self) -> None:
        """Have the library set up what it keeps for this thread."""
        if self._sample is not None:
            loaded = LoadedModel(self._predictor.load(memoryview(self._sample), threads=self._threads))
            run_in_thread_of_its_own(loaded.free)

    def _take(self, kind: int, model: int, number: int, payload: memoryview) -> None:
        if kind == wire.BEGIN:
            self._arriving[model] = self._announced(number, **_facts_in(payload))
        elif kind == wire.OPEN:
            self._open(model, number, *_copy_in(payload))
        elif kind == wire.UNLOAD:
            self._unload(model)
        elif kind == wire.CONVERT:
            self._conversions.order(model, number, bytes(payload))
        elif kind == wire.MEASURE:
            self._send(wire.HEAP, 0, self._heap.in_use())
        elif model in self._arriving:  # the artifact may have been refused while its chunks were on the way
            with self._refusing(model):
                self._advance(kind, self._arriving[model], number, payload)
                self._proceed(model)

    @contextmanager
    def _refusing(self, model: int) -> Iterator[None]:
        try:
            yield
        except ArtifactError as error:
            self._fail(model, error.kind, str(error), error.facts)

    def _open(self, model: int, allowed: int, digest: str, known: int, path: bytes) -> None:
        self._get_ready_to_hash()
        any_format = self._predictor is not XGBoostPredictor
        arriving = self._arriving[model] = Arriving(allowed, digest, known=known, any_format=any_format)
        with self._refusing(model):
            data = read_copy(path)
            arriving.adopt(bytearray(data) if any_format else data)  # another library may write to its bytes

    def _get_ready_to_hash(self) -> None:
        if "hashlib" not in sys.modules:
            new_hash()
            self._disturb()  # what OpenSSL allocates, once, is no model's

    def _announced(self, allowed: int, digest: str | None = None, save: str | None = None) -> Arriving:
        if digest is not None:
            self._get_ready_to_hash()
        return Arriving(allowed, digest, save=save, any_format=self._predictor is not XGBoostPredictor)

    @staticmethod
    def _advance(kind: int, arriving: Arriving, number: int, payload: memoryview) -> None:
        if kind == wire.CHUNK:
            arriving.feed(payload)
        elif kind == wire.END:
            arriving.rows = _rows_in(payload, number)
            arriving.finish()
        elif kind == wire.GRANT:
            arriving.grant(number)

    def _proceed(self, model: int) -> None:
        """Load what is complete, or ask for what it is short of."""
        arriving = self._arriving[model]
        if short := arriving.short_of:
            self._send(wire.NEED, model, short, {"asked": arriving.asked})
        elif arriving.complete and arriving.allowed >= arriving.reader.declared:
            self._load(model, arriving.reader.finish())

    def _load(self, model: int, unpacked: Unpacked) -> None:
        if self._arriving[model].known:
            self._scales.pass_over()
        else:
            self._scales.begin(self._bytes_beside(model, unpacked))
        self._prepared = False
        started = perf_counter()
        self._box.parsing = model
        parsed = self._parse(model, unpacked)
        if parsed is None:
            self._heap.trim()  # what the parser had taken is free only now: its error's traceback held it
        else:
            self._settle(model, unpacked, parsed, perf_counter() - started)
        self._box.parsing = 0
        if parsed is not None:
            self._end_load(model, unpacked, parsed.predictor)

    def _settle(self, model: int, unpacked: Unpacked, parsed: _Parsed, seconds: float) -> None:
        """Weigh what was loaded, and report it; it may be asked from then on."""
        size = self._arriving[model].known or self._weighed(unpacked)
        self._models[model] = LoadedModel(parsed.predictor, size)
        self._slack.loaded(size)
        answer = parsed.answer
        frames = _frame(wire.ANSWER, model, answer.ndim, len(answer), answer.tobytes()) if answer is not None else b""
        took = wire.TOOK.pack(seconds, len(unpacked.data))
        self._sock.sendall(frames + _frame(wire.LOADED, model, 0, size, took + parsed.facts))

    def _weighed(self, unpacked: Unpacked) -> int:
        size = self._scales.end()
        if self._predictor is XGBoostPredictor or size <= 0:
            return _plausible(size, len(unpacked.data))
        return size

    def _end_load(self, model: int, unpacked: Unpacked, predictor: Predictor) -> None:
        save = self._arriving.pop(model).save
        if save is not None:
            self._save(model, predictor, unpacked, Path(save))
        self._slack.parsed(unpacked.format, len(unpacked.data))
        if isinstance(predictor, XGBoostPredictor):
            self._left += _LEFT_OF_EACH + sum(_LEFT_OF_EACH_NAME + len(name) for name in predictor.feature_names or ())
        if self._scales.sets_aside and not self._arriving:
            self._scales.set_aside(self._make_ahead)  # while the parent reads the report
            self._prepared = self._scales.at_rest

    def _bytes_beside(self, model: int, unpacked: Unpacked) -> int | None:
        """Return the bytes that are held for this load alone; None if that is not known."""
        others = any(arriving.holds_bytes for number, arriving in self._arriving.items() if number != model)
        is_alone = unpacked.container == "raw" and not others and self._predictor is XGBoostPredictor
        return sys.getsizeof(unpacked.data) if is_alone else None

    def _parse(self, model: int, unpacked: Unpacked) -> _Parsed | None:
        """Return the model, what it says of itself and to the first call, None if the load has failed."""
        # What another library may need, nobody knows; and a copy is of what has been loaded already.
        is_bounded = self._predictor is XGBoostPredictor and not self._arriving[model].is_copy
        most = most_bytes(len(unpacked.data), self._threads) if is_bounded else None
        try:
            with growing_by(most) if most is not None else nullcontext():
                return self._read(memoryview(unpacked.data), self._arriving[model].rows, unpacked)
        except PredictorFaultError as error:
            self._fail(model, "fault", str(error))
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises says what is wrong with the bytes
            if isinstance(error, MemoryError) and most is not None:
                self._fail(model, "corrupt", _insatiable(len(unpacked.data), most), {"limit": most})
            else:
                self._fail(model, "corrupt", str(error) or no_message(error))
        return None

    def _read(self, data: memoryview, rows: Matrix | None, unpacked: Unpacked) -> _Parsed:
        if self._predictor is XGBoostPredictor:
            xgboost, answer = XGBoostPredictor.load_for(data, rows, threads=self._threads)
            return _Parsed(xgboost, facts_of(xgboost, unpacked), answer)
        predictor = self._predictor.load(data, threads=self._threads)  # which is to predict in the main thread alone
        return _Parsed(predictor, facts_of(predictor, unpacked), None)

    def _save(self, model: int, predictor: Predictor, unpacked: Unpacked, path: Path) -> None:
        """Write the model as it loads fastest: UBJSON, unpacked; of another predictor, the bytes that it took.

        What is left of a file that could not be written is the parent's to remove: it has chosen the path.
        """
        try:
            data: bytes | bytearray = unpacked.data
            if unpacked.format == "json" and isinstance(predictor, XGBoostPredictor):
                data = run_in_thread_of_its_own(predictor.as_ubjson)
            _write_new(path, data)
        except (OSError, ValueError) as error:
            self._send(wire.SAVED, model, 0, {"error": str(error)})
        else:
            self._get_ready_to_hash()
            found = new_hash()
            found.update(data)
            self._send(wire.SAVED, model, len(data), {"digest": found.hexdigest()})

    def _unload(self, model: int) -> None:
        self._arriving.pop(model, None)
        self._conversions.forget(model)
        loaded = self._models.pop(model, None)
        if loaded is not None:
            run_in_thread_of_its_own(loaded.free)
            self._slack.unloaded(loaded.size)
            self._disturb()
        self._send(wire.UNLOADED, model)

    def _fail(self, model: int, kind: str, message: str, facts: dict[str, Any] | None = None) -> None:
        del self._arriving[model]
        self._send(wire.FAILED, model, 0, {"kind": kind, "message": message, "facts": facts or {}})

    def _disturb(self) -> None:
        self._scales.disturb()
        self._prepared = False

    # What can wait until there is nothing else to do

    def _has_chores(self) -> bool:
        return self._can_prepare() or bool(self._conversions) or self._slack.is_due

    def _do_a_chore(self) -> None:
        """Do one, unless a frame comes first."""
        prepares = self._can_prepare()
        if self._waiting.poll(_PAUSE if prepares or self._conversions else _REST):
            return
        if prepares:
            self._prepare()
        elif self._conversions:
            self._convert()
        else:
            self._slack.give_back()

    def _can_prepare(self) -> bool:
        return not self._prepared and not self._arriving

    def _prepare(self) -> None:
        """Do ahead what the next load would have to do."""
        if self._predictor is XGBoostPredictor:
            self._scales.come_to_rest()
            self._scales.set_aside(self._make_ahead)
        self._prepared = True

    def _make_ahead(self) -> bool:
        return XGBoostPredictor.prepare(threads=self._threads)

    def _convert(self) -> None:
        self._box.converting = self._conversions.next
        self._slack.loaded(self._conversions.carry_out())
        self._box.converting = 0
        self._disturb()

    def _report_conversion(self, model: int, size: int, refusal: str | None) -> None:
        self._send(wire.CONVERTED, model, size, {"refusal": refusal})

    def _send(self, kind: int, model: int, number: int = 0, facts: dict[str, Any] | None = None) -> None:
        self._sock.sendall(_report(kind, model, number, facts))


def _give_way() -> None:
    """Let warm calls go first: they take microseconds, and the scheduler's slices are milliseconds."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own there
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICE)


def _report(kind: int, model: int, number: int, facts: dict[str, Any] | None) -> bytes:
    return _frame(kind, model, 0, number, json.dumps(facts).encode() if facts is not None else b"")


def _frame(kind: int, model: int, dimensions: int, number: int, payload: bytes) -> bytes:
    return wire.ARTIFACT.pack(len(payload), kind, dimensions, 0, model, number) + payload


def _copy_in(payload: memoryview) -> tuple[str, int, bytes]:
    """Return what an OPEN frame has: the digest of a copy, the bytes it is known to take, and its path."""
    digest, known = wire.COPY.unpack_from(payload)
    return digest.hex(), known, bytes(payload[wire.COPY.size :])


def _facts_in(payload: memoryview) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(bytes(payload)) if payload else {}
    return facts


def _rows_in(payload: memoryview, count: int) -> Matrix | None:
    return np.frombuffer(bytes(payload), np.float32).reshape(count, -1) if count else None


def _write_new(path: Path, data: bytes | bytearray) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor has no path
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def _plausible(measured: int, unpacked: int) -> int:
    """Return ``measured`` unless something else must have allocated or freed meanwhile."""
    if _LEAST_PLAUSIBLE * unpacked <= measured <= _MOST_PLAUSIBLE * unpacked + _FIXED_HEAP:
        return measured
    return int(_ESTIMATED_HEAP * unpacked)


def _insatiable(unpacked: int, most: int) -> str:
    return (
        f"XGBoost asked for more than {most:,} bytes of memory to read these {unpacked:,}, and no sound model of that "
        "size takes as much: the artifact is damaged; upload it again"
    )
