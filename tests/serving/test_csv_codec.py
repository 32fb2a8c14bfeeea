"""text/csv: what is read, and what is refused with which remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from modelcache import InvalidInputError
from modelcache.serving.codecs import decoder_for
from modelcache.serving.errors import UnsupportedMediaTypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAN = float("nan")


def read(body: bytes | str, content_type: str = "text/csv") -> NDArray[np.float32]:
    sent = body if isinstance(body, bytes) else body.encode()
    rows: NDArray[np.float32] = decoder_for(content_type).decode(sent)
    return rows


def same(got: NDArray[np.float32], expected: Any) -> None:
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, np.array(expected, np.float32), strict=True)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("1990,3047,5,1.0,1.11,2", [[1990, 3047, 5, 1.0, 1.11, 2]]),
        ("1,2\n", [[1, 2]]),
        ("1,2\r\n", [[1, 2]]),
        ("1,2\n3,4\n\n", [[1, 2], [3, 4]]),
        ("\n\r\n1,2\n3,4", [[1, 2], [3, 4]]),
        ("1,2\r3,4\r", [[1, 2], [3, 4]]),
        ("\ufeff1,2\n3,4", [[1, 2], [3, 4]]),
        ("7\n8\n", [[7], [8]]),
        (" 1 , -2.5e3 \n +.5,4. ", [[1, -2500], [0.5, 4]]),
        ('"1","2"\n3,"4"\n', [[1, 2], [3, 4]]),
        ("1e39,-1e400,1e-50", [[np.inf, -np.inf, 0]]),
        ("inf,-Infinity", [[np.inf, -np.inf]]),
    ],
)
def test_rows_of_numbers_are_read(body: str, expected: list[list[float]]) -> None:
    """Whatever the line ends, with a byte order mark, quotes or spaces, and however large for float32."""
    same(read(body), expected)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("1,,3", [[1, NAN, 3]]),
        (",,", [[NAN, NAN, NAN]]),
        (",2\n1,\r\n,\n", [[NAN, 2], [1, NAN], [NAN, NAN]]),
        ('1,"",3\n4, ,6', [[1, NAN, 3], [4, NAN, 6]]),
        ("nan,NaN\nNAN,-nan", [[NAN, NAN], [NAN, NAN]]),
        ("1;;3", [[1, NAN, 3]]),
        ("1\t2\t\n", [[1, 2, NAN]]),
        ("1\t2\n\t\n3\t", [[1, 2], [NAN, NAN], [3, NAN]]),
        ('1\n""\n3', [[1], [NAN], [3]]),
    ],
)
def test_an_empty_cell_is_missing(body: str, expected: list[list[float]]) -> None:
    """So is nan in any case, as SageMaker's container has it."""
    same(read(body), expected)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " "])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_delimiter_is_seen_in_the_first_line(delimiter: str, end: str) -> None:
    """Any of five, where no other is there."""
    same(read(f"1{delimiter}2.5{end}"), [[1, 2.5]])
    same(read(f"1{delimiter}2.5\n-3{delimiter}4{end}"), [[1, 2.5], [-3, 4]])


def test_spaces_around_the_cells_are_nothing() -> None:
    """Also where they separate cells, and around another delimiter."""
    same(read(" 1 2 \n 3 4 "), [[1, 2], [3, 4]])
    same(read("1 | 2\n3 | 4"), [[1, 2], [3, 4]])


def test_the_label_is_dropped_where_one_is_announced() -> None:
    """It may be a word, as it is not looked at."""
    same(read("9,1,2\n8,3,4", "Text/CSV; Label_Size=1"), [[1, 2], [3, 4]])
    same(read("house,1,2\ncar,3,", 'text/csv;charset=utf-8;label_size="1"'), [[1, 2], [3, NAN]])
    same(read("Häuschen,1,2", "text/csv; label_size=1"), [[1, 2]])
    same(read("1,2", "text/csv; label_size=0"), [[1, 2]])


def test_other_sizes_of_labels_are_refused() -> None:
    """The message says which are read."""
    with pytest.raises(UnsupportedMediaTypeError, match=r"label_size=2 is not read\. Send label_size=1 or 0"):
        decoder_for("text/csv; label_size=2")


@pytest.mark.parametrize(
    ("body", "content_type", "match"),
    [
        ("", "text/csv", r"The body is empty\. Send one row of numbers a line"),
        ("\n\r\n", "text/csv", r"The body is empty"),
        ("1,2\n3,\xa04\n", "text/csv", r"Line 2, column 2: '\\xa04' is no number"),
        ("1,2\n3,x\n", "text/csv", r"Line 2, column 2: 'x' is no number\. Leave a cell empty for a missing value\."),
        ("\n\n1,2\n3,NA\n", "text/csv", r"Line 4, column 2: 'NA' is no number"),
        ("1,null", "text/csv", r"Line 1, column 2: 'null' is no number"),
        ("age,rooms\n1,2", "text/csv", r"Line 1, column 1: 'age' is no number.*Leave out the line of names"),
        ("1_0,2", "text/csv", r"Line 1, column 1: '1_0' is no number"),
        ("0x10,2\n", "text/csv", r"'0x10' is no number"),
        ("\uff11,2", "text/csv", r"'\uff11' is no number"),
        ("1,2\x00", "text/csv", r"Line 1"),
        ("1,2\n3", "text/csv", r"Line 2 is a row of 1, and the first of 2\. Send rows of equal length"),
        ("1,\n2", "text/csv", r"Line 2 is a row of 1, and the first of 2"),
        ("1,2\n\n3,4", "text/csv", r"Line 2 is empty\. Leave it out, or write nan"),
        ("1\n\n2", "text/csv", r"Line 2 is empty"),
        (" \n2", "text/csv", r"Line 1 is empty"),
        ("1\r\n \r\n2", "text/csv", r"Line 2 is empty"),
        ("1  2", "text/csv", r"Line 1, column 2: two spaces in a row.* write nan"),
        ("1,5;2,5", "text/csv", r"Line 1 has ',' and ';': only one can separate cells\. Write decimals with a point"),
        ('1,"2', "text/csv", r"Line 1: unexpected end of data"),
        ('1,"2"3', "text/csv", r"Line 1: "),
        ("1," + "9" * 100 + "x", "text/csv", r"column 2: '9{40}\.\.\.' is no number"),
        ("1,2\n3," + "9" * 200_000 + "x", "text/csv", r"Line 2: field larger than field limit"),
        ("7\n8", "text/csv; label_size=1", r"no columns but the label of label_size=1"),
        ("7,1\n8", "text/csv; label_size=1", r"no columns but the label of label_size=1"),
        ("x,1,y", "text/csv; label_size=1", r"Line 1, column 3: 'y'"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(body: str, content_type: str, match: str) -> None:
    """With the line, the column, and what to do."""
    with pytest.raises(InvalidInputError, match=match):
        read(body, content_type)


def test_text_that_is_not_utf8_is_refused() -> None:
    """A number has no such bytes."""
    with pytest.raises(InvalidInputError, match=r"not UTF-8"):
        read(b"1,2\n3,\xff")


@pytest.mark.parametrize("missing", [False, True])
def test_a_large_body_is_read_in_pieces(missing: bool) -> None:
    """No row is lost or doubled where one piece ends, also if cells are missing there."""
    matrix = np.random.default_rng(3).normal(size=(3000, 7)).astype(np.float32)
    if missing:
        matrix[::3, [0, 3, 4, 6]] = NAN
    lines = (",".join("" if np.isnan(cell) else str(cell) for cell in row) for row in matrix)
    same(read("\n".join(lines)), matrix)


def test_a_mistake_far_inside_a_large_body_is_found() -> None:
    """The line is counted from the beginning of the body, not of a piece."""
    lines = ["1,2,3"] * 30_000
    lines[29_000] = "1,2"
    with pytest.raises(InvalidInputError, match=r"Line 29001 is a row of 2, and the first of 3"):
        read("\n".join(lines))


def test_a_change_of_width_between_pieces_is_found() -> None:
    """Each piece may be well by itself."""
    with pytest.raises(InvalidInputError, match=r"Line 20001 is a row of 2, and the first of 3"):
        read("1,2,3\n" * 20_000 + "1,2\n" * 20_000)
