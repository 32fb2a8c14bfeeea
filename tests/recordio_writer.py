"""Writes RecordIO-protobuf byte by byte, so that what reads it is not checked against itself."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAGIC = bytes.fromhex("0a23d7ce")
_FIELDS = {"float32_tensor": (2, "f"), "float64_tensor": (3, "d"), "int32_tensor": (7, "")}


def frame(payload: bytes, kind: int = 0) -> bytes:
    """Return a frame; ``kind`` is 0 for a whole record, 1 to 3 for parts of one."""
    return MAGIC + struct.pack("<I", len(payload) | kind << 29) + payload + bytes(-len(payload) % 4)


def record(features: Mapping[str, bytes], field: int = 1) -> bytes:
    """Return a Record of features, or of labels with ``field`` 2."""
    return b"".join(_bytes(field, _bytes(1, name.encode()) + _bytes(2, value)) for name, value in features.items())


def dense(values: Sequence[float], kind: str = "float32_tensor") -> bytes:
    """Return a Record of a dense row."""
    return record({"values": tensor(values, kind)})


def sparse(keys: Sequence[int], values: Sequence[float], width: int | None) -> bytes:
    """Return a Record of a sparse row."""
    return record({"values": tensor(values, "float32_tensor", keys, width)})


def tensor(values: Sequence[float], kind: str, keys: Sequence[int] = (), width: int | None = None) -> bytes:
    """Return a Value."""
    number, code = _FIELDS[kind]
    packed = struct.pack(f"<{len(values)}{code}", *values) if code else b"".join(map(_varint, map(int, values)))
    parts = _bytes(1, packed) if values else b""
    parts += _bytes(2, b"".join(map(_varint, keys))) if keys else b""
    parts += _bytes(3, _varint(width)) if width is not None else b""
    return _bytes(number, parts)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    return bytes((*written, number))
