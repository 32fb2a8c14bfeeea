"""A worker process: two threads, two lanes, no event loop.

Started by its path, ``python .../modelcache/worker/__main__.py REQUESTS ARTIFACTS MEMORY THREADS AWAKE PREDICTOR
IMPORTS...``, with the descriptors of two sockets and of the memory that it shares with the parent, whether it may stay
awake between calls (1 or 0), and the folders that the parent imports from. Ends when the parent closes the request lane
or dies; ignores Ctrl-C, which is the parent's to decide about.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path[:0] = sys.argv[7:]  # as PYTHONPATH would, but that is split at each ':'

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "__main__" and "modelcache" not in sys.modules:
    # The package's __init__ imports asyncio and the stores, which a worker never needs: an empty package in its
    # place lets the modules below it be imported by themselves. It becomes the real one if a predictor's module asks
    # for one of the package's names.
    _folder = Path(__file__).resolve().parent.parent
    _spec = spec_from_file_location("modelcache", _folder / "__init__.py", submodule_search_locations=[str(_folder)])
    assert _spec is not None
    _package = module_from_spec(_spec)

    def _become_real(name: str) -> object:
        if name.startswith("__") or "__getattr__" not in vars(_package):
            raise AttributeError(name)
        del vars(_package)["__getattr__"]
        assert _spec is not None and _spec.loader is not None
        _spec.loader.exec_module(_package)
        return getattr(_package, name)

    vars(_package)["__getattr__"] = _become_real
    sys.modules["modelcache"] = _package

import faulthandler
import os
import signal
import socket
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from modelcache.pool.blackbox import BlackBox
from modelcache.pool.shared import Arena, map_memory
from modelcache.worker.heap import Heap
from modelcache.worker.loading import ArtifactLane
from modelcache.worker.predicting import RequestLane
from modelcache.worker.predictors import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.worker.models import Models

_GIL_HANDOVER = 0.0001
"""Seconds until a thread that holds the GIL is asked for it: the default of 5 ms would be the latency of a warm call
that arrives while the loader thread runs Python code."""

_BROKEN = 70
"""Exit code of a worker that met a fault of its own (EX_SOFTWARE)."""


def main(descriptors: list[int], threads: int, predictor: str, *, stays_awake: bool) -> None:
    """Serve both lanes until the parent goes away."""
    requests, artifacts, shared = descriptors
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not of all threads: one that runs meanwhile is read while it changes, and what that crashes is the report.
    faulthandler.enable(all_threads=False)
    sys.setswitchinterval(_GIL_HANDOVER)
    models: Models = {}
    memory = map_memory(shared)
    os.close(shared)
    box = BlackBox(memory)
    lane = ArtifactLane(socket.socket(fileno=artifacts), models, heap=Heap(), box=box, threads=threads)
    load_forever = partial(lane.run, lambda: resolve(predictor))
    threading.Thread(target=_until_parent_leaves, args=(load_forever,), daemon=True).start()
    calls = socket.socket(fileno=requests)
    _until_parent_leaves(RequestLane(calls, models, Arena(memory), box, stays_awake=stays_awake).run)


def _until_parent_leaves(serve: Callable[[], None]) -> NoReturn:
    """Run ``serve`` and end the whole process after it: neither thread is of use without the other."""
    status = 0
    try:
        serve()
    except ConnectionError:
        pass  # the parent is gone: the ordinary end
    except BaseException:  # noqa: BLE001 - a thread that dies silently would leave its callers waiting for ever
        traceback.print_exc()
        status = _BROKEN
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    *_descriptors, _threads, _stays_awake = map(int, sys.argv[1:6])
    main(_descriptors, _threads, sys.argv[6], stays_awake=bool(_stays_awake))
