"""Rows gathered one by one, dense or sparse, into one float32 matrix."""

from __future__ import annotations

from array import array
from math import nan
from typing import TYPE_CHECKING

import numpy as np

from modelcache.errors import FeatureMismatchError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

MOST_CELLS = 1 << 22
"""16 MiB of float32: what sparse rows may expand to, a little more than a dense body of SageMaker's 6 MiB can have."""


class GatheredRows:
    """Rows of equal length; what is wrong with one is said with its ``place``, such as "Line 3"."""

    def __init__(self) -> None:
        self._cells = array("f")
        self._width = 0

    def add(self, cells: array[float], place: str) -> None:
        """Append a row, its values in the order of the columns."""
        if not cells:
            raise InvalidInputError(f"{place} has no values. Send at least one in each row.")
        self._width = self._width or len(cells)
        if len(cells) != self._width:
            raise InvalidInputError(
                f"{place} is a row of {len(cells)}, and the first of {self._width}. Send rows of equal length."
            )
        self._cells.extend(cells)

    def add_sparse(self, keys: Sequence[int], values: Iterable[float], width: int, place: str) -> None:
        """Append a row of ``width`` columns, which misses all values but those of the columns ``keys``."""
        check_cells(len(self._cells) + width, place)
        if keys and not 0 <= min(keys) <= max(keys) < width:
            raise no_such_feature(next(key for key in keys if not 0 <= key < width), width, place)
        if len(set(keys)) != len(keys):
            raise twice(place)
        cells = array("f", (nan,)) * width
        for key, value in zip(keys, values, strict=True):
            cells[key] = value
        self.add(cells, place)

    def matrix(self) -> NDArray[np.float32]:
        """Return the rows; there has to be one."""
        if not self._cells:
            raise InvalidInputError("The body has no rows. Send at least one.")
        return np.ndarray((len(self._cells) // self._width, self._width), np.float32, self._cells)


def check_cells(count: int, place: str) -> None:
    """Refuse sparse rows that would take more cells than `MOST_CELLS`."""
    if count > MOST_CELLS:
        raise InvalidInputError(
            f"{place}: with what sparse rows leave out, there are more than {MOST_CELLS:,} cells. Send fewer rows."
        )


def no_such_feature(index: int, width: int, place: str, base: int = 0) -> FeatureMismatchError:
    """Return the error for an index that is beyond the columns of the model."""
    return FeatureMismatchError(
        f"{place}: index {index} is none of the {width} features, which are counted from {base}. "
        "Send the columns that the model was trained with.",
        expected=width,
        got=index - base + 1,
    )


def twice(place: str) -> InvalidInputError:
    """Return the error for an index that a row has twice."""
    return InvalidInputError(f"{place} has two values for one index. Send each index once.")
