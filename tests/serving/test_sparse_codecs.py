"""text/libsvm and application/x-recordio-protobuf: rows that leave out what is missing."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from modelcache import FeatureMismatchError, InvalidInputError
from modelcache.serving.codecs import decoder_for
from modelcache.serving.codecs.gathering import MOST_CELLS
from modelcache.serving.errors import UnsupportedMediaTypeError
from recordio_writer import MAGIC, dense, frame, record, sparse, tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAN = float("nan")
RECORDIO = "application/x-recordio-protobuf"


def read(body: bytes, content_type: str = "text/libsvm", width: int = 4, **options: int) -> NDArray[np.float32]:
    decoder = decoder_for(content_type, **options)
    assert decoder.needs_width
    rows: NDArray[np.float32] = decoder.decode(body, width)
    return rows


def same(got: NDArray[np.float32], expected: Any) -> None:
    np.testing.assert_array_equal(got, np.array(expected, np.float32), strict=True)


@pytest.mark.parametrize(
    "body",
    [
        b"0:1.5 3:-2",
        b"7 0:1.5 3:-2\n",
        b"\xef\xbb\xbf-1.5\t3:-2  0:1.5 \r\n\n",
        b"# head\n\n1 qid:12 0:1.5 3:-2 # and 5:6\n# foot",
        b"qid:12 0:1.5 1:nan 3:-2",
    ],
)
def test_a_row_of_libsvm_is_read(body: bytes) -> None:
    """With or without label, query and comment; what is not there is missing."""
    same(read(body), [[1.5, NAN, NAN, -2]])


def test_a_label_alone_is_a_row_of_missing_values() -> None:
    """It is not an empty line."""
    same(read(b"1\n0 1:2\n0 # nothing\n", width=2), [[NAN, NAN], [NAN, 2], [NAN, NAN]])


def test_the_first_index_is_declared() -> None:
    """By the type before the app, 0 where neither says so, and never by what is in the payload."""
    body = b"1 1:5 2:6"
    same(read(body, width=3), [[NAN, 5, 6]])
    same(read(body, width=3, index_base=1), [[5, 6, NAN]])
    same(read(body, "text/x-libsvm; Index_Base=1", width=3), [[5, 6, NAN]])
    same(read(body, "text/libsvm; index_base=0", width=3, index_base=1), [[NAN, 5, 6]])
    with pytest.raises(UnsupportedMediaTypeError, match=r"index_base=2 is not read\. Send index_base=0 or 1"):
        decoder_for("text/libsvm; index_base=2")


def test_a_weight_is_read_where_a_label_is_announced() -> None:
    """Without that, it could be an entry."""
    same(read(b"1:0.5 2:3", "text/libsvm; label_size=1"), [[NAN, NAN, 3, NAN]])
    same(read(b"1:0.5 2:3"), [[NAN, 0.5, 3, NAN]])
    with pytest.raises(InvalidInputError, match=r"Line 1, entry 1: '7' is not index:value"):
        read(b"7 2:3", "text/libsvm; label_size=0")


@pytest.mark.parametrize(("base", "index"), [(0, 4), (1, 5), (1, 0)])
def test_an_index_of_no_feature_is_named(base: int, index: int) -> None:
    """The model has four features, counted from the base."""
    with pytest.raises(FeatureMismatchError, match=rf"Line 2: index {index} is none of the 4 .* counted from {base}"):
        read(b"1:1\n2:1 %d:3" % index, index_base=base)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", r"no rows"),
        (b"# nothing\n", r"no rows"),
        (b"x 1:2", r"Line 1: 'x' is no label\. Begin with a number"),
        (b"1_0 1:2", r"Line 1 has an underscore\. Send numbers"),
        (b"1 2:3\n1 a:2", r"Line 2, entry 1: 'a:2' is not index:value.*label_size=1"),
        (b"1 2:3 3:x", r"Line 1, entry 2: '3:x'"),
        (b"1 2:3 3", r"Line 1, entry 2: '3'"),
        (b"1 2:3:4", r"'2:3:4'"),
        (b"1 -1:3", r"Line 1: index -1 is none of the 4 features"),
        (b"1 1_0:3", r"underscore"),
        (b"1 1:2 # _\n1 1:3_0", r"Line 2 has an underscore"),
        (b"1 1:", r"'1:'"),
        (b"1 :1", r"':1'"),
        (b"1 %b:1" % (b"9" * 5000), r"index of too many digits"),
        (b"1 1:2 1:3", r"Line 1 has two values for one index"),
        (b"1 1:2\n\n1 1:2", r"Line 2 is empty\. Leave it out, or write 0"),
    ],
)
def test_what_is_no_libsvm_is_refused(body: bytes, match: str) -> None:
    """With the line, the entry, and what to do."""
    with pytest.raises(InvalidInputError, match=match):
        read(body)


@pytest.mark.parametrize("content_type", ["text/libsvm", RECORDIO])
def test_sparse_rows_do_not_expand_beyond_measure(content_type: str) -> None:
    """A few bytes for each row of a model with very many columns."""
    body = b"1\n" * 3 if content_type == "text/libsvm" else frame(sparse([], [], MOST_CELLS // 2)) * 3
    with pytest.raises(InvalidInputError, match=r"3: .*more than 4,194,304 cells\. Send fewer rows"):
        read(body, content_type, MOST_CELLS // 2)


@pytest.mark.parametrize("kind", ["float32_tensor", "float64_tensor", "int32_tensor"])
def test_dense_records_are_read(kind: str) -> None:
    """In any of the three types of numbers."""
    same(read(frame(dense([1, 2, -3], kind)) + frame(dense([4, 5, 6], kind)), RECORDIO), [[1, 2, -3], [4, 5, 6]])


def test_sparse_records_are_read() -> None:
    """What is not there is missing; the width is the shape's, or the model's; dense ones may be among them."""
    body = frame(sparse([3, 0], [1.5, 2], 4)) + frame(sparse([1], [7], None)) + frame(dense([1, 2, 3, 4]))
    body += frame(sparse([], [], 4))
    same(read(body, RECORDIO), [[2, NAN, NAN, 1.5], [NAN, 7, NAN, NAN], [1, 2, 3, 4], [NAN] * 4])


def test_labels_and_the_rest_of_a_record_are_passed_over() -> None:
    """A record for training has them."""
    label = record({"values": tensor([9.0], "float32_tensor")}, field=2)
    uid = b"\x1a\x03abc"
    same(read(frame(dense([1, 2]) + label + uid), RECORDIO), [[1, 2]])


def test_a_record_in_parts_is_put_together() -> None:
    """The magic number that the writer has taken out is put back between them."""
    magic = struct.unpack("<f", MAGIC)[0]
    payload = dense([1.0, magic, 2.0, magic])
    parts = payload.split(MAGIC)
    assert len(parts) == 3
    body = frame(parts[0], 1) + frame(parts[1], 2) + frame(parts[2], 3)
    same(read(frame(dense([0, 0, 0, 0])) + body, RECORDIO), [[0, 0, 0, 0], [1, magic, 2, magic]])
    same(read(frame(payload), RECORDIO), [[1, magic, 2, magic]])  # as SageMaker's SDK writes it


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", r"no rows"),
        (b"1,2,3,4\n", r"At byte 0 a frame should begin with 0xced7230a, little endian"),
        (frame(dense([1])) + b"\x0a\x23", r"frame at byte 28 ends in the middle"),
        (frame(dense([1]))[:-1], r"frame at byte 0 ends in the middle"),
        (MAGIC + b"\xff\xff\xff\x1f", r"frame at byte 0 ends in the middle"),
        (frame(b"", 2), r"frame at byte 0 is a part 2 out of place"),
        (frame(b"", 7), r"part 7 out of place"),
        (frame(b"", 1) + frame(b"", 0), r"frame at byte 8 is a part 0 out of place"),
        (frame(b"", 1), r"last record is not whole"),
        (frame(b"\x0a\x7f"), r"Record 1 is no aialgs\.data\.Record"),
        (frame(record({"other": b""})), r"Record 1 has no feature \"values\" \(features: 'other'\)"),
        (frame(b""), r"features: none"),
        (frame(record({"values": b""})), r"Record 1 holds no tensor"),
        (frame(dense([1, 2])) + frame(dense([1])), r"Record 2 is a row of 1, and the first of 2"),
        (frame(sparse([1, 2], [1.0], 4)), r"2 keys and 1 values of 4 columns"),
        (frame(sparse([1], [1.0], 0)), r"of no columns"),
        (frame(sparse([4], [1.0], 4)), r"Record 1: index 4 is none of the 4 features"),
        (frame(sparse([2, 2], [1.0, 2.0], 4)), r"two values for one index"),
        (frame(sparse([2], [1.0], 2**63)), r"Send fewer rows"),
    ],
)
def test_what_is_no_recordio_is_refused(body: bytes, match: str) -> None:
    """With the place and what to do."""
    with pytest.raises(InvalidInputError, match=match):
        read(body, RECORDIO)


def test_an_empty_tensor_without_shape_is_refused() -> None:
    """It is more likely a mistake than a row of which all is missing."""
    with pytest.raises(InvalidInputError, match=r"0 keys and 0 values of no columns"):
        decoder_for(RECORDIO).decode(frame(dense([])), 4)
