"""application/x-npy and Arrow streams: what is read, and what is refused before memory is taken for it."""

from __future__ import annotations

import struct
import subprocess
import sys
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modelcache import InvalidInputError
from modelcache.inputs import as_matrix
from modelcache.serving.codecs import arrow, decoder_for, encoder_for
from modelcache.serving.errors import NotAcceptableError, UnsupportedMediaTypeError

NPY = "application/x-npy"
ARROW = "application/vnd.apache.arrow.stream"


def npy(cells: Any, version: tuple[int, int] | None = None) -> bytes:
    file = BytesIO()
    np.lib.format.write_array(file, np.asanyarray(cells), version)
    return file.getvalue()


def headed(header: str, cells: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + cells


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f4", "<f8", "i1", ">i2", "i4", "u8"])
@pytest.mark.parametrize("version", [None, (2, 0)])
def test_arrays_of_numbers_are_read(dtype: str, version: tuple[int, int] | None) -> None:
    """Of any size and byte order, in both orders of memory; one dimension is one row."""
    cells = np.arange(6).reshape(2, 3).astype(dtype)
    for order in (cells, np.asfortranarray(cells)):
        np.testing.assert_array_equal(decoder_for(NPY).decode(npy(order, version)), cells, strict=True)
    np.testing.assert_array_equal(decoder_for(NPY).decode(npy(cells[0], version)), cells[:1], strict=True)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", r"does not begin as an npy file"),
        (b"1,2,3", r"does not begin as an npy file"),
        (npy([1.0])[:9], r"header of the array ends in the middle"),
        (npy([1.0])[:60], r"header of the array ends in the middle"),
        (b"\x93NUMPY\x03\x00" + npy([1.0])[8:], r"does not begin as an npy file of version 1 or 2"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(9), r"too long"),
        (npy([1.0])[:-1], r"shape \(1,\) and type float64 has 8 bytes; 7 came"),
        (npy([1.0]) + b"\0", r"has 8 bytes; 9 came"),
        (npy(np.zeros((0, 3))), r"has 0 bytes"),
        (npy(np.zeros((1, 1, 1))), r"shape of the array is"),
        (npy(1.0), r"shape of the array is"),
        (npy([True]), r"header of the array is .*b1.*numbers of one or two"),
        (npy(["x"]), r"header of the array is"),
        (npy([1j]), r"header of the array is"),
        (npy(np.array([None])), r"header of the array is .*O"),
        (npy(np.zeros(2, "f4,f4")), r"header of the array is"),
        (headed("{'descr': '<f4', 'fortran_order': False, }"), r"header of the array is"),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"), r"header of the array is"),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 9), }"), r"has 36,000,000,000,000"),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }" % ("9" * 500)), r"shape of the array"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(body: bytes, match: str) -> None:
    """Whatever it says of itself, no byte is allocated for it."""
    with pytest.raises(InvalidInputError, match=match):
        decoder_for(NPY).decode(body)


def test_the_header_may_be_written_by_others() -> None:
    """Its keys come in any order, and in either kind of quotes."""
    header = '{"shape": (1, 2), "fortran_order" : False, "descr":"<f4"}'
    got = decoder_for(NPY).decode(headed(header, np.array([1, 2], np.float32).tobytes()))
    np.testing.assert_array_equal(got, np.array([[1, 2]], np.float32), strict=True)


def test_record_batches_are_read() -> None:
    """With the names of their columns; nulls are missing."""
    table = pa.table({"age": pa.array([1, None, 3], pa.int32()), "rooms": [1.5, 2.5, None]})
    for body in (stream(table), stream(pa.concat_tables([table.slice(0, 1), table.slice(1)]))):
        values, names = as_matrix(decoder_for(ARROW).decode(body))
        assert names == ("age", "rooms")
        np.testing.assert_array_equal(values, np.array([[1, 1.5], [np.nan, 2.5], [3, np.nan]], np.float32))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", r"This is no Arrow IPC stream: .*Send record batches of plain numeric columns"),
        (b"1,2,3\n4,5,6", r"This is no Arrow IPC stream"),
        (stream(pa.table({"a": [1.0] * 9}))[:-40], r"This is no Arrow IPC stream"),
        (stream(pa.table({"a": [1.0]}), compression="zstd"), r"A record batch is compressed\. Send it as it is"),
        (stream(pa.table({"a": [1.0]}), compression="lz4"), r"A record batch is compressed"),
        (stream(pa.table({"a": ["x"]})), r"Column 'a' is of type string"),
        (stream(pa.table({"a": pa.array(["x"]).dictionary_encode()})), r"Column 'a' is of type dictionary"),
        (stream(pa.table({"a": pa.nulls(9)})), r"Column 'a' is of type null"),
        (stream(pa.table({"a": [[1.0]]})), r"Column 'a' is of type list"),
        (stream(pa.table({})), r"The schema has no columns"),
        (stream(pa.table({"a": pa.array([], pa.float64())})), r"The stream has no rows"),
    ],
)
def test_what_is_no_stream_of_numbers_is_refused(body: bytes, match: str) -> None:
    """A few compressed bytes could stand for gigabytes."""
    with pytest.raises(InvalidInputError, match=match):
        decoder_for(ARROW).decode(body)


def test_columns_that_share_their_bytes_do_not_multiply() -> None:
    """A stream whose 20 columns are all said to be the bytes of the first is refused."""
    columns, rows = 20, 4096
    body = stream(pa.table({str(place): np.ones(rows, np.int8) for place in range(columns)}))
    for place in range(1, columns):
        body = body.replace(struct.pack("<qq", place * rows, rows), struct.pack("<qq", 0, rows))
    body = body.replace(struct.pack("<q", columns * rows), struct.pack("<q", rows))
    body = body[: body.index(b"\1" * rows) + rows] + b"\xff\xff\xff\xff\0\0\0\0"
    assert pa.ipc.open_stream(body).read_all().shape == (rows, columns)
    with pytest.raises(InvalidInputError, match=r"more cells than the body has bytes"):
        decoder_for(ARROW).decode(body)


def test_without_pyarrow_its_type_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how to install it; other types are not concerned."""
    monkeypatch.setattr(arrow, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedMediaTypeError, match=r"pip install 'modelcache\[arrow\]'"):
        decoder_for(ARROW + ";without=pyarrow")
    with pytest.raises(NotAcceptableError, match=r"pip install 'modelcache\[arrow\]'"):
        encoder_for(ARROW + ";without=pyarrow", "text/csv")
    assert encoder_for("application/*;q=0.9;without=pyarrow", "text/csv").media_type == "application/json"


def test_pyarrow_is_imported_on_first_use() -> None:
    """It takes longer to import than all the rest."""
    code = (
        "import sys; from modelcache.serving import codecs; codecs.encoder_for(None, 'text/csv'); print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30).stdout
    assert "pyarrow" not in found.split()
    assert "orjson" in found.split()
