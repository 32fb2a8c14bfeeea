"""Whatever comes in is rows or a refusal, and whatever goes out comes back; a thousand bodies of each type."""

from __future__ import annotations

import csv
import tracemalloc
from io import BytesIO
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from modelcache import InvalidInputError
from modelcache.inputs import as_matrix
from modelcache.serving.codecs import CONTENT_TYPES, csv_text, decoder_for
from recordio_writer import dense, frame, sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True)
READ = [one for one in CONTENT_TYPES if one != "text/x-libsvm"]  # which is the same as text/libsvm
WIDTH = 3
ARROW = "application/vnd.apache.arrow.stream"
RECORDIO = "application/x-recordio-protobuf"
TEXT_OF = {
    "text/csv": '012.-e,,,;\t| \r\n"nanif_x\ufeff',
    "text/libsvm": "0123:::   .-e#\r\nqidnax_",
    "application/json": '[[]]{{}}::,,"featuresinstancesdatavalueskeysshape" 012.-enull\n',
    "application/jsonlines": '[[]]{{}}::,,"features" 012.-enull\n\n',
}


def as_npy(rows: Matrix) -> bytes:
    file = BytesIO()
    np.save(file, rows)
    return file.getvalue()


def as_arrow(rows: Matrix) -> bytes:
    batch = pa.record_batch(
        [pa.array(column) for column in rows.T.copy()], [f"f{place}" for place in range(rows.shape[1])]
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def as_libsvm(rows: Matrix) -> bytes:
    return b"".join(
        b"1 " + b" ".join(b"%d:%a" % (key, float(row[key])) for key in np.flatnonzero(~np.isnan(row))) + b"\n"
        for row in rows
    )


def as_csv(rows: Matrix, delimiter: str = ",", end: str = "\n") -> bytes:
    return end.join(
        delimiter.join("" if np.isnan(cell) else repr(float(cell)) for cell in row) for row in rows
    ).encode()


def as_sparse_records(rows: Matrix) -> bytes:
    keys = [np.flatnonzero(~np.isnan(row)).tolist() for row in rows]
    return b"".join(frame(sparse(at, row[at].tolist(), len(row))) for at, row in zip(keys, rows, strict=True))


WRITERS: dict[str, Any] = {
    "text/csv": as_csv,
    "text/libsvm": as_libsvm,
    "application/json": lambda rows: orjson.dumps({"instances": rows.tolist()}),
    "application/jsonlines": lambda rows: b"\n".join(orjson.dumps({"features": row}) for row in rows.tolist()),
    "application/x-npy": as_npy,
    ARROW: as_arrow,
    RECORDIO: lambda rows: b"".join(frame(dense(row)) for row in rows.tolist()),
}
SAMPLE = np.array([[1.5, -2, 3], [4, 5.25, 0]], np.float32)
MATRICES = npst.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(2, 4)), elements=st.floats(width=32), fill=st.just(np.nan)
)
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4)


def outcome(content_type: str, body: bytes) -> Matrix | str:
    """Return the rows, or the refusal; anything else is an error of ours."""
    try:
        matrix = as_matrix(decoder_for(content_type).decode(body, WIDTH))[0]
    except InvalidInputError as error:
        assert len(str(error)) < 600
        return str(error)
    assert matrix.ndim == 2 and matrix.size
    return matrix


@pytest.mark.parametrize("content_type", READ)
@given(st.binary(max_size=200))
@SETTINGS
def test_random_bytes_are_rows_or_refused(content_type: str, body: bytes) -> None:
    """Nothing else is raised."""
    outcome(content_type, body)


@pytest.mark.parametrize("content_type", TEXT_OF)
@given(st.data())
@SETTINGS
def test_random_text_is_rows_or_refused(content_type: str, data: st.DataObject) -> None:
    """Of the characters that mean something in the format."""
    outcome(content_type, data.draw(st.text(TEXT_OF[content_type], max_size=60)).encode())


@pytest.mark.parametrize("content_type", WRITERS)
@given(CHANGES)
@SETTINGS
def test_damaged_bodies_are_rows_or_refused(content_type: str, changes: list[tuple[int, bytes, int]]) -> None:
    """A few bytes changed, put in or left out."""
    body = WRITERS[content_type](SAMPLE)
    for place, new, removed in changes:
        at = place % (len(body) + 1)
        body = body[:at] + new + body[at + removed :]
    outcome(content_type, body)


@pytest.mark.parametrize("content_type", [*WRITERS, f"{RECORDIO}; sparse"])
@given(MATRICES)
@SETTINGS
def test_numbers_come_back_as_they_were(content_type: str, rows: Matrix) -> None:
    """Bit by bit: NaN, infinities where the format has them, and denormals, too."""
    if "json" in content_type:
        rows = np.where(np.isinf(rows), np.float32(0), rows)
    write = as_sparse_records if "sparse" in content_type else WRITERS[content_type]
    read, _ = as_matrix(decoder_for(content_type).decode(write(rows), rows.shape[1]))
    np.testing.assert_array_equal(read, rows, strict=True)
    np.testing.assert_array_equal(np.signbit(read[read == 0]), np.signbit(rows[rows == 0]))


@given(MATRICES, st.sampled_from(",;\t|"), st.sampled_from(["\n", "\r\n"]))
@SETTINGS
def test_csv_comes_back_with_any_delimiter(rows: Matrix, delimiter: str, end: str) -> None:
    """And either end of lines."""
    read = decoder_for("text/csv").decode(as_csv(rows, delimiter, end))
    np.testing.assert_array_equal(read, rows, strict=True)


@given(st.text('12.-e,,;\t \r\n"n', max_size=40))
@settings(SETTINGS, max_examples=500)
def test_the_fast_ways_through_csv_read_what_the_careful_one_reads(text: str) -> None:
    """And they refuse what it refuses, in the same words."""
    fast = outcome("text/csv", text.encode())
    with mock.patch.object(csv_text, "_PIECE", 0), mock.patch.object(csv_text, "_loadtxt", side_effect=ValueError):
        careful = outcome("text/csv", text.encode())
    np.testing.assert_array_equal(fast, careful, strict=True)


@given(st.lists(st.lists(st.sampled_from(["1", "-2.5", "", '"3"', "nan"]), min_size=2, max_size=3), min_size=1))
@SETTINGS
def test_csv_is_read_as_the_standard_library_reads_it(rows: list[list[str]]) -> None:
    """Quotes and empty cells mean the same."""
    text = "\n".join(map(",".join, rows))
    cells = [[float(cell or "nan") for cell in row] for row in csv.reader(text.split("\n"))]
    read = outcome("text/csv", text.encode())
    if len(set(map(len, cells))) == 1:
        np.testing.assert_array_equal(read, np.array(cells, np.float32), strict=True)
    else:
        assert "Send rows of equal length" in str(read)


SIZE = 1 << 17
HOSTILE = [b",", b'"', b"[", b"{", b"\n", b"\r", b" ", b"\t\n", b"1 ", b"0:1 ", b"0\n", b"[],", b'"",', b":", b"\0"]


@pytest.mark.parametrize("content_type", READ)
def test_a_body_of_one_thing_takes_neither_long_nor_much(content_type: str) -> None:
    """Time is linear in the body, or these would not end; memory is at most forty times the body, by Python's count."""
    for unit in HOSTILE:
        for body in (unit * (SIZE // len(unit)), b"[" + unit * (SIZE // len(unit)) + b"0]"):
            outcome(content_type, body)
            tracemalloc.start()
            outcome(content_type, body)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 40 * SIZE, unit
