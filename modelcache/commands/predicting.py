"""``modelcache predict``: rows from a CSV file, predictions to standard output."""

from __future__ import annotations

import csv
from array import array
from contextlib import suppress
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np

from modelcache import InvalidInputError, ModelRegistry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import DTypeLike, NDArray

    from modelcache.records import Output

    Matrix = NDArray[np.float32]


class NamedRows:
    """As much of a pandas DataFrame as the registry reads, so that names travel with the values without pandas."""

    iloc = None
    ndim = 2

    def __init__(self, values: NDArray[np.float64], columns: tuple[str, ...]) -> None:
        self.columns = columns
        self.dtypes = (values.dtype,) * len(columns)
        self._values = values

    def to_numpy(self, dtype: DTypeLike, na_value: float) -> NDArray[Any]:
        """Return the values; those missing are NaN already."""
        assert np.isnan(na_value)
        return self._values.astype(dtype)


def read_table(lines: Iterable[str]) -> NDArray[np.float64] | NamedRows:
    """Return the rows of a CSV file, with the names of its columns if its first line has any that is no number."""
    reader = csv.reader(lines)
    header: tuple[str, ...] | None = None
    width = 0
    values = array("d")
    for cells in _records(reader):
        if not width:
            width = len(cells)
            if any(_number(cell) is None for cell in cells):
                header = tuple(cell.strip() for cell in cells)
                continue
        values.extend(_numbers(cells, width, reader.line_num))
    if not values:
        raise InvalidInputError("There are no rows to predict: give one row of numbers a line, separated by commas.")
    matrix = np.array(values).reshape(-1, width)
    return matrix if header is None else NamedRows(matrix, header)


async def predict(store: str, name: str, rows: NDArray[np.float64] | NamedRows, output: Output) -> Matrix:
    """Return the predictions of one model."""
    async with ModelRegistry(store, workers=1) as registry:
        return await registry.predict(name, rows, output=output)


def lines(predictions: Matrix, output: str) -> Iterator[str]:
    """Yield the predictions of each row, with as many digits as float32 has, and the numbers of leaves as such."""
    table = predictions.reshape(len(predictions), -1)
    for row in table.astype(np.int64) if output == "leaf" else table:
        yield ",".join(map(str, row))


def _records(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield the records that are not empty lines."""
    try:
        yield from filter(None, reader)
    except csv.Error as error:
        raise InvalidInputError(f"Line {reader.line_num}: {error}.") from error  # type: ignore[attr-defined]


def _numbers(cells: list[str], width: int, line: int) -> list[float]:
    if len(cells) != width:
        raise InvalidInputError(f"Line {line} has {len(cells)} cells, the first has {width}.")
    numbers = []
    for column, cell in enumerate(cells, 1):
        number = _number(cell)
        if number is None:
            raise InvalidInputError(
                f"Line {line}, column {column}: {cell!r} is no number. Leave a cell empty for a missing value."
            )
        numbers.append(number)
    return numbers


def _number(cell: str) -> float | None:
    if not cell.strip():
        return nan
    with suppress(ValueError):
        return float(cell) if "_" not in cell else None  # Python's own way to group digits is nobody's CSV
    return None
