"""text/csv: rows of numbers without a header, as SageMaker's XGBoost container takes them.

An empty cell is missing, and so is ``nan`` in any case. ``NA``, ``null`` and other words are refused, as the container
refuses them: a word read as missing would be a wrong prediction that nobody notices. An empty line is refused between
others, because of one column it could be a missing value, and left out it would shift all rows after it.

There are three ways through this module, the fastest that can read the body:

1. One row with commas: ``float`` on what ``bytes.split`` gives, 1.4 us for six cells. ``np.array`` of the pieces takes
   as long and warns of 1e39; ``np.loadtxt`` alone takes 2.5 us, ``pyarrow.csv`` 250.
2. Many rows: ``np.loadtxt`` on 64 KiB at a time, 0.1 s for 10,000 rows of 50, as orjson on a rewritten text and pyarrow
   take (80 to 100 ms). Between the pieces other threads get the GIL, if a server decodes large bodies in a thread.
3. Quoted cells and mistakes: the ``csv`` module cell by cell, two to three times slower, which knows line and column.
"""

from __future__ import annotations

import csv
import re
from array import array
from contextlib import suppress
from functools import partial
from io import BytesIO, TextIOWrapper
from math import nan
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from modelcache.errors import InvalidInputError
from modelcache.serving.codecs.base import Decoder, shown
from modelcache.serving.codecs.gathering import GatheredRows
from modelcache.serving.codecs.json_text import digits
from modelcache.serving.errors import UnsupportedMediaTypeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

_BOM = b"\xef\xbb\xbf"
_FLOAT32 = np.dtype(np.float32)
_PIECE = 1 << 16  # bytes
_WIDEST = _PIECE * 3 // 2
_NUMERALS = b"0123456789+-.eE,"
_LINE_ENDS = frozenset({b"", b"\n", b"\r\n"})
_QUOTED = re.compile(rb'"[^"]*"')
_DELIMITERS = b",;\t|"
_BEGINNING = re.compile(rb"[^\r\n]{0,4096}")
_LINE_END = re.compile(rb"\r\n?|\n")
_EMPTY_LINE = re.compile(rb"(?:\A|\n|\r(?!\n))[ \t]*[\r\n]")


def decoder(parameters: Mapping[str, str]) -> Decoder:
    """Return the decoder for ``text/csv; label_size=1``, which drops the first column, or 0, which is the default."""
    return Decoder(partial(_decode, label_size=label_size(parameters) or 0))


def label_size(parameters: Mapping[str, str]) -> int | None:
    """Return how many columns of labels come first, None if that is not said."""
    said = parameters.get("label_size")
    if said not in {None, "0", "1"}:
        raise UnsupportedMediaTypeError(f"label_size={said} is not read. Send label_size=1 or 0, or leave it out.")
    return None if said is None else int(said)


def _decode(body: bytes, n_features: int | None = None, *, label_size: int) -> Matrix:  # noqa: ARG001
    if not label_size and len(body) < _PIECE:
        rest = body.translate(None, _NUMERALS)
        if rest in _LINE_ENDS and body.endswith(rest):  # one row of plain numbers, separated by commas
            cells = _row(body.split(b","))
            if cells:
                return np.ndarray((1, len(cells)), _FLOAT32, cells)
    return _decode_any(body, label_size)


def _row(cells: list[bytes]) -> array[float] | None:
    """Return the numbers, or None if that takes a closer look; ``suppress`` would cost a fifth of the time."""
    try:
        return array("f", map(float, cells))
    except ValueError:
        if len(cells) == 1:  # an empty line is not a missing value
            return None
    try:
        return array("f", [float(cell) if cell.strip() else nan for cell in cells])
    except ValueError:
        return None


def _decode_any(body: bytes, label_size: int) -> Matrix:
    text = body.removeprefix(_BOM).rstrip(b"\r\n")
    rows = text.lstrip(b"\r\n")
    if not rows:
        raise InvalidInputError("The body is empty. Send one row of numbers a line, separated by commas.")
    delimiter = _delimiter(rows)
    if rows.isascii() and b'"' not in rows and not _EMPTY_LINE.search(rows):  # loadtxt drops any white space of Unicode
        with suppress(ValueError):  # by which loadtxt says that it needs a closer look
            matrix = np.concatenate([_read_piece(piece, delimiter) for piece in _pieces(rows)])
            if matrix.shape[1] > label_size:
                return np.ascontiguousarray(matrix[:, label_size:])
    skipped = len(_LINE_END.findall(text, 0, len(text) - len(rows)))
    return _read_cells(rows, delimiter, label_size, skipped)


def _delimiter(rows: bytes) -> str:
    """Return what separates the cells of the first line.

    No other candidate may be there: with ``1,5;2,5`` nobody knows which of the two stands for the decimal point. Spaces
    may be around any other, and separate cells where there is none.
    """
    beginning = _BEGINNING.match(rows)
    assert beginning
    line = _QUOTED.sub(b"", beginning[0]).strip(b" ")
    candidates = [chr(one) for one in _DELIMITERS if one in line]
    if len(candidates) > 1:
        listed = " and ".join(map(repr, candidates))
        raise InvalidInputError(
            f"Line 1 has {listed}: only one can separate cells. Write decimals with a point, and commas between cells."
        )
    return candidates[0] if candidates else " " if b" " in line else ","


def _pieces(rows: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(rows):
        end = rows.find(b"\n", start + _PIECE) + 1 or len(rows)
        if end - start > _WIDEST:
            raise ValueError("for each cell of one line loadtxt takes more than a hundred bytes")
        yield rows[start:end]
        start = end


def _read_piece(piece: bytes, delimiter: str) -> Matrix:
    try:
        return _loadtxt(piece, delimiter)
    except ValueError:
        if delimiter == " ":
            raise
        return _loadtxt(_filled(piece, delimiter.encode()), delimiter)


def _filled(piece: bytes, between: bytes) -> bytes:
    """Write nan into the empty cells; by ``replace``, which is ten times as fast as a regular expression."""
    twice, filled = between + between, between + b"nan" + between
    piece = piece.replace(twice, filled).replace(twice, filled).replace(b"\n" + between, b"\nnan" + between)
    for end in (b"\r\n", b"\n"):
        piece = piece.replace(between + end, between + b"nan" + end)
    return (b"nan" if piece.startswith(between) else b"") + piece + (b"nan" if piece.endswith(between) else b"")


def _loadtxt(piece: bytes, delimiter: str) -> Matrix:
    return np.loadtxt(BytesIO(piece), _FLOAT32, comments=None, delimiter=delimiter, ndmin=2, encoding="utf-8")


def _read_cells(rows: bytes, delimiter: str, label_size: int, skipped: int) -> Matrix:
    gathered = GatheredRows()
    lines = TextIOWrapper(BytesIO(rows), "utf-8", newline="")
    spaces = delimiter == " "
    reader = csv.reader((line.strip(" \r\n") for line in lines) if spaces else lines, delimiter=delimiter, strict=True)
    plain = rows.isascii() and b"_" not in rows
    for cells in _records(reader, skipped):
        line = reader.line_num + skipped
        if not cells or (len(cells) == 1 and cells[0].isspace()):
            raise InvalidInputError(f"Line {line} is empty. Leave it out, or write nan for a missing value.")
        if len(cells) <= label_size:
            raise InvalidInputError(f"Line {line} has no columns but the label of label_size=1. Send features.")
        gathered.add(_numbers(cells, label_size, line, plain=plain, spaces=spaces), f"Line {line}")
    return gathered.matrix()


def _records(reader: Any, skipped: int) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise InvalidInputError(f"Line {reader.line_num + skipped}: {error}. Send rows of numbers.") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"Line {reader.line_num + skipped + 1} or later is not UTF-8 ({error.reason}). Send text in UTF-8."
        ) from error


def _numbers(cells: list[str], label_size: int, line: int, *, plain: bool, spaces: bool) -> array[float]:
    del cells[:label_size]
    if plain:
        with suppress(ValueError):
            return array("f", map(float, cells))
    numbers = array("f")
    for column, cell in enumerate(cells, label_size + 1):
        number = _number(cell)
        if number is None or (spaces and not cell):
            _refuse(cell, line, column)
        numbers.append(number)
    return numbers


def _number(cell: str) -> float | None:
    if not cell.strip(" \t"):
        return nan
    with suppress(ValueError):
        if cell.isascii() and "_" not in cell:  # Python's own way to group digits is nobody's CSV
            return float(cell)
    return None


def _refuse(cell: str, line: int, column: int) -> NoReturn:
    where = f"Line {line}, column {column}"
    if not cell:
        raise InvalidInputError(
            f"{where}: two spaces in a row. Separate cells by one, and write nan for a missing value; or use commas."
        )
    remedy = "Leave a cell empty for a missing value."
    if line == 1 and cell.strip()[:1].isalpha():
        remedy += " Leave out the line of names, if it is one."
    raise InvalidInputError(f"{where}: {shown(cell)} is no number. {remedy}")


# Answers


def encode(predictions: NDArray[np.float32]) -> bytes:
    """Return a line for each row, outputs separated by commas, without a newline at the end.

    A client that splits the answer at newlines would find an empty number after it. The digits are the fewest that name
    each float32; NaN and infinities are written as Python reads them, ``nan``, ``inf``, ``-inf``.
    """
    text = digits(predictions)
    if b"null" in text:  # which stands for all three
        return b"\n".join(b",".join(b"%a" % one for one in row) for row in _shortest(predictions))
    return text.replace(b",", b"\n") if predictions.ndim == 1 else text[1:-1].replace(b"],[", b"\n")


def _shortest(predictions: NDArray[np.float32]) -> list[list[float]]:
    """Return the predictions as those Python floats whose digits are the fewest that name the float32."""
    return [[float(str(one)) for one in row] for row in predictions.reshape(len(predictions), -1)]
