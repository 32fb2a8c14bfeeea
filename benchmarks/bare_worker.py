"""A worker that has nothing but XGBoost's own call: the least that we know how to write for models in another process.

``python benchmarks/bare_worker.py DESCRIPTOR`` answers requests from that socket, until it is closed. A request is
:data:`REQUEST`, the path of an artifact, and rows of float32; an answer is :data:`ANSWER` and as many predictions. An
artifact is loaded when it is asked for first; all are forgotten when none is named. Nothing is checked, measured or
limited.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import ctypes
import socket
import sys
import tarfile
from pathlib import Path
from select import POLLIN, poll
from struct import Struct
from typing import Any

import numpy as np

REQUEST = Struct("=III")
"""Bytes of the path, rows, columns."""
ANSWER = Struct("=I")
"""Bytes of predictions."""

_CONFIG = (
    b'{"type":0,"training":false,"iteration_begin":0,"iteration_end":0,"strict_shape":false,"missing":NaN,"cache_id":0}'
)
_STAGE = np.empty(1 << 20, np.float32)
_STAGED_AT = _STAGE.ctypes.data


class Models:
    """The models that were asked for, by the paths of their artifacts."""

    def __init__(self) -> None:
        from xgboost.core import _LIB  # to call it without the Python layer is the point

        self._boosters: dict[bytes, Any] = {}
        self._proxy, self._shape = ctypes.c_void_p(), ctypes.POINTER(ctypes.c_uint64)()
        self._dimensions, self._values = ctypes.c_uint64(), ctypes.POINTER(ctypes.c_float)()
        self._into = [ctypes.byref(self._shape), ctypes.byref(self._dimensions), ctypes.byref(self._values)]
        self._interfaces: dict[tuple[int, int], bytes] = {}
        _LIB.XGProxyDMatrixCreate(ctypes.byref(self._proxy))
        self._predict_dense = _LIB.XGBoosterPredictFromDense

    def has(self, path: bytes) -> bool:
        """Say whether it is loaded."""
        return path in self._boosters

    def predict(self, path: bytes, rows: bytes, shape: tuple[int, int]) -> bytes:
        """Return the float32 of one prediction for each row."""
        if not path:
            self._boosters.clear()
            return b""
        booster = self._boosters.get(path)
        if booster is None:
            booster = self._boosters[path] = _load(Path(path.decode()))
        ctypes.memmove(_STAGED_AT, rows, len(rows))
        interface = self._interfaces.get(shape) or self._interfaces.setdefault(
            shape,
            b'{"data":[%d,true],"shape":[%d,%d],"typestr":"<f4","version":3}' % (_STAGED_AT, *shape),
        )
        failed = self._predict_dense(booster.handle, interface, _CONFIG, self._proxy, *self._into)
        assert not failed
        return ctypes.string_at(self._values, 4 * shape[0])


def _load(path: Path) -> Any:
    import xgboost

    booster = xgboost.Booster({"nthread": 1})
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as tar:
            member = tar.extractfile("xgboost-model")
            assert member is not None
            booster.load_model(bytearray(member.read()))
    else:
        booster.load_model(bytearray(path.read_bytes()))
    return booster


def serve(sock: socket.socket) -> None:
    """Answer what comes: the predictions that are asked for together in one write, and what has to be loaded by itself.

    It waits in poll(): who sleeps in recv() is woken up when the answer is read, too.
    """
    models, received, arrival = Models(), b"", poll()
    arrival.register(sock, POLLIN)
    while arrival.poll() and (data := sock.recv(1 << 20)):
        received, start, answers = received + data, 0, list[bytes]()
        while len(received) - start >= REQUEST.size:
            path_size, rows, columns = REQUEST.unpack_from(received, start)
            path_at = start + REQUEST.size
            rows_at, end = path_at + path_size, path_at + path_size + 4 * rows * columns
            if end > len(received):
                break
            path = received[path_at:rows_at]
            is_load = not models.has(path)
            predictions = models.predict(path, received[rows_at:end], (rows, columns))
            answers += [ANSWER.pack(len(predictions)), predictions]
            start = end
            if is_load:
                sock.sendall(b"".join(answers))
                answers = []
        received = received[start:]
        if answers:
            sock.sendall(b"".join(answers))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
