"""A predictor for tests: it does as its artifact and its rows say. Imported in workers, so it imports little.

A row is (what to do, value, ...). The prediction is twice the value.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

ODD = "odd:Odd"

PREDICT, REFUSE, WAIT, ABORT, EXIT, KILL, MISCOUNT, COMPUTE, SHOUT, SPAWN = range(10)


_SCRIPT = 1 << 16
"""Bytes of an artifact that may be its script."""

COMPUTED = 0.7
"""CPU seconds that COMPUTE takes."""
SHOUTED = 300_000
"""Characters that SHOUT writes: more than the pipe and any reader's buffer hold."""


def artifact(**script: Any) -> bytes:
    """Return an artifact for :class:`Odd`.

    ``log``: a file to which each prediction appends a line with its values. ``gate``: a named pipe; a row that says
    WAIT waits until it has been opened for writing and closed. ``on_load``: "abort", "wait", "refuse" or "write".
    ``tell``: "modules", "environment", "imports", "descriptors", "bound" or "frozen", given as the feature names.
    """
    return json.dumps({"learner": {}, "version": [3, 0, 0], **script}).encode()


class Gate:
    """A named pipe at which a worker waits until the test lets it through."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._held = -1
        os.mkfifo(path)

    def reached(self) -> bool:
        """Return whether a worker stands at the gate; from then on it is held."""
        try:
            self._held = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody has opened it for reading
            return False
        return True

    def wait_for_worker(self) -> None:
        """Return when a worker stands at the gate."""
        deadline = time.monotonic() + 20
        while not self.reached():
            assert time.monotonic() < deadline, "no worker has come"
            os.sched_yield()

    def open(self) -> None:
        """Let it through."""
        os.close(self._held)


class Odd:
    """See :func:`artifact`."""

    n_features = 2
    n_outputs = 1

    def __init__(self, script: dict[str, Any]) -> None:
        self._script = script
        self.feature_names = _told(script.get("tell"))
        if self.feature_names:
            self.n_features = len(self.feature_names)

    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        """Read the script."""
        del threads
        script = json.loads(bytes(data[:_SCRIPT]))  # what follows may be half a gigabyte of blanks
        on_load = script.get("on_load")
        if on_load == "abort":
            os.abort()
        elif on_load == "refuse":
            raise ValueError("this artifact does not want to be loaded")
        elif on_load == "wait":
            _wait(script["gate"])
        elif on_load == "write":
            data[0] = data[0]
        return cls(script)

    def predict(self, rows: Matrix, output: str) -> Matrix:
        """Do what the rows say, each kind once."""
        if log := self._script.get("log"):
            with Path(log).open("a") as file:
                file.write(json.dumps([output, rows[:, 1].tolist()]) + "\n")
        for order in sorted({int(order) for order in rows[:, 0]}):
            self._do(order)
        doubled = 2 * rows[:, 1]
        return doubled[:-1] if MISCOUNT in rows[:, 0] else doubled

    def _do(self, order: int) -> None:
        if order == REFUSE:
            raise ValueError("the model does not like this row")
        if order == WAIT:
            _wait(self._script["gate"])
        elif order == ABORT:
            os.abort()
        elif order == EXIT:
            os._exit(3)
        elif order == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif order == COMPUTE:
            end = time.process_time() + COMPUTED
            while time.process_time() < end:
                pass
        elif order == SHOUT:
            sys.stderr.write("x" * SHOUTED)
        elif order == SPAWN:
            subprocess.Popen(["cat", self._script["gate"]], stdout=subprocess.DEVNULL)


def _wait(gate: str) -> None:
    Path(gate).read_bytes()


_TOLD: dict[str, Callable[[], Iterable[object]]] = {
    "modules": lambda: sys.modules,
    "environment": lambda: os.environ,
    "imports": lambda: sys.path,
    "descriptors": lambda: (f"{number} {target}" for number, target in _descriptors()),
    "bound": lambda: resource.getrlimit(resource.RLIMIT_DATA),
    "frozen": lambda: (gc.get_freeze_count(),),
}


def _told(what: str | None) -> tuple[str, ...] | None:
    return tuple(map(str, _TOLD[what]())) if what in _TOLD else None


def _descriptors() -> list[tuple[int, str]]:
    folder = Path("/proc/self/fd")
    open_now = [(int(entry.name), str(entry.readlink())) for entry in folder.iterdir() if entry.is_symlink()]
    # Reading the folder takes a descriptor, too.
    return sorted((number, target) for number, target in open_now if not target.startswith("/proc/"))


class Zipped(Odd):
    """Its artifacts are compressed scripts."""

    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        return super().load(memoryview(gzip.decompress(data)), threads=threads)
