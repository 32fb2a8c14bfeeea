"""application/json and application/jsonlines: the forms that are read, and where a mistake is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from modelcache import InvalidInputError
from modelcache.serving.codecs import decoder_for
from modelcache.serving.codecs.gathering import MOST_CELLS

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAN = float("nan")
LINES = "application/jsonlines"


def read(body: str | bytes, content_type: str = "application/json") -> NDArray[np.float32]:
    decoder = decoder_for(content_type)
    assert not decoder.needs_width
    rows: NDArray[np.float32] = decoder.decode(body if isinstance(body, bytes) else body.encode())
    return rows


def same(got: NDArray[np.float32], expected: Any) -> None:
    np.testing.assert_array_equal(got, np.array(expected, np.float32), strict=True)


@pytest.mark.parametrize(
    "body",
    [
        "[[1.5, 16], [-2, 9e2]]",
        '{"instances": [[1.5, 16], [-2, 900]]}',
        '{"instances": [{"features": [1.5, 16.0]}, {"features": [-2.0, 900]}]}',
        '{"instances": [{"data": {"features": {"values": [1.5, 16]}}}, {"data": {"features": [-2, 900]}}]}',
        '{"instances": [{"configuration": {}, "data": {"features": [1.5, 16]}}, [-2, 900]], "configuration": {}}',
        '[{"features": {"values": [1.5, 16]}}, {"features": {"keys": [1, 0], "values": [900, -2], "shape": [2]}}]',
    ],
)
def test_rows_are_read_in_the_documented_forms(body: str) -> None:
    """Those of SageMaker's algorithms, and lists of lists."""
    same(read(body), [[1.5, 16], [-2, 900]])


@pytest.mark.parametrize("body", ["[1.5, null, -2]", '{"features": [1.5, null, -2]}', "[[1.5, null, -2]]"])
def test_one_row_needs_no_list_around_it(body: str) -> None:
    """null is missing."""
    same(read(body), [[1.5, NAN, -2]])


def test_a_sparse_row_misses_what_it_leaves_out() -> None:
    """Its shape says how long it is."""
    body = '{"instances": [{"data": {"features": {"keys": [3, 0], "shape": [5], "values": [1, null]}}}]}'
    same(read(body), [[NAN, NAN, NAN, 1, NAN]])


def test_lines_are_rows() -> None:
    """In any form an instance has; empty lines are none, as no row is written as one."""
    body = '{"features": [1, 2]}\r\n[3, null]\n\n {"data": {"features": {"keys": [1], "shape": [2], "values": [4]}}}\n'
    same(read(body, LINES), [[1, 2], [3, NAN], [NAN, 4]])


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("", r"This is no JSON"),
        ("[1, NaN]", r"This is no JSON: .*line 1 column 5.*\. JSON has no NaN: send null\."),
        ("[[1],\n [2,]]", r"line 2 column"),
        ("[" * 2000 + "]" * 2000, r"This is no JSON"),
        (b"[1, \xff]", r"This is no JSON"),
        ("3", r"^\$ is a number\. Send \{\"instances\""),
        ("null", r"^\$ is null\."),
        ('"1,2"', r"^\$ is a text\."),
        ("true", r"^\$ is true or false\."),
        ("[]", r"no rows"),
        ("[[]]", r"^\$\[0\] has no values"),
        ("{}", r"^\$\.data has no features"),
        ('{"instances": 3}', r"^\$\.instances is a number"),
        ('{"instances": [1, 2]}', r"^\$\.instances\[0\] is a number"),
        ('{"instances": []}', r"no rows"),
        ('{"instances": [[1], 3]}', r"^\$\.instances\[1\] is a number, and should be a list of numbers"),
        ('{"instances": [{"data": [1]}]}', r"^\$\.instances\[0\]\.data has no features"),
        ('{"instances": [{"features": "1,2"}]}', r"^\$\.instances\[0\]\.features is a text"),
        ('{"instances": [{"features": {"value": [1]}}]}', r"\.features\.values is null, and should be a list"),
        ("[[1, 2], [3, true]]", r"^\$\[1\]\[1\] is true or false\. Send numbers, and null for a missing value"),
        ('[[1, 2], ["3", 4]]', r"^\$\[1\]\[0\] is a text"),
        ("[1, [2]]", r"^\$\[1\] is a list"),
        ("[[[1]]]", r"^\$\[0\]\[0\] is a list"),
        ("[[1, {}]]", r"^\$\[0\]\[1\] is an object"),
        ("[[1, 2], [3]]", r"^\$\[1\] is a row of 1, and the first of 2"),
        ('{"features": {"keys": [0], "values": [1]}}', r"^\$\.features\.shape has to be the number of columns"),
        ('{"features": {"keys": [0], "values": [1], "shape": [0]}}', r"\.shape has to be"),
        ('{"features": {"keys": [0], "values": [1], "shape": [2, 2]}}', r"\.shape has to be"),
        ('{"features": {"keys": [0.5], "values": [1], "shape": [2]}}', r"\.keys have to be as many whole numbers"),
        ('{"features": {"keys": [0, 1], "values": [1], "shape": [2]}}', r"\.keys have to be as many"),
        ('{"features": {"keys": [2], "values": [1], "shape": [2]}}', r"^\$\.features: index 2 is none of the 2"),
        ('{"features": {"keys": [1, 1], "values": [1, 1], "shape": [2]}}', r"two values for one index"),
        (f'{{"features": {{"keys": [], "values": [], "shape": [{MOST_CELLS + 1}]}}}}', r"Send fewer rows"),
    ],
)
def test_what_are_no_rows_of_numbers_is_refused(body: str | bytes, match: str) -> None:
    """With the path to the mistake, and what to do."""
    with pytest.raises(InvalidInputError, match=match):
        read(body)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("[1]\n[2", r"^Line 2: This is no JSON"),
        ("[1]\n\n[true]", r"^Line 3: \$\[0\] is true or false"),
        ("[1]\n[1, 2]", r"^Line 2: \$ is a row of 2, and the first of 1"),
        ("[1, 2\n3]", r"^Line 1: This is no JSON"),
        ("[[1]]", r"^Line 1: \$\[0\] is a list"),
        ("\n", r"no rows"),
    ],
)
def test_a_mistake_in_a_line_is_named(body: str, match: str) -> None:
    """With the line."""
    with pytest.raises(InvalidInputError, match=match):
        read(body, LINES)


def test_numbers_beyond_float32_become_infinite() -> None:
    """Without a warning; whole numbers of any size that orjson reads are numbers, too."""
    same(read("[1e39, -1e300, 18446744073709551615, 1e-60]"), [[np.inf, -np.inf, 2.0**64, 0]])
