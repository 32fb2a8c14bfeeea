"""application/json and application/jsonlines, in the forms that SageMaker documents, and as bare lists.

``{"instances": [...]}`` holds instances, a list of lists too; a list of numbers is one row. An instance is a list of
numbers, ``{"features": [...]}`` or ``{"data": {"features": {"values": [...]}}}``, of which the innermost may be a list,
or be sparse: ``{"keys": [...], "values": [...], "shape": [n]}``. ``null`` is missing, and so is what a sparse row
leaves out. Texts, true and false are refused: NumPy would take ``true`` for 1.

orjson reads the text: 1,024 levels at most, and 8 to 25 bytes of Python objects for each byte of the body.
"""

from __future__ import annotations

from array import array
from itertools import chain
from math import nan
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import orjson

from modelcache.errors import InvalidInputError
from modelcache.serving.codecs.base import Decoder
from modelcache.serving.codecs.gathering import GatheredRows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)
_PIECE = 1 << 16
"""Numbers that are written at once, in a few milliseconds: other threads have to wait so long."""
_NUMBERS = frozenset({float, int})
_NAMES = {str: "a text", bool: "true or false", type(None): "null", dict: "an object", list: "a list"}
_FORMS = 'Send {"instances": [{"features": [1.5, 16.0]}]}, or a list of lists of numbers.'


def decoder() -> Decoder:
    """Return the decoder for one document."""
    return Decoder(_decode)


def lines_decoder() -> Decoder:
    """Return the decoder for one instance a line."""
    return Decoder(_decode_lines)


def _decode(body: bytes, n_features: int | None = None) -> Matrix:  # noqa: ARG001
    document = _parse(body, "")
    plain = _plain_rows(document.get("instances") if type(document) is dict else document)
    if plain is not None:
        return plain
    gathered = GatheredRows()
    for place, instance in _instances(document):
        _add(gathered, instance, place)
    return gathered.matrix()


def _decode_lines(body: bytes, n_features: int | None = None) -> Matrix:  # noqa: ARG001
    gathered = GatheredRows()
    for number, line in enumerate(body.splitlines(), 1):
        if line.strip():
            _add(gathered, _parse(line, f"Line {number}: "), f"Line {number}: $")
    return gathered.matrix()


def _parse(text: bytes, place: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInputError(f"{place}This is no JSON: {error}. JSON has no NaN: send null.") from error


def _plain_rows(rows: Any) -> Matrix | None:
    """Return what needs no second look, five times as fast: lists of numbers of equal length, and nothing missing."""
    if type(rows) is not list or set(map(type, rows)) != {list}:
        return None
    widths = set(map(len, rows))
    if len(widths) > 1 or widths == {0} or not set(map(type, chain.from_iterable(rows))) <= _NUMBERS:
        return None
    return np.ndarray((len(rows), *widths), _FLOAT32, array("f", chain.from_iterable(rows)))


def _instances(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield the instances, each with its place."""
    where = "$"
    if type(document) is dict and "instances" in document:
        where, document = "$.instances", document["instances"]
        if type(document) is not list:
            raise InvalidInputError(f"{where} is {_name(document)}. {_FORMS}")
    elif type(document) is dict or (document and type(document) is list and type(document[0]) not in {list, dict}):
        yield where, document
        return
    elif type(document) is not list:
        raise InvalidInputError(f"{where} is {_name(document)}. {_FORMS}")
    for number, instance in enumerate(document):
        yield f"{where}[{number}]", instance


def _add(gathered: GatheredRows, instance: Any, place: str) -> None:
    values, place = _values(instance, place)
    if type(values) is not dict:
        gathered.add(_row(values, place), place)
    elif "keys" not in values:
        gathered.add(_row(values.get("values"), f"{place}.values"), place)
    else:
        _add_sparse(gathered, values, place)


def _values(instance: Any, place: str) -> tuple[Any, str]:
    """Return the list of an instance, or the object that holds it, and its place."""
    if type(instance) is not dict:
        return instance, place
    if "features" not in instance:
        place, instance = f"{place}.data", instance.get("data")
        if type(instance) is not dict or "features" not in instance:
            raise InvalidInputError(f"{place} has no features. {_FORMS}")
    return instance["features"], f"{place}.features"


def _row(values: Any, place: str) -> array[float]:
    if type(values) is not list:
        raise InvalidInputError(f"{place} is {_name(values)}, and should be a list of numbers. {_FORMS}")
    if frozenset(map(type, values)) <= _NUMBERS:
        return array("f", values)
    for column, value in enumerate(values):
        if type(value) not in _NUMBERS and value is not None:
            raise InvalidInputError(f"{place}[{column}] is {_name(value)}. Send numbers, and null for a missing value.")
    return array("f", [nan if value is None else value for value in values])


def _add_sparse(gathered: GatheredRows, features: dict[str, Any], place: str) -> None:
    keys, shape = features["keys"], features.get("shape")
    values = _row(features.get("values"), f"{place}.values")
    if not _are_whole(shape) or len(shape) != 1 or not shape[0]:
        raise InvalidInputError(f'{place}.shape has to be the number of columns, such as "shape": [2000].')
    if not _are_whole(keys) or len(keys) != len(values):
        raise InvalidInputError(f"{place}.keys have to be as many whole numbers as there are values.")
    gathered.add_sparse(keys, values, shape[0], place)


def _are_whole(numbers: Any) -> TypeGuard[list[int]]:
    return type(numbers) is list and all(type(number) is int and number >= 0 for number in numbers)


def _name(value: Any) -> str:
    return _NAMES.get(type(value), "a number")


# Answers. JSON has neither NaN nor infinity: both are written as null.


def digits(predictions: NDArray[np.float32]) -> bytes:
    """Return ``1.5,2.5`` for an array of shape (n,), and ``[1.5,2.5],[3.5,4.5]`` for one of shape (n, k).

    orjson writes the fewest digits that name a float32, which 64-bit readers round to the same one.
    """
    if predictions.size <= _PIECE:
        return _digits(predictions)
    step = max(1, _PIECE * len(predictions) // predictions.size)
    return b",".join([_digits(predictions[start : start + step]) for start in range(0, len(predictions), step)])


def _digits(predictions: NDArray[np.float32]) -> bytes:
    return orjson.dumps(np.ascontiguousarray(predictions, _FLOAT32), None, orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def encode(predictions: NDArray[np.float32]) -> bytes:
    """Return ``{"predictions":[{"score":1.5}]}``; of several outputs, "score" is the list."""
    return b'{"predictions":[{"score":%b}]}' % _separated(predictions, b'},{"score":')


def encode_bare(predictions: NDArray[np.float32]) -> bytes:
    """Return ``[1.5]``, or ``[[1.5,2.5]]`` of several outputs."""
    return b"[%b]" % digits(predictions)


def encode_lines(predictions: NDArray[np.float32]) -> bytes:
    """Return ``{"score":1.5}`` for each row, in a line of its own."""
    return b'{"score":%b}\n' % _separated(predictions, b'}\n{"score":')


def _separated(predictions: NDArray[np.float32], separator: bytes) -> bytes:
    """Return the predictions with ``separator`` between the rows in place of the comma."""
    if predictions.ndim == 1:
        return digits(predictions).replace(b",", separator)
    return digits(predictions).replace(b"],[", b"]%b[" % separator)
