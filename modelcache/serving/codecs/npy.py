"""application/x-npy: NumPy's own format, one array of numbers of one or two dimensions.

The header is read here, not by ``np.load``: that evaluates it as Python, allocates as many bytes as it asks for before
it looks whether they came, and warns about headers that are years old.
"""

from __future__ import annotations

import re
from io import BytesIO
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from modelcache.errors import InvalidInputError
from modelcache.serving.codecs.base import Decoder, shown

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4}  # of the versions for arrays without named fields
_MOST_HEADER = 1024  # bytes; an array of numbers has less than 128
_FACTS = (
    re.compile(rb"""['"]descr['"]\s*:\s*['"]([^'"]*)['"]"""),
    re.compile(rb"""['"]fortran_order['"]\s*:\s*(True|False)\b"""),
    re.compile(rb"""['"]shape['"]\s*:\s*\(([\d\s,]*)\)"""),
)
_NUMBERS = re.compile(rb"[<>=|]?(?:f[248]|[iu][1248])")
_MOST_DIMENSIONS = 2
_REMEDY = "Send what np.save writes for an array of numbers of one or two dimensions."


def decoder() -> Decoder:
    """Return the decoder."""
    return Decoder(_decode)


def _decode(body: bytes, n_features: int | None = None) -> NDArray[Any]:  # noqa: ARG001
    """Return the array, which is a view of ``body``."""
    header, start = _header(body)
    found = [fact.search(header) for fact in _FACTS]
    descr, fortran, shape = (fact[1] if fact else None for fact in found)
    if descr is None or fortran is None or shape is None or not _NUMBERS.fullmatch(descr):
        raise InvalidInputError(f"The header of the array is {shown(header.strip())}. {_REMEDY}")
    return _array(body, start, np.dtype(descr.decode()), _shape(shape), "F" if fortran == b"True" else "C")


def _header(body: bytes) -> tuple[bytes, int]:
    """Return the header, and where the numbers begin."""
    size = _LENGTH_BYTES.get(body[6:8])
    if not body.startswith(_MAGIC) or size is None:
        raise InvalidInputError(f"The body does not begin as an npy file of version 1 or 2 does. {_REMEDY}")
    start = 8 + size
    end = start + int.from_bytes(body[8:start], "little")
    if end > min(len(body), start + _MOST_HEADER):
        raise InvalidInputError(f"The header of the array ends in the middle, or is too long. {_REMEDY}")
    return body[start:end], end


def _shape(text: bytes) -> tuple[int, ...]:
    numbers = text.replace(b" ", b"").removesuffix(b",").split(b",")
    if len(numbers) > _MOST_DIMENSIONS or not all(0 < len(number) <= 18 and number.isdigit() for number in numbers):  # noqa: PLR2004
        raise InvalidInputError(f"The shape of the array is ({shown(text)}). {_REMEDY}")
    return tuple(map(int, numbers))


def _array(body: bytes, start: int, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> NDArray[Any]:
    needed = prod(shape) * dtype.itemsize
    if not needed or needed != len(body) - start:
        raise InvalidInputError(
            f"An array of shape {shape} and type {dtype} has {needed:,} bytes; {len(body) - start:,} came. {_REMEDY}"
        )
    cells: NDArray[Any] = np.frombuffer(body, dtype, offset=start)
    cells = cells.reshape(shape, order="F" if order == "F" else "C")
    return cells.reshape(1, -1) if cells.ndim == 1 else cells


def encode(predictions: NDArray[np.float32]) -> bytes:
    """Return a file that ``np.load`` reads."""
    file = BytesIO()
    np.save(file, predictions, allow_pickle=False)
    return file.getvalue()
