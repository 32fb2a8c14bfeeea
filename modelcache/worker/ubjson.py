"""Reads the UBJSON that XGBoost writes: long arrays as views of the bytes, in NumPy's big-endian types.

XGBoost's JSON would do with the standard library, which holds the GIL for all of a document: 60 ms for 500 trees, in
which the worker answers nobody.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_NUMBERS = {
    ord(marker): np.dtype(kind)
    for marker, kind in {"i": ">i1", "U": ">u1", "I": ">i2", "l": ">i4", "L": ">i8", "d": ">f4", "D": ">f8"}.items()
}
_CONSTANTS = {ord("T"): True, ord("F"): False, ord("Z"): None}
_OBJECT, _END_OF_OBJECT, _ARRAY, _END_OF_ARRAY, _TEXT, _TYPE, _COUNT = b"{}[]S$#"


def read(data: bytes) -> Any:
    """Return the value in ``data``; raises KeyError, IndexError or ValueError if it is no UBJSON."""
    return _Reader(data).value()


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def value(self) -> Any:
        marker = self._marker()
        if marker == _OBJECT:
            return self._object()
        if marker == _ARRAY:
            return self._array()
        if marker == _TEXT:
            return self._text()
        return _CONSTANTS[marker] if marker in _CONSTANTS else self._number(marker)

    def _object(self) -> dict[str, Any]:
        found = {}
        while not self._skips(_END_OF_OBJECT):
            key = self._text()
            found[key] = self.value()
        return found

    def _array(self) -> Any:
        if self._skips(_TYPE):
            kind = _NUMBERS[self._marker()]
            self._at += 1  # the count's marker, which has to follow a type
            return self._numbers(kind, self._length())
        if self._skips(_COUNT):
            return [self.value() for _ in range(self._length())]
        found = []
        while not self._skips(_END_OF_ARRAY):
            found.append(self.value())
        return found

    def _text(self) -> str:
        length = self._length()
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _length(self) -> int:
        return int(self._number(self._marker()))

    def _number(self, marker: int) -> int | float:
        number: int | float = self._numbers(_NUMBERS[marker], 1)[0].item()
        return number

    def _numbers(self, kind: np.dtype[Any], count: int) -> np.ndarray[Any, Any]:
        found = np.frombuffer(self._data, kind, count, self._at) if count else np.empty(0, kind)
        self._at += count * kind.itemsize
        return found

    def _marker(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _skips(self, marker: int) -> bool:
        found = self._data[self._at] == marker
        self._at += found
        return found
