"""What a caller passes as ``rows``, turned into the float32 matrix that travels to a worker.

Two steps, because rows that no model could take are refused before anything is loaded, while the columns of
the model are known only after::

    matrix, columns = as_matrix(rows)                                              # InvalidInputError
    order = column_order(6, columns, model=name, n_features=6, feature_names=...)  # FeatureMismatchError

Numbers are rounded as XGBoost rounds them: integers go straight to float32, not by way of float64, and what
is too large for float32 becomes infinite without a warning. NaN, None, nulls, masked values and the entries
that a sparse matrix does not store are missing; the zeros that it does store are zeros.

Data frames, Arrow tables and sparse matrices are recognised by what they can do, so that their libraries need
be neither installed nor imported.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections import Counter
from contextvars import Context, copy_context
from functools import lru_cache
from time import sleep
from traceback import format_exception_only
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
from numpy.ma import MaskedArray, getdata, getmaskarray

from modelcache.errors import FeatureMismatchError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from struct import Struct

    from numpy.typing import NDArray

    Values: TypeAlias = NDArray[np.float32]
    Names: TypeAlias = tuple[str, ...] | None

__all__ = [
    "LARGE_CELLS",
    "as_matrix",
    "column_order",
    "is_large",
    "is_numeric_array",
    "pack_row",
    "read_large",
    "write_rows",
]

_FLOAT32 = np.dtype(np.float32)
_MATRIX = 2  # dimensions
_NUMBERS = "fiub"  # the kinds of dtype that are numbers to XGBoost: float, int, unsigned, bool
_OTHERS = {"c": "complex numbers", "M": "dates", "m": "durations", "S": "bytes", "T": "text", "U": "text"}
_CATEGORICAL = ("categor", "enum", "dictionary")  # how the dtypes of pandas, polars and Arrow begin
_MISSING = frozenset({"NoneType", "NAType", "MaskedConstant"})  # by name: pandas may not be imported
_BYTES = frozenset({bytes, bytearray, memoryview})
_SHOWN = 5  # names in one message
_ROWS = (list, tuple, np.ndarray)
LARGE_CELLS = 1 << 18
"""1 MiB of float32. To copy as much takes the event loop 0.1 ms, to convert it from float64 0.3."""
_CELLS_OF_PIECE = 1 << 13
_PAUSE = 0.00005  # seconds, in which the loop's thread can wake up and take the GIL
_REMEDY = "Pass rows of numbers: lists, a 1-D or 2-D array, a DataFrame, an Arrow table or a sparse matrix."

# The rows that C converts as XGBoost does. It rounds by way of float64: not for integers alone.
_FLOATS = frozenset({frozenset({float}), frozenset({float, int})})


def _quiet_context() -> Context:
    with np.errstate(all="ignore"):
        return copy_context()


# Entering a copy of this context costs 0.1 us; entering np.errstate 0.9, far more than the cast it guards.
_LISTS = frozenset({list, tuple})

_ROW_NUMBERS = re.compile(r"(\b[Rr]ow |\brows\[)(\d+)")

_QUIET = Context().run(_quiet_context)


def pack_row(rows: Any) -> bytes | None:
    """Return the float32 of the one row that ``rows`` is, if it is lists of numbers with a float among them.

    It is what `as_matrix` makes of it, in half the time: that is for everything else, and for what this cannot read.
    """
    row = rows[0] if type(rows) is list and len(rows) == 1 else rows
    if type(row) is list and frozenset(map(type, row)) in _FLOATS:
        try:
            return _struct_of(len(row)).pack(*row)
        except struct.error:  # an integer that no float can hold
            return None
    return None


@lru_cache(maxsize=1024)
def _struct_of(columns: int) -> Struct:
    # In native order and not in standard, where what is too large for float32 would be an error.
    return struct.Struct(f"{columns}f")


def as_matrix(rows: Any) -> tuple[Values, Names]:
    """Return ``rows`` as a C-contiguous float32 matrix, and the names of its columns where they have names.

    The matrix has at least one row and one column; it is the caller's own array where that is already right.
    Whatever cannot become such a matrix raises `InvalidInputError`, and nothing else.
    """
    try:
        row = rows[0] if type(rows) is list and len(rows) == 1 else rows
        if type(row) is list and frozenset(map(type, row)) in _FLOATS:
            return np.ndarray((1, len(row)), _FLOAT32, array("f", row)), None
        if type(rows) is np.ndarray and rows.ndim == _MATRIX and rows.size:
            if rows.dtype is _FLOAT32 and (flags := rows.flags).c_contiguous and flags.aligned:
                return rows, None
            if rows.dtype.kind in _NUMBERS:
                return _QUIET.copy().run(rows.astype, _FLOAT32, "C"), None
        return _QUIET.copy().run(_convert, rows)
    except (InvalidInputError, MemoryError):
        raise
    except Exception as error:  # foreign objects raise what they like while they are read
        reason = "".join(format_exception_only(error)).strip()
        raise InvalidInputError(f"Rows of type {_type(rows)} could not be read ({reason}). {_REMEDY}") from error


def column_order(width: int, columns: Names, *, model: str, n_features: int, feature_names: Names) -> list[int] | None:
    """Return which of ``width`` columns is to come first, second ...; None if they are in the order of the model."""
    if columns is None or feature_names is None or columns == feature_names:
        if width == n_features:
            return None
        raise _wrong_count(width, model, n_features, feature_names)
    places = {name: place for place, name in enumerate(columns)}
    if len(columns) == len(feature_names) and places.keys() == set(feature_names):
        return [places[name] for name in feature_names]
    raise _wrong_names(columns, model, n_features, feature_names)


# Large batches: converted slice by slice, or in a thread, as the event loop has others to serve


def is_large(rows: Any) -> bool:
    """Say whether ``rows`` are several with more than `LARGE_CELLS` values, as far as their outside tells."""
    kind = type(rows)
    if kind is list or kind is tuple:
        return len(rows) > 1 and isinstance(rows[0], _ROWS) and len(rows) * len(rows[0]) > LARGE_CELLS
    try:
        shape = rows.shape
        return len(shape) == _MATRIX and shape[0] > 1 and shape[0] * shape[1] > LARGE_CELLS
    except Exception:  # noqa: BLE001 - foreign objects raise what they like, and as_matrix() says what it was
        return False


def is_numeric_array(rows: Any) -> bool:
    """Say whether `write_rows` takes ``rows`` as they are, once they have two dimensions."""
    return type(rows) is np.ndarray and rows.dtype.kind in _NUMBERS


def read_large(rows: Any) -> tuple[Values, Names]:
    """Do what `as_matrix` does, in a thread.

    NumPy lets go of the GIL while it converts numbers, but not while it reads a list, which takes seconds for a million
    rows: lists are read in pieces, with a pause after each in which the event loop gets hold of it.
    """
    return (_in_pieces(rows), None) if type(rows) in _LISTS else as_matrix(rows)


def _in_pieces(rows: Sequence[Any]) -> Values:
    width = len(rows[0])
    values = np.empty((len(rows), width), np.float32)
    step = max(1, _CELLS_OF_PIECE // max(1, width))
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        try:
            read = as_matrix(piece)[0]
        except InvalidInputError as error:
            raise InvalidInputError(_counted_from(start, str(error))) from error
        if read.shape != (len(piece), width):  # NumPy would repeat a single value
            raise InvalidInputError(f"Row {start} is not of the {width} values of row 0. Pass rows of equal length.")
        values[start : start + step] = read
        sleep(_PAUSE)
    return values


def _counted_from(start: int, message: str) -> str:
    """Number the rows in a message about a piece as the caller does."""
    return _ROW_NUMBERS.sub(lambda found: f"{found[1]}{int(found[2]) + start}", message)


def write_rows(cells: NDArray[Any], order: list[int] | None, into: Values) -> None:
    """Put numbers of any dtype ``into`` float32 of the same shape, with the columns in ``order``."""
    if order is None:
        _QUIET.copy().run(np.copyto, into, cells, casting="unsafe")
    else:
        cells.take(order, axis=1, out=into, mode="clip")  # not "raise", which would make a copy first


def _convert(rows: Any) -> tuple[Values, Names]:
    values, names = _read(rows)
    if values.ndim == 1:
        values = values.reshape(1, -1)
    if values.ndim != _MATRIX:
        raise InvalidInputError(f"Rows have {values.ndim} dimensions (shape {values.shape}). {_REMEDY}")
    if not values.size:
        raise InvalidInputError(f"Rows of shape {values.shape} are empty. Pass at least one row of one value.")
    return values, names


def _read(rows: Any) -> tuple[Values, Names]:
    if isinstance(rows, np.ndarray):
        return (_from_masked(rows) if isinstance(rows, MaskedArray) else _from_array(rows)), None
    if isinstance(rows, (list, tuple)):
        return _from_sequence(rows), None
    for sign, read in _FOREIGN.items():
        if hasattr(rows, sign):
            return read(rows)
    _refuse_categorical(getattr(rows, "dtype", None), "rows")
    cells = np.asarray(rows)
    if cells.ndim == 0 or type(rows) in _BYTES:
        raise InvalidInputError(f"Rows cannot be of type {_type(rows)}. {_REMEDY}")
    return _from_array(cells), None


def _from_array(cells: NDArray[Any], where: str = "rows") -> Values:
    kind = cells.dtype.kind
    if kind in _NUMBERS:
        return cells.astype(_FLOAT32, "C", subok=False)
    if kind != "O":
        _refuse(where, _OTHERS.get(kind, f"values of dtype {cells.dtype}"))
    return _from_objects(cells, where)


def _from_masked(cells: MaskedArray[Any, Any]) -> Values:
    values = _from_array(getdata(cells))
    values[getmaskarray(cells)] = np.nan
    return values


def _from_objects(cells: NDArray[Any], where: str) -> Values:
    values = [None if type(value).__name__ in _MISSING else value for value in cells.ravel().tolist()]
    wrong = {kind for kind in set(map(type, values)) - {type(None)} if not _is_number(kind)}
    if wrong:
        place = next(place for place, value in enumerate(values) if type(value) in wrong)
        at = ", ".join(map(str, np.unravel_index(place, cells.shape)))
        _refuse(f"{where}[{at}]", f"a {_type(values[place])}")
    return np.array(values, np.float64).astype(_FLOAT32).reshape(cells.shape)


def _is_number(kind: type) -> bool:
    if issubclass(kind, np.generic):  # each of these has __float__, np.str_ and np.datetime64 too
        return np.dtype(kind).kind in _NUMBERS
    return hasattr(kind, "__float__") and not issubclass(kind, np.ndarray)


def _from_sequence(rows: Sequence[Any]) -> Values:
    kinds = set(map(type, rows))
    if not _BYTES.isdisjoint(kinds):
        _refuse("rows", "bytes")  # NumPy would read them as small integers
    if MaskedArray in kinds:  # NumPy would drop the masks
        rows = [_from_masked(np.ma.asarray(row)) for row in rows]
    try:
        cells = np.asarray(rows)
    except ValueError:
        _refuse_ragged(rows)
        raise
    if cells.dtype.kind in "US":  # one text makes text of all: look for it among the values as they came
        cells = np.asarray(rows, object)
    return _from_array(cells)


def _refuse_ragged(rows: Sequence[Any]) -> None:
    widths = [f"has {len(row)} values" if hasattr(row, "__len__") else "is a single value" for row in rows]
    for place, width in enumerate(widths):
        if width != widths[0]:
            raise InvalidInputError(f"Row {place} {width}, row 0 {widths[0]}. Pass rows of equal length.")


def _from_pandas(frame: Any) -> tuple[Values, Names]:
    if frame.ndim == 1:  # a Series: one row, named by its index
        return _from_series(frame, "rows"), _names(frame.index)
    if all(dtype.kind in _NUMBERS for dtype in frame.dtypes):  # all at once, several times faster
        values = np.array(frame.to_numpy(dtype=_FLOAT32, na_value=np.nan), _FLOAT32, order="C")  # it may be a view
    else:
        values = _stack(frame.columns, (column for _, column in frame.items()), _from_series)
    return values, _names(frame.columns)


def _from_series(series: Any, where: str) -> Values:
    _refuse_categorical(series.dtype, where)
    if series.dtype.kind in _NUMBERS:
        return np.array(series.to_numpy(dtype=_FLOAT32, na_value=np.nan), _FLOAT32)
    return _from_array(series.to_numpy(), where)


def _from_polars(frame: Any) -> tuple[Values, Names]:
    return _stack(frame.columns, frame.get_columns(), _from_polars_series), _names(frame.columns)


def _from_polars_series(series: Any, where: str = "rows") -> Values:
    _refuse_categorical(series.dtype, where)
    if not series.null_count():
        return _from_array(np.asarray(series), where)
    return _scatter(np.asarray(series.is_null()), _from_array(np.asarray(series.drop_nulls()), where))


def _from_arrow(table: Any) -> tuple[Values, Names]:
    return _stack(table.column_names, table.columns, _from_arrow_array), _names(table.column_names)


def _from_arrow_array(column: Any, where: str = "rows") -> Values:
    _refuse_categorical(column.type, where)
    return _scatter(np.asarray(column.is_null()), _from_array(np.asarray(column.drop_null()), where))


def _scatter(missing: NDArray[np.bool_], present: Values) -> Values:
    """Put NaN between the values that are present: with nulls inside, integers would come as float64."""
    values = np.full(missing.shape, np.nan, _FLOAT32)
    values[~missing] = present
    return values


def _from_sparse(matrix: Any) -> tuple[Values, Names]:
    csr = matrix.tocsr()
    stored = csr.indptr[-1]
    rows = np.repeat(np.arange(len(csr.indptr) - 1), np.diff(csr.indptr))
    values = np.full((len(csr.indptr) - 1, csr.shape[-1]), np.nan, _FLOAT32)
    values[rows, csr.indices[:stored]] = _from_array(csr.data[:stored])
    return values, None


def _refuse_lazy(frame: Any) -> NoReturn:
    raise InvalidInputError(f"A {_type(frame)} holds no rows yet. Pass what its .collect() returns.")


# What tells the rows of other libraries apart, most telling first.
_FOREIGN: dict[str, Callable[[Any], tuple[Values, Names]]] = {
    "iloc": _from_pandas,
    "get_columns": _from_polars,
    "column_names": _from_arrow,
    "collect": _refuse_lazy,  # polars, before its Series: a LazyFrame has drop_nulls too
    "drop_nulls": lambda series: (_from_polars_series(series), None),
    "drop_null": lambda column: (_from_arrow_array(column), None),
    "tocsr": _from_sparse,
}


def _stack(names: Iterable[Any], columns: Iterable[Any], read: Callable[[Any, str], Values]) -> Values:
    values = [read(column, f"column {name!r}") for name, column in zip(names, columns, strict=True)]
    return np.array(values, _FLOAT32, ndmin=_MATRIX).T.copy()


def _names(labels: Iterable[Any]) -> Names:
    names = tuple(labels)
    return names if all(isinstance(name, str) for name in names) else None


def _type(value: Any) -> str:
    return type(value).__name__


def _refuse(where: str, what: str) -> NoReturn:
    remedy = "Pass numbers, and None or NaN where a value is missing."
    if what == "a dict":
        remedy = "Pass pandas.DataFrame(rows), or the values alone in the order of the model's columns."
    raise InvalidInputError(f"{where} holds {what}. {remedy}")


def _refuse_categorical(dtype: Any, where: str) -> None:
    if str(dtype).lower().startswith(_CATEGORICAL):
        raise InvalidInputError(
            f"{where} is categorical ({dtype}). Pass the codes that the model was trained on: codes counted "
            "anew from these rows can differ from them, and the predictions would be wrong."
        )


def _wrong_count(got: int, model: str, n_features: int, feature_names: Names) -> FeatureMismatchError:
    order = f": {_listed(feature_names)}" if feature_names else ""
    return FeatureMismatchError(
        f"Model {model!r} takes {n_features} columns, the rows have {got}. Pass all of them in order{order}.",
        model=model,
        expected=n_features,
        got=got,
    )


def _wrong_names(
    columns: tuple[str, ...], model: str, n_features: int, feature_names: tuple[str, ...]
) -> FeatureMismatchError:
    missing = tuple((Counter(feature_names) - Counter(columns)).elements())
    unexpected = tuple((Counter(columns) - Counter(feature_names)).elements())
    repeated = tuple(name for name, times in Counter(columns).items() if times > 1)
    facts = {"missing": missing, "unexpected": unexpected, "given more than once": repeated}
    found = "; ".join(f"{what}: {_listed(names)}" for what, names in facts.items() if names)
    return FeatureMismatchError(
        f"The columns of the rows are not those of model {model!r} ({found}). "
        "Rename or select columns, or pass the values without names to go by position.",
        model=model,
        expected=n_features,
        got=len(columns),
        missing=missing,
        unexpected=unexpected,
    )


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
