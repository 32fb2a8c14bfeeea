"""text/libsvm: ``[label] [qid:1] index:value ...`` a line, sparse; what is not there is missing, as in XGBoost.

The first index is 0, as in XGBoost, unless ``index_base=1`` is said, by the content type or by whoever runs the app.
It is never guessed from a payload: the first row without column 0 would shift all columns by one.

A label may come first, if it has no colon. ``1:0.5`` at the beginning is column 1: that it is a label and its weight
has to be said by ``label_size=1``. Comments begin with ``#``. An empty line is refused between others: it could be a
row of missing values, which is written as a label alone.
"""

from __future__ import annotations

from array import array
from functools import partial
from io import BytesIO
from math import nan
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from modelcache.errors import InvalidInputError
from modelcache.serving.codecs.base import Decoder, shown
from modelcache.serving.codecs.csv_text import label_size
from modelcache.serving.codecs.gathering import check_cells, no_such_feature, twice
from modelcache.serving.errors import UnsupportedMediaTypeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

_BOM = b"\xef\xbb\xbf"


def decoder(parameters: Mapping[str, str], index_base: int) -> Decoder:
    """Return the decoder for ``text/libsvm; index_base=1; label_size=1``; ``index_base`` is used where none is said."""
    base = parameters.get("index_base", str(index_base))
    if base not in {"0", "1"}:
        raise UnsupportedMediaTypeError(f"index_base={base} is not read. Send index_base=0 or 1, or leave it out.")
    return Decoder(partial(_decode, base=int(base), label_size=label_size(parameters)), needs_width=True)


def _decode(body: bytes, n_features: int | None = None, *, base: int, label_size: int | None) -> Matrix:
    assert n_features is not None, "the decoder needs the width"
    keys, values = array("q"), array("f")
    lines, ends = array("q"), array("q")
    for number, tokens in _lines(body):
        entries = _features(tokens, label_size, number)
        try:
            for token in entries:
                key, _, value = token.partition(b":")
                keys.append(int(key))
                values.append(float(value))
        except (ValueError, OverflowError):
            _refuse(entries, number)
        lines.append(number)
        ends.append(len(keys))
    if not lines:
        raise InvalidInputError("The body has no rows. Send at least one.")
    check_cells(len(lines) * n_features, f"Line {lines[-1]}")
    return _scatter(_Entries(*map(np.array, (keys, values, lines, ends))), n_features, base)


class _Entries(NamedTuple):
    """All entries of a body in one array, as rows can be short and very many."""

    keys: NDArray[np.int64]
    values: Matrix
    lines: NDArray[np.int64]
    """Of each row: the number of its line."""
    ends: NDArray[np.int64]
    """Of each row: how many entries there are up to its end."""


def _scatter(entries: _Entries, width: int, base: int) -> Matrix:
    """Return the rows, each value in the column of its key."""
    keys, values, lines, ends = entries
    rows = np.repeat(np.arange(len(lines)), np.diff(ends, prepend=0))
    wrong = np.flatnonzero((keys < base) | (keys - base >= width))
    if wrong.size:
        raise no_such_feature(int(keys[wrong[0]]), width, f"Line {lines[rows[wrong[0]]]}", base)
    places = rows * width + keys - base
    ordered = np.sort(places)
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if same.size:
        raise twice(f"Line {lines[ordered[same[0]] // width]}")
    cells = np.full(len(lines) * width, nan, np.float32)
    cells[places] = values
    return cells.reshape(-1, width)


def _lines(body: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the tokens of each row, and the number of its line."""
    empty = rows = 0
    plain = b"_" not in body
    for number, line in enumerate(BytesIO(body.removeprefix(_BOM)), 1):
        text, comment, _ = line.partition(b"#")
        tokens = text.split()
        if not tokens:
            empty = empty or (number if rows and not comment else 0)
            continue
        if empty:
            raise InvalidInputError(f"Line {empty} is empty. Leave it out, or write 0 for a row of missing values.")
        if not plain and b"_" in text:  # Python's own way to group digits is nobody's libsvm
            raise InvalidInputError(f"Line {number} has an underscore. Send numbers.")
        rows += 1
        yield number, tokens


def _features(tokens: list[bytes], label_size: int | None, number: int) -> list[bytes]:
    """Return the tokens without label, weight and query."""
    first = tokens[0]
    if label_size or (label_size is None and b":" not in first):
        if not all(map(_is_number, first.split(b":", 1))):
            raise InvalidInputError(
                f"Line {number}: {shown(first)} is no label. Begin with a number, or with index:value."
            )
        tokens = tokens[1:]
    return tokens[1:] if tokens and tokens[0].startswith(b"qid:") else tokens


def _refuse(tokens: list[bytes], number: int) -> NoReturn:
    for column, token in enumerate(tokens, 1):
        key, _, value = token.partition(b":")
        if not key.isdigit() or not _is_number(value):
            raise InvalidInputError(
                f"Line {number}, entry {column}: {shown(token)} is not index:value. Send a whole number, a colon and a "
                "number, and label_size=1 in the content type if a label and its weight come first."
            )
    raise InvalidInputError(f"Line {number} has an index of too many digits. Send the columns of the model.")


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
