"""Answers: which type a client gets, how each is written, and that no bit of a prediction is lost on the way."""

from __future__ import annotations

import json
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from modelcache.serving.codecs import MEDIA_TYPES, decoder_for, encoder_for
from modelcache.serving.errors import NotAcceptableError, UnsupportedMediaTypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARROW = "application/vnd.apache.arrow.stream"
ONE = np.array([1.5, 0.1], np.float32)
TWO = np.array([[1.5, 0.1], [-2.0, 16777216.0]], np.float32)
ODD = np.array([np.nan, np.inf, -np.inf, 0.1], np.float32)


def write(predictions: NDArray[np.float32], accept: str, *, bare_json: bool = False) -> bytes:
    encoder = encoder_for(accept, "text/csv", bare_json=bare_json)
    assert encoder.media_type == accept
    return encoder.encode(predictions)


@pytest.mark.parametrize(
    ("accept", "one", "two"),
    [
        ("text/csv", b"1.5\n0.1", b"1.5,0.1\n-2.0,16777216.0"),
        (
            "application/json",
            b'{"predictions":[{"score":1.5},{"score":0.1}]}',
            b'{"predictions":[{"score":[1.5,0.1]},{"score":[-2.0,16777216.0]}]}',
        ),
        (
            "application/jsonlines",
            b'{"score":1.5}\n{"score":0.1}\n',
            b'{"score":[1.5,0.1]}\n{"score":[-2.0,16777216.0]}\n',
        ),
    ],
)
def test_predictions_are_written_as_clients_know_them(accept: str, one: bytes, two: bytes) -> None:
    """As SageMaker's container writes them; several outputs of a row stay together."""
    assert write(ONE, accept) == one
    assert write(TWO, accept) == two


def test_the_bare_form_of_json_is_a_list() -> None:
    """As the multi-model container writes it; other types have no such form."""
    assert write(ONE, "application/json", bare_json=True) == b"[1.5,0.1]"
    assert write(TWO, "application/json", bare_json=True) == b"[[1.5,0.1],[-2.0,16777216.0]]"
    assert write(ONE, "text/csv", bare_json=True) == b"1.5\n0.1"


def test_one_row_of_one_output_is_one_number() -> None:
    """The most frequent answer of all; and that of a model with one output that gives it in two dimensions."""
    assert write(ONE[:1], "text/csv") == b"1.5"
    assert write(ONE[:1].reshape(1, 1), "text/csv") == b"1.5"
    assert write(ONE[:1].reshape(1, 1), "application/json", bare_json=True) == b"[[1.5]]"


def test_what_is_no_finite_number_is_written_as_each_type_can() -> None:
    """CSV has words for it. JSON has none but null."""
    assert write(ODD, "text/csv") == b"nan\ninf\n-inf\n0.1"
    assert write(ODD.reshape(2, 2), "text/csv") == b"nan,inf\n-inf,0.1"
    assert json.loads(write(ODD, "application/json", bare_json=True)) == [None, None, None, 0.1]


@pytest.mark.parametrize("predictions", [ONE, TWO, ODD, TWO.T, ONE[::-1]], ids=["one", "two", "odd", "turned", "back"])
def test_binary_answers_hold_every_bit(predictions: NDArray[np.float32]) -> None:
    """In whatever order of memory the predictions come."""
    read = np.load(BytesIO(write(predictions, "application/x-npy")), allow_pickle=False)
    np.testing.assert_array_equal(read, predictions, strict=True)
    table = pa.ipc.open_stream(write(predictions, ARROW)).read_all()
    assert table.column_names == (["score"] if predictions.ndim == 1 else ["score_0", "score_1"])
    stacked = np.stack([column.to_numpy() for column in table.columns], axis=-1)
    np.testing.assert_array_equal(stacked.reshape(predictions.shape), predictions, strict=True)


def test_the_digits_name_each_float32() -> None:
    """Read as float64, as most clients do, and rounded, they are the same bits, whatever the exponent."""
    bits = np.random.default_rng(5).integers(0, 1 << 32, 100_000, np.uint32)
    edges = np.array([0, 1 << 31, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x3F800000, 0x4B800001], np.uint32)
    sent = np.concatenate([bits, edges]).view(np.float32)
    sent = sent[np.isfinite(sent)]
    for accept in ("text/csv", "application/json"):
        text = write(sent, accept, bare_json=True).strip(b"[]").replace(b",", b"\n")
        read = np.array(list(map(float, text.split(b"\n"))), np.float64).astype(np.float32)
        np.testing.assert_array_equal(read.view(np.uint32), sent.view(np.uint32))
    with_nan = np.append(sent[:1000], np.float32("nan"))  # which is written another way
    read = np.array(list(map(float, write(with_nan, "text/csv").split(b"\n"))), np.float32)
    np.testing.assert_array_equal(read, with_nan)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "text/csv"),
        ("", "text/csv"),
        ("*/*", "text/csv"),
        ("text/*", "text/csv"),
        ("Application/JSON; charset=utf-8", "application/json"),
        ("application/*", "application/json"),
        ("application/json, text/csv", "application/json"),
        ("text/csv, application/json", "text/csv"),
        ("application/jsonlines;q=0.5, application/x-npy", "application/x-npy"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "text/csv"),
        ("*/*, text/csv;q=0", "application/json"),
        ("*/*;q=0.1, application/x-npy;q=0.2", "application/x-npy"),
        ("*/*, application/x-npy", "text/csv"),
        ("application/*;q=0.9, application/json;q=0.1, text/csv;q=0.5", "application/jsonlines"),
        (ARROW, ARROW),
        (",text/csv,", "text/csv"),
    ],
)
def test_the_client_says_what_it_wants(accept: str | None, media_type: str) -> None:
    """By quality first, then by the order in which it lists them; the default where it leaves the choice."""
    assert encoder_for(accept, "text/csv").media_type == media_type


@pytest.mark.parametrize("default", MEDIA_TYPES)
def test_the_default_is_what_the_app_says(default: str) -> None:
    """Also among all that a wildcard allows."""
    assert encoder_for("*/*", default).media_type == encoder_for(None, default).media_type == default


@pytest.mark.parametrize(
    ("accept", "match"),
    [
        ("image/png", r"Accept 'image/png' has none of the types of answers: text/csv, application/json"),
        ("text/csv;q=0", r"none of the types"),
        ("text/csv;q=best", r"q=best\. A quality is a number from 0 to 1"),
        ("text/csv;q=nan", r"A quality is a number from 0 to 1"),
        ("text/csv;q=2", r"A quality is a number from 0 to 1"),
        ("x" * 9000, r"x{40}\.\.\.' has none"),
    ],
)
def test_a_client_that_accepts_none_of_our_types_is_told_them(accept: str, match: str) -> None:
    """What it asks for may be long."""
    with pytest.raises(NotAcceptableError, match=match):
        encoder_for(accept, "text/csv")


@pytest.mark.parametrize(
    ("content_type", "match"),
    [
        ("", r"There is no Content-Type\. Send one of text/csv, text/libsvm"),
        (" ", r"There is no Content-Type"),
        ("application/octet-stream", r"'application/octet-stream' is not read\. Send one of text/csv"),
        ("application/x-www-form-urlencoded", r"application/vnd\.apache\.arrow\.stream\.$"),
        ("text/csv, application/json", r"is not read"),
    ],
)
def test_a_body_of_another_type_is_refused(content_type: str, match: str) -> None:
    """None is taken for another, and no type for any: a wrong guess would be a wrong prediction."""
    with pytest.raises(UnsupportedMediaTypeError, match=match):
        decoder_for(content_type)
