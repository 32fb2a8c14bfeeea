"""Rows as callers have them become the matrix XGBoost would have seen, or an error that says what to do."""

from __future__ import annotations

import datetime as dt
import json
import pickle
import subprocess
import sys
import warnings
from array import array
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import xgboost
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from modelcache.errors import FeatureMismatchError, InvalidInputError
from modelcache.inputs import as_matrix, column_order, pack_row, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

NAN = float("nan")
# Straight to float32 it rounds down. By way of float64 it becomes a tie first, which float32 then rounds up.
TWICE = 2**60 + 2**37 + 2**36 - 1
ONCE = np.float32(np.int64(TWICE))
ROW = [1990, 3047, 5, 1.0, 1.11, 2]
SLOPPY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def matrix_of(rows: Any) -> NDArray[np.float32]:
    return as_matrix(rows)[0]


def same(got: NDArray[np.float32], expected: Any) -> None:
    expected = np.asarray(expected, np.float32)
    assert got.dtype == np.dtype(np.float32)
    assert got.dtype.isnative
    assert got.flags.c_contiguous
    assert got.flags.aligned
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, expected, strict=True)


@pytest.fixture(scope="module")
def booster() -> xgboost.Booster:
    """Tell missing from zero, and the two float32 neighbours of TWICE from each other."""
    values = np.array([NAN, -1e30, 0, 1, 2, ONCE, np.nextafter(ONCE, np.float32(np.inf))], np.float32)
    rows = np.stack(np.meshgrid(values, values), axis=-1).reshape(-1, 2)
    labels = np.arange(len(rows))
    params = {"max_depth": 8, "tree_method": "exact", "lambda": 0, "min_child_weight": 0, "eta": 1}
    return xgboost.train(params, xgboost.DMatrix(rows, labels), 3)


ONE_ROW = [[1.0, 2.0, 3.0]]
SQUARE = np.arange(6.0).reshape(2, 3)

ACCEPTED: dict[str, tuple[Any, Any]] = {
    "one row in a list": ([ROW], [ROW]),
    "flat row": (ROW, [ROW]),
    "one value": ([5], [[5]]),
    "one cell": ([[5.5]], [[5.5]]),
    "tuples": (((1, 2), (3.5, 4)), [[1, 2], [3.5, 4]]),
    "tuple in list": ([(1.0, 2.0, 3.0)], ONE_ROW),
    "rows": ([[1, 2.5], [3, 4]], [[1, 2.5], [3, 4]]),
    "bools": ([[True, False, 2]], [[1, 0, 2]]),
    "bools and floats": ([[True, 0.5]], [[1, 0.5]]),
    "range": (range(3), [[0, 1, 2]]),
    "array.array": (array("d", [1, 2, 3]), ONE_ROW),
    "list of arrays": ([np.array([1, 2]), np.array([3, 4])], [[1, 2], [3, 4]]),
    "list of float32": (list(np.array([1, 2, 3], np.float32)), ONE_ROW),
    "list of Series": ([pd.Series([1, 2]), pd.Series([3, 4])], [[1, 2], [3, 4]]),
    "NaN": ([[NAN, 1.0]], [[NAN, 1]]),
    "None": ([[None, 1, 2.5]], [[NAN, 1, 2.5]]),
    "only None": ([[None, None]], [[NAN, NAN]]),
    "pandas.NA": ([[pd.NA, 1, None]], [[NAN, 1, NAN]]),
    "numpy.ma.masked among objects": ([[None, np.ma.masked, 1]], [[NAN, NAN, 1]]),
    "infinity": ([[float("inf"), -float("inf")]], [[np.inf, -np.inf]]),
    "too large a float": ([[1e300, -1e300, 1]], [[np.inf, -np.inf, 1]]),
    "too small a float": ([[1e-300, 1]], [[0, 1]]),
    "too large a float64": (np.array([[1e300, 1.0]]), [[np.inf, 1]]),
    "too large a float beside None": ([[1e300, None]], [[np.inf, NAN]]),
    "Decimal and Fraction": ([[Decimal("1.5"), Fraction(1, 4)]], [[1.5, 0.25]]),
    "integers beyond 64 bits": ([[2**70, 1], [1, 2]], [[2.0**70, 1], [1, 2]]),
    "1-D": (np.array([1, 2, 3]), ONE_ROW),
    "1-D float32": (np.array([1, 2, 3], np.float32), ONE_ROW),
    "column": (SQUARE[:, :1], SQUARE[:, :1]),
    "strided": (np.arange(12.0).reshape(2, 6)[:, ::2], [[0, 2, 4], [6, 8, 10]]),
    "strided float32": (np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2], [[0, 2, 4], [6, 8, 10]]),
    "reversed": (SQUARE[::-1, ::-1], SQUARE[::-1, ::-1].copy()),
    "broadcast": (np.broadcast_to(np.float32(1), (2, 2)), [[1, 1], [1, 1]]),
    "Fortran": (np.asfortranarray(SQUARE), SQUARE),
    "Fortran float32": (np.asfortranarray(SQUARE.astype(np.float32)), SQUARE),
    "matrix": (np.asfortranarray(SQUARE).view(np.matrix), SQUARE),
    "unaligned": (np.frombuffer(b"\0" + SQUARE.astype("f4").tobytes(), "f4", offset=1).reshape(2, 3), SQUARE),
    "object array": (np.array([[1, None], [2.5, True]], object), [[1, NAN], [2.5, 1]]),
    "masked": (np.ma.array([[1.5, 2]], mask=[[False, True]]), [[1.5, NAN]]),
    "masked integers": (np.ma.array([1, 2], mask=[True, False]), [[NAN, 2]]),
    "nothing masked": (np.ma.array([[1, 2]]), [[1, 2]]),
    "list of masked": ([np.ma.array([1, 2], mask=[True, False]), [3, 4]], [[NAN, 2], [3, 4]]),
    "Series": (pd.Series([1, 2, 3]), ONE_ROW),
    "nullable Series": (pd.Series([1, None], dtype="Int64"), [[1, NAN]]),
    "object Series": (pd.Series([1, None, 2.5], dtype=object), [[1, NAN, 2.5]]),
    "pandas array": (pd.array([1, None], dtype="Int64"), [[1, NAN]]),
    "polars Series": (pl.Series([TWICE, None]), [[ONCE, NAN]]),
    "arrow array": (pa.array([TWICE, None]), [[ONCE, NAN]]),
}
ACCEPTED |= {
    f"dtype {code}": (np.array([[1, 0, 3]]).astype(code), np.array([[1, 0, 3]]).astype(code).astype("f4"))
    for code in ["?", "i1", "u1", "i2", "<i4", ">i4", "i8", "u8", "f2", "f4", ">f4", "f8", ">f8", "g"]
}


@pytest.mark.parametrize(("rows", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepts(rows: Any, expected: Any) -> None:
    """Anything of numbers in one or two dimensions is rows, and what it misses is NaN."""
    same(matrix_of(rows), expected)
    packed = pack_row(rows)
    assert packed is None or packed == matrix_of(rows).tobytes()
    if isinstance(rows, np.ndarray):
        readonly = rows.copy()
        readonly.flags.writeable = False
        same(matrix_of(readonly), expected)


@given(row=st.lists(st.floats() | st.integers(-(10**400), 10**400), min_size=2, max_size=9), nested=st.booleans())
@example(row=[1.0, TWICE, -0.0, float("nan"), 1e300, -1e300], nested=True)
def test_a_row_is_packed_as_it_is_read(row: list[float], nested: bool) -> None:
    """The short way of a row that is a list gives the same bits; what it leaves to the other is integers alone."""
    rows: Any = [row] if nested else row
    packed = pack_row(rows)
    if packed is not None:
        assert packed == matrix_of(rows).tobytes()
    else:
        assert all(isinstance(value, int) for value in row) or any(abs(value) > sys.float_info.max for value in row)


REFUSED: dict[str, tuple[Any, str]] = {
    "None": (None, "type NoneType"),
    "int": (5, "type int"),
    "str": ("1,2", "type str"),
    "bytes": (b"12", "type bytes"),
    "bytearray": (bytearray(b"12"), "type bytearray"),
    "memoryview": (memoryview(b"12"), "type memoryview"),
    "dict": ({"a": 1}, "type dict.*Pass rows"),
    "set": ({1, 2}, "type set"),
    "generator": ((x for x in [1]), "type generator"),
    "object": (object(), "type object"),
    "0-d": (np.array(1.0), "0 dimensions"),
    "masked constant": (np.ma.masked, "0 dimensions"),
    "no rows": ([], "empty"),
    "no columns": ([[], []], "empty"),
    "no rows in array": (np.empty((0, 3)), r"shape \(0, 3\)"),
    "no columns in float32": (np.empty((3, 0), np.float32), r"shape \(3, 0\)"),
    "no rows in object array": (np.empty((0, 3), object), "empty"),
    "3-D": (np.zeros((1, 2, 3)), "3 dimensions"),
    "nested": ([[[1.0]]], "3 dimensions"),
    "numeric text": ([["1", "2"]], r"rows\[0, 0\] holds a str"),
    "flat numeric text": (["1", "2"], r"rows\[0\] holds a str"),
    "text among numbers": ([[1, 2], [3, "4"]], r"rows\[1, 1\] holds a str.*Pass numbers"),
    "text among floats": ([[1.5, "4"]], r"rows\[0, 1\] holds a str"),
    "text beside None": ([[None, "4"]], r"rows\[0, 1\] holds a str"),
    "text array": (np.array(["1", "2"]), "holds text"),
    "text objects": (np.array([["1", 2]], object), r"rows\[0, 0\] holds a str"),
    "NumPy text": ([[None, np.str_("1")]], "holds a str_"),
    "NumPy text scalar": ([[np.array("1"), None]], "holds a ndarray"),
    "StringDType": (np.array(["1"], np.dtypes.StringDType()), "holds text"),
    "bytes in list": ([[b"1", 2]], r"rows\[0, 0\] holds a bytes"),
    "rows of bytes": ([b"12", b"34"], "holds bytes"),
    "rows of bytearray": ([bytearray(b"12")], "holds bytes"),
    "complex": ([[1j, 2.0]], "complex"),
    "complex objects": ([[1j, None]], "holds a complex"),
    "NumPy complex objects": ([[np.complex64(1), None]], "holds a complex64"),
    "datetime": ([[dt.datetime(2024, 1, 1, tzinfo=dt.UTC)]], "holds a datetime"),
    "timedelta": ([[dt.timedelta(1), 1]], "holds a timedelta"),
    "datetime64": (np.array(["2024-01-01"], "M8[ns]"), "holds dates"),
    "timedelta64": (np.array([[1]], "m8[s]"), "holds durations"),
    "timedelta64 objects": ([[np.timedelta64(1, "s"), None]], "holds a timedelta64"),
    "pandas.NaT": ([[pd.NaT, 1]], "holds a NaTType"),
    "records": (np.zeros(2, [("a", "f4"), ("b", "f4")]), "dtype"),
    "dicts": ([{"a": 1}, {"a": 2}], "holds a dict.*DataFrame"),
    "ragged": ([[1, 2], [3, 4], [5]], "Row 2 has 1 values, row 0 has 2 values"),
    "ragged arrays": ([np.zeros(2), np.zeros(3)], "Row 1 has 3 values"),
    "ragged masked": ([np.ma.zeros(2), np.ma.zeros(3)], "Row 1 has 3 values"),
    "number among rows": ([[1, 2], 3], "Row 1 is a single value, row 0 has 2 values"),
    "row among numbers": ([1, [2]], "Row 1 has 1 values, row 0 is a single value"),
    "list in a cell": ([[1, [2]]], "could not be read"),
    "lists as objects": (np.array([[1], [1, 2]], object), "holds a list"),
    "int beyond float": ([[10**400, 1.0]], "OverflowError"),
    "int beyond float beside None": ([[10**400, None]], "OverflowError"),
    "pandas Categorical": (pd.Categorical([1, 2]), "rows is categorical"),
    "generators": ([(x for x in [1])], "holds a generator"),
    "text Series": (pd.Series(["1", "2"]), "holds a str"),
    "categorical Series": (pd.Series([1, 2], dtype="category"), "rows is categorical"),
    "polars text Series": (pl.Series(["1"]), "holds text"),
    "polars category Series": (pl.Series(["1"], dtype=pl.Categorical), "rows is categorical"),
    "arrow text": (pa.array(["1"]), "holds a str"),
    "arrow dictionary": (pa.array([1, 2]).dictionary_encode(), "rows is categorical"),
    "LazyFrame": (pl.LazyFrame({"a": [1]}), r"\.collect\(\)"),
    "complex sparse": (sparse.csr_matrix(np.array([[1j]])), "complex"),
}


@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(rows: Any, message: str) -> None:
    """What is no matrix of numbers is refused by a typed error that names the place and the remedy."""
    with pytest.raises(InvalidInputError, match=message) as caught:
        as_matrix(rows)
    assert "Pass" in str(caught.value)
    assert caught.value.http_status == 400


FRAMES = {
    "pandas": pd.DataFrame,
    "pandas nullable": lambda columns: pd.DataFrame(columns).convert_dtypes(),
    "pandas arrow": lambda columns: pd.DataFrame(columns).convert_dtypes(dtype_backend="pyarrow"),
    "pandas object": lambda columns: pd.DataFrame(columns, dtype=object),
    "polars": pl.DataFrame,
    "arrow": pa.table,
    "arrow batch": pa.record_batch,
    "arrow chunks": lambda columns: pa.concat_tables([(t := pa.table(columns)).slice(0, 1), t.slice(1)]),
}


@pytest.mark.parametrize("make", FRAMES.values(), ids=FRAMES)
def test_frames(make: Any) -> None:
    """A frame gives its columns by name, with its nulls missing."""
    columns = {"i": [1, 2], "f": [0.5, 1e300], "b": [True, False], "n": [3, None], "g": [None, 2.5]}
    with np.errstate(invalid="ignore"):  # pandas 2 tries whether 1e300 is an integer, and warns
        frame = make(columns)
    matrix, names = as_matrix(frame)
    same(matrix, [[1, 0.5, 1, 3, NAN], [2, np.inf, 0, NAN, 2.5]])
    assert names == tuple(columns)


@pytest.mark.parametrize("make", [pl.DataFrame, pa.table, pd.DataFrame])
def test_columns_of_nulls(make: Any) -> None:
    """A column of nulls alone is a column of missing values."""
    same(matrix_of(make({"a": [None, None], "b": [1, 2]})), [[NAN, 1], [NAN, 2]])


NULLABLE = ["Int8", "UInt8", "Int32", "Int64", "UInt64", "Float32", "Float64", "boolean"]
ARROW = [
    "int8[pyarrow]",
    "int64[pyarrow]",
    "uint64[pyarrow]",
    "float[pyarrow]",
    "double[pyarrow]",
    "bool[pyarrow]",
]


@pytest.mark.parametrize("dtype", [*NULLABLE, *ARROW])
def test_pandas_dtypes_equal_xgboost(dtype: Any, booster: xgboost.Booster) -> None:
    """Each nullable pandas dtype becomes what XGBoost makes of it."""
    frame = pd.DataFrame({"a": pd.array([1, None, 0], dtype=dtype), "b": [0.5, 1.0, 2.0]})
    same(matrix_of(frame), [[1, 0.5], [NAN, 1], [0, 2]])
    predicted = booster.inplace_predict(frame, validate_features=False)
    np.testing.assert_array_equal(booster.inplace_predict(matrix_of(frame)), predicted)


def test_pandas_sparse_is_dense() -> None:
    """Sparse pandas columns have a fill value, which is a value."""
    same(matrix_of(pd.DataFrame({"a": pd.arrays.SparseArray([0, 1]), "b": [1, 2]})), [[0, 1], [1, 2]])


BAD_COLUMNS: dict[str, tuple[Any, str]] = {
    "text": (["x", "y"], "column 'city'.*holds"),
    "numeric text": (["1", "2"], "column 'city'.*holds"),
    "dates": ([dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 2)], "column 'city' holds dates"),  # noqa: DTZ001
    "durations": ([dt.timedelta(1), dt.timedelta(2)], "column 'city' holds durations"),
}


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table, FRAMES["pandas arrow"]])
@pytest.mark.parametrize(("values", "message"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_bad_columns(make: Any, values: Any, message: str) -> None:
    """A frame with a column that is not numeric is refused, and the column named."""
    with pytest.raises(InvalidInputError, match=message):
        as_matrix(make({"year": [1, 2], "city": values}))


CATEGORICAL: dict[str, Any] = {
    "pandas": pd.DataFrame({"city": pd.Categorical([1, 2])}),
    "pandas arrow": pa.table({"city": pa.array([1, 2]).dictionary_encode()}).to_pandas(types_mapper=pd.ArrowDtype),
    "polars": pl.DataFrame({"city": pl.Series(["a", "b"], dtype=pl.Categorical)}),
    "polars enum": pl.DataFrame({"city": pl.Series(["a", "b"], dtype=pl.Enum(["a", "b"]))}),
    "arrow": pa.table({"city": pa.array([1, 2]).dictionary_encode()}),
}


@pytest.mark.parametrize("frame", CATEGORICAL.values(), ids=CATEGORICAL)
def test_categories_are_not_guessed(frame: Any) -> None:
    """Codes counted from the rows at hand can differ from the model's, so categories are refused."""
    with pytest.raises(InvalidInputError, match=r"column 'city' is categorical.*codes"):
        as_matrix(frame)


@pytest.mark.parametrize("frame", [pd.DataFrame(), pl.DataFrame(), pa.table({}), pd.DataFrame({"a": []})])
def test_empty_frames(frame: Any) -> None:
    """A frame without rows or columns is refused like an empty list."""
    with pytest.raises(InvalidInputError, match="empty"):
        as_matrix(frame)


def test_names() -> None:
    """Only columns that are all named by text have names; the index of a Series names its values."""
    assert as_matrix(pd.Series({"a": 1, "b": 2.5}))[1] == ("a", "b")
    assert as_matrix(pd.DataFrame({"a": [1], "b": ["x"]}).loc[:, ["a"]].iloc[0])[1] == ("a",)
    assert as_matrix(pd.DataFrame([[1, 2]]))[1] is None
    assert as_matrix(pd.DataFrame([[1, 2]], columns=["a", 1]))[1] is None
    assert as_matrix(pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "b"), ("a", "c")])))[1] is None
    assert as_matrix(pd.Series([1, 2]))[1] is None
    assert as_matrix(pd.DataFrame([[1, 2]], columns=["a", "a"]))[1] == ("a", "a")
    assert as_matrix(SQUARE)[1] is None


def sparse_rows() -> Any:
    entries = np.array([0.0, 1.0, 2.0, 1.0]), (np.array([0, 1, 2, 2]), np.array([0, 1, 0, 1]))
    return sparse.coo_matrix(entries, shape=(4, 2))


@pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
@pytest.mark.parametrize("container", [sparse.csr_matrix, sparse.csr_array])
def test_sparse_equals_xgboost(kind: str, container: Any, booster: xgboost.Booster) -> None:
    """Entries that are not stored are missing and stored zeros are zeros, as XGBoost has it."""
    rows = container(sparse_rows()).asformat(kind)
    same(matrix_of(rows), [[0, NAN], [NAN, 1], [2, 1], [NAN, NAN]])
    theirs = booster.inplace_predict(sparse.csr_matrix(rows))
    np.testing.assert_array_equal(booster.inplace_predict(matrix_of(rows)), theirs)


def test_sparse_duplicates(booster: xgboost.Booster) -> None:
    """COO entries of one place add up; of CSR entries of one place the last counts, as XGBoost has it."""
    ones, places = np.ones(2), (np.array([0, 0]), np.array([1, 1]))
    same(matrix_of(sparse.coo_matrix((ones, places), shape=(1, 2))), [[NAN, 2]])
    # Three entries: of two in two columns XGBoost would think that none is missing.
    thrice = sparse.csr_matrix(([1.0, 0.0, 2.0], [1, 1, 1], [0, 3]), shape=(1, 2))
    same(matrix_of(thrice), [[NAN, 2]])
    np.testing.assert_array_equal(booster.inplace_predict(matrix_of(thrice)), booster.inplace_predict(thrice))


@pytest.mark.parametrize(
    "rows", [sparse.coo_array([1, 0, 2]), sparse.dok_array([[1, 0, 2]]), sparse.lil_array([[1, 0, 2]])]
)
def test_other_sparse(rows: Any) -> None:
    """Whatever has tocsr() is a sparse matrix, a 1-D one is one row."""
    same(matrix_of(rows), [[1, NAN, 2]])


XGBOOST_ROWS: dict[str, Any] = {
    "integers": [[TWICE, 1], [2**53 + 1, 0]],
    "integers and floats": [[TWICE, 1.0], [2**53 + 1, 0.0]],
    "unsigned": [[2**63, 1], [2**64 - 1, 0]],
    "one row of integers and floats": [[TWICE, 0.5]],
    "one row of integers": [[TWICE, 1]],
    "int64": np.array([[TWICE, 1], [-TWICE, 0]]),
    "uint64": np.array([[TWICE, 2**64 - 1]], np.uint64),
    "float64": np.array([[TWICE, 1e300], [NAN, -1e300], [1e-300, np.inf]], np.float64),
    "float16": np.array([[1.5, NAN], [0, 2]], np.float16),
    "longdouble": np.array([[TWICE, 1], [NAN, 2]], np.longdouble),
    "DataFrame": pd.DataFrame({"a": [TWICE, 1], "b": [1e300, NAN]}),
    "nullable DataFrame": pd.DataFrame({"a": pd.array([TWICE, None], dtype="Int64"), "b": [1.0, 2.0]}),
    "mixed object DataFrame": pd.DataFrame({"a": [TWICE, 1], "b": [True, False]}),
    "polars": pl.DataFrame({"a": [TWICE, None], "b": [1e300, None]}),
    "arrow": pa.table({"a": [TWICE, None], "b": [1e300, None]}),
}


@pytest.mark.parametrize("rows", XGBOOST_ROWS.values(), ids=XGBOOST_ROWS)
def test_rounds_as_xgboost(rows: Any, booster: xgboost.Booster) -> None:
    """The matrix predicts what XGBoost predicts from the rows as they came."""
    theirs = booster.inplace_predict(rows, validate_features=False)
    np.testing.assert_array_equal(booster.inplace_predict(matrix_of(rows)), theirs)


def test_the_booster_sees_double_rounding(booster: xgboost.Booster) -> None:
    """The comparisons with XGBoost above would notice integers that travel through float64."""
    twice = np.float64(TWICE).astype(np.float32)
    assert twice != ONCE
    once_predicted, twice_predicted = booster.inplace_predict(np.array([[ONCE, 1], [twice, 1]]))
    assert once_predicted != twice_predicted


@given(hnp.arrays(hnp.integer_dtypes() | hnp.unsigned_integer_dtypes() | hnp.boolean_dtypes(), (2, 2)))
@SLOPPY
def test_integers_round_once(rows: NDArray[Any]) -> None:
    """Every integer dtype, of either byte order, is cast straight to float32, in lists and frames too."""
    expected = rows.astype(np.float32)
    same(matrix_of(rows), expected)
    same(matrix_of(rows.tolist()), np.array(rows.tolist()).astype(np.float32))
    same(matrix_of(pd.DataFrame(rows.astype(rows.dtype.newbyteorder("=")))), expected)


@given(hnp.arrays(hnp.floating_dtypes(), (2, 3)))
@SLOPPY
def test_floats_are_casts(rows: NDArray[Any]) -> None:
    """Every float rounds like a C cast, overflow included, and without a warning."""
    with np.errstate(all="ignore"):
        expected = rows.astype(np.float32)
        as_floats = rows.astype(np.float64)
    same(matrix_of(rows), expected)
    if rows.dtype.itemsize <= 8:
        same(matrix_of(as_floats.tolist()), expected)
        same(matrix_of(as_floats[:1].tolist()), expected[:1])


@given(st.lists(st.floats() | st.integers(-(2**70), 2**70), min_size=1, max_size=8))
@SLOPPY
def test_one_row_equals_many(row: list[float]) -> None:
    """A row alone goes another way than rows together, to the same numbers."""
    same(matrix_of([row]), matrix_of([row, row])[:1])
    same(matrix_of(row), matrix_of((tuple(row),)))


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.datetimes()
    | st.timedeltas()
    | st.decimals()
    | st.fractions()
    | st.sampled_from([pd.NA, pd.NaT, np.ma.masked, np.float16(1), np.datetime64("NaT"), 10**400, object, ...])
)
containers: list[Callable[[Any], st.SearchStrategy[Any]]] = [
    lambda inner: st.lists(inner, max_size=3),
    lambda inner: st.tuples(inner, inner),
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=2),
    lambda inner: st.lists(inner, max_size=3).map(iter),
    lambda inner: st.lists(inner, max_size=3).map(lambda cells: np.array([cells, None], object)[:1]),
]
junk = st.recursive(scalars, lambda inner: st.one_of([make(inner) for make in containers]), max_leaves=12)
arrays = hnp.arrays(hnp.scalar_dtypes() | hnp.array_dtypes(), hnp.array_shapes(min_dims=0, min_side=0, max_side=3))


@given(junk | arrays | arrays.map(lambda cells: [cells, cells]))
@SLOPPY
def test_junk_is_refused(rows: Any) -> None:
    """Whatever comes, the answer is a proper matrix or an InvalidInputError."""
    try:
        matrix = matrix_of(rows)
    except InvalidInputError:
        return
    assert matrix.ndim == 2
    assert matrix.size
    same(matrix, matrix)


class Angry(type):
    def __hash__(cls) -> int:
        raise KeyError

    def __getattr__(cls, name: str) -> NoReturn:
        raise ZeroDivisionError


class Hostile(metaclass=Angry):
    def __getattr__(self, name: str) -> NoReturn:
        raise ZeroDivisionError

    def __repr__(self) -> NoReturn:
        raise ZeroDivisionError


class Unprintable(Exception):  # noqa: N818
    def __str__(self) -> NoReturn:
        raise ZeroDivisionError


class Arrayish:
    def __init__(self, result: Any) -> None:
        self.result = result

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def endless() -> list[Any]:
    rows: list[Any] = [1.0]
    rows.append(rows)
    return rows


HOSTILE: dict[str, Any] = {
    "attributes that raise": Hostile(),
    "cells that raise": [[Hostile(), None]],
    "type that cannot be hashed": [Hostile()],
    "type that cannot be hashed, in a row": [[1.0, Hostile()]],
    "every attribute": MagicMock(),
    "every attribute, in a row": [[MagicMock(), 1]],
    "list in itself": endless(),
    "unprintable error": Arrayish(Unprintable()),
    "failing __array__": Arrayish(RuntimeError("call .detach() first")),
    "__array__ of text": Arrayish(np.array(["1"])),
    "__array__ of nothing": Arrayish(None),
    "a class": int,
    "a module": np,
}


@pytest.mark.parametrize("rows", HOSTILE.values(), ids=HOSTILE)
def test_hostile_objects(rows: Any) -> None:
    """Objects that raise what they like while they are read end in an InvalidInputError too."""
    with pytest.raises(InvalidInputError, match="Pass"):
        as_matrix(rows)


def test_array_protocol() -> None:
    """Array-likes such as tensors are read by __array__, and their own advice is passed on if that fails."""
    same(matrix_of(Arrayish(SQUARE)), SQUARE)
    with pytest.raises(InvalidInputError, match=r"RuntimeError: call \.detach\(\) first") as caught:
        as_matrix(Arrayish(RuntimeError("call .detach() first")))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_errors_of_the_process_pass(error: BaseException) -> None:
    """Out of memory and Ctrl-C are not errors of the rows."""
    with pytest.raises(type(error)):
        as_matrix(Arrayish(error))


def test_right_arrays_are_not_copied() -> None:
    """A matrix that is right already is returned as it is, a read-only one too."""
    rows = SQUARE.astype(np.float32)
    rows.flags.writeable = False
    assert matrix_of(rows) is rows


@pytest.mark.parametrize("seterr", ["raise", "warn"])
def test_error_state_of_the_caller(seterr: Any) -> None:
    """NumPy's error state of the caller is neither obeyed nor changed."""
    with np.errstate(all=seterr), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = np.geterr()
        for rows in (np.array([[1e300]]), [[1e300, None]], (1e300,), pd.DataFrame({"a": [1e300]})):
            same(matrix_of(rows), [[np.inf, NAN][: len(matrix_of(rows)[0])]])
        assert np.geterr() == before


MUTABLE = [name for name, (rows, _) in ACCEPTED.items() if not isinstance(rows, range)]


@pytest.mark.parametrize("name", MUTABLE)
def test_rows_are_not_changed(name: str) -> None:
    """The caller's data is the same after as before."""
    rows = ACCEPTED[name][0]
    before = pickled(rows)
    as_matrix(rows)
    assert pickled(rows) == before


def pickled(rows: Any) -> bytes:
    """Return what tells whether rows have changed; of those of pandas the cells: it notes in them what it was asked."""
    is_of_pandas = type(rows).__module__.split(".")[0] == "pandas"
    return pickle.dumps(repr(np.asarray(rows, object).tolist()) if is_of_pandas else rows)


def test_sparse_and_frames_are_not_changed() -> None:
    """Duplicate and unsorted entries stay so in the caller's sparse matrix, nulls in the caller's frame."""
    rows = sparse.csr_array(([1.0, 2.0, 3.0], [1, 0, 0], [0, 3]), shape=(1, 2))
    frame = pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": np.array([1, 2], "f4")})
    before = frame.copy(deep=True)
    as_matrix(rows)
    as_matrix(frame)
    assert rows.indices.tolist() == [1, 0, 0]
    assert rows.data.tolist() == [1, 2, 3]
    pd.testing.assert_frame_equal(frame, before)


def test_imports_none_of_their_libraries() -> None:
    """Reading rows imports no data frame library."""
    code = (
        "import sys, json; from modelcache.inputs import as_matrix\n"
        "as_matrix([[1, None]]); as_matrix(range(3))\n"
        "names = {'pandas', 'polars', 'pyarrow', 'scipy', 'xgboost'}\n"
        "print(json.dumps([*names & {*sys.modules}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == []


NAMES = ("year", "size", "rooms")
MODEL: dict[str, Any] = {"model": "Chicago_IL", "n_features": 3, "feature_names": NAMES}


def aligned(columns: tuple[str, ...] | None, **changes: Any) -> NDArray[np.float32]:
    rows = np.arange(2 * len(columns or NAMES), dtype=np.float32).reshape(2, -1)
    order = column_order(rows.shape[1], columns, **(MODEL | changes))
    into = np.empty((2, len(NAMES)), np.float32)
    write_rows(rows, order, into)
    return into


@pytest.mark.parametrize(
    ("columns", "names"),
    [(None, NAMES), (None, None), (("a", "b", "c"), None), (NAMES, NAMES), (NAMES, None)],
)
def test_align_by_position(columns: Any, names: Any) -> None:
    """Without names on both sides, or with the same ones, columns stay as they are and are only counted."""
    assert column_order(3, columns, **(MODEL | {"feature_names": names})) is None


@pytest.mark.parametrize("columns", [None, ("a", "b"), ("a", "b", "c", "d")])
def test_align_counts(columns: Any) -> None:
    """Too many or too few columns are refused, with the figures and the model's names."""
    width = len(columns or "ab")
    with pytest.raises(FeatureMismatchError, match=r"Chicago_IL.*takes 3 columns") as caught:
        column_order(width, columns, **(MODEL | {"feature_names": NAMES if columns is None else None}))
    assert (caught.value.expected, caught.value.got) == (3, width)
    assert caught.value.model == "Chicago_IL"
    assert ("'year', 'size', 'rooms'" in str(caught.value)) is (columns is None)


def test_align_reorders() -> None:
    """Columns by the model's names are put into the model's order, and the caller's matrix stays as it is."""
    rows = SQUARE.astype(np.float32)
    into = np.empty_like(rows)
    write_rows(rows, column_order(3, ("rooms", "year", "size"), **MODEL), into)
    same(into, [[1, 2, 0], [4, 5, 3]])
    same(rows, SQUARE)


MISMATCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str]] = {
    "renamed": (("year", "size", "beds"), ("rooms",), ("beds",), "missing: 'rooms'; unexpected: 'beds'"),
    "too few": (("size", "year"), ("rooms",), (), r"\(missing: 'rooms'\)"),
    "too many": ((*NAMES, "price"), (), ("price",), r"\(unexpected: 'price'\)"),
    "twice": (("year", "year", "size"), ("rooms",), ("year",), "given more than once: 'year'"),
    "twice, all there": ((*NAMES, "year"), (), ("year",), "given more than once: 'year'"),
    "case": (("Year", "size", "rooms"), ("year",), ("Year",), "missing: 'year'; unexpected: 'Year'"),
}


@pytest.mark.parametrize(("columns", "missing", "unexpected", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_align_by_name(columns: Any, missing: Any, unexpected: Any, message: str) -> None:
    """Other names than the model's are refused, and the facts say which."""
    with pytest.raises(FeatureMismatchError, match=message) as caught:
        aligned(columns)
    assert caught.value.missing == missing
    assert caught.value.unexpected == unexpected
    assert (caught.value.expected, caught.value.got) == (3, len(columns))


def test_align_caps_long_lists() -> None:
    """A message names a handful of columns, the facts name all."""
    names = tuple(f"f{place}" for place in range(1000))
    with pytest.raises(FeatureMismatchError, match="'f4' and 995 more") as caught:
        aligned(NAMES, n_features=1000, feature_names=names)
    assert caught.value.missing == names
    assert len(str(caught.value)) < 400


def test_duplicates_without_names_in_the_model() -> None:
    """Duplicate names do no harm where columns go by position."""
    assert column_order(3, ("a", "a", "b"), **(MODEL | {"feature_names": None})) is None
