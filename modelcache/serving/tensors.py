"""Tensors of the Open Inference Protocol into rows of numbers, from JSON or from bytes behind the JSON.

Everything is checked against what is there before anything is allocated: shapes are what a client claims. Bytes are not
copied: rows are a view of the body, which lives as long as they do.
"""

from __future__ import annotations

from itertools import chain
from math import prod
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelcache.errors import InvalidInputError
from modelcache.serving.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_BINARY: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),  # any byte but 0 is true; NumPy's bool may only hold 0 and 1
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype("<u2"),  # the upper half of a float32
}
_JSON: Mapping[str, tuple[np.dtype[Any], frozenset[type]]] = {
    "BOOL": (np.dtype(np.bool_), frozenset({bool})),
    **{name: (dtype, frozenset({int})) for name, dtype in _BINARY.items() if "INT" in name},
    # Rounded to float32 by the registry, which lets what is too large become infinite.
    **dict.fromkeys(("FP32", "FP64"), (np.dtype(np.float64), frozenset({int, float, type(None)}))),
}
_HALVES = ("FP16", "BF16")
_DIMENSIONS = (1, 2)
_LONGEST = 1 << 63
"""What is less fits into an int64, which is all that the protocol has for shapes."""
_REFUSED = ("shared_memory_region", "classification")
"""Parameters of extensions that change what a tensor is: to ignore them would be to answer something else."""


class Tensor(NamedTuple):
    """An input as it was sent: numbers of one or two dimensions."""

    name: str
    values: NDArray[Any]


class _Claim(NamedTuple):
    """What a client says of a tensor."""

    where: str
    """How messages call it."""
    shape: list[int]
    datatype: str


def read_inputs(inputs: Any, body: bytes, offset: int) -> list[Tensor]:
    """Return the tensors of ``inputs``, of which the bytes begin at ``offset`` in ``body`` if they are not in there."""
    if type(inputs) is not list or not inputs:
        raise RequestError("'inputs' has to be a list of one tensor or more, each with name, shape, datatype and data.")
    tensors = []
    for described in inputs:
        tensor, offset = _read_tensor(described, body, offset)
        tensors.append(tensor)
    if offset != len(body):
        raise InvalidInputError(
            f"{len(body) - offset:,} bytes are left behind the last tensor: binary_data_size has to say, for each, "
            "how many of the bytes behind the JSON are its own."
        )
    refuse_repeated([tensor.name for tensor in tensors], "inputs")
    return tensors


def _read_tensor(described: Any, body: bytes, offset: int) -> tuple[Tensor, int]:
    """Return the tensor, and where the bytes of the next one begin."""
    name = name_of(described, "inputs")
    where = f"Input {name!r}"
    claim = _Claim(where, _shape(described.get("shape"), where), _datatype(described.get("datatype"), where))
    size, data = parameters_of(described, where).get("binary_data_size"), described.get("data")
    if size is None:
        return Tensor(name, _from_json(data, claim)), offset
    if data is not None:
        raise InvalidInputError(f"{where} has data and binary_data_size. Send one of them.")
    return Tensor(name, _from_bytes(body, offset, size, claim)), offset + size


def _shape(shape: Any, where: str) -> list[int]:
    if (
        type(shape) is not list
        or len(shape) not in _DIMENSIONS
        or any(type(n) is not int or not 0 < n < _LONGEST for n in shape)
    ):
        raise InvalidInputError(
            f"{where} is of shape {brief(shape)}. Send [rows, features], or [features] for one row, all 1 or more; "
            "or one tensor for each feature, of shape [rows] or [rows, 1]."
        )
    return shape


def _datatype(datatype: Any, where: str) -> str:
    if type(datatype) is str and datatype in _BINARY:
        return datatype
    remedy = " Send categories as the codes that the model was trained on." if datatype == "BYTES" else ""
    raise InvalidInputError(
        f"{where} is of datatype {brief(datatype)}, which no model here takes: send one of "
        f"{', '.join(_BINARY)}.{remedy}"
    )


def _from_bytes(body: bytes, offset: int, size: Any, claim: _Claim) -> NDArray[Any]:
    where, shape, datatype = claim
    dtype, count = _BINARY[datatype], prod(shape)
    if type(size) is not int or size != count * dtype.itemsize:
        raise InvalidInputError(
            f"{where} of shape {shape} and datatype {datatype} takes {count * dtype.itemsize:,} bytes, "
            f"binary_data_size is {brief(size)}."
        )
    if size > len(body) - offset:
        raise InvalidInputError(
            f"{where} takes {size:,} bytes behind the JSON, there are {len(body) - offset:,} left. Send all of them, "
            "and the header Inference-Header-Content-Length."
        )
    values = np.frombuffer(body, dtype, count, offset)
    if datatype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif datatype == "BOOL":
        values = values != 0
    return values.reshape(shape)


def _from_json(data: Any, claim: _Claim) -> NDArray[Any]:
    where, shape, datatype = claim
    if datatype in _HALVES:
        raise InvalidInputError(f"{where} is {datatype} in JSON. Send its bytes behind the JSON, or send FP32.")
    if type(data) is not list:
        raise InvalidInputError(f"{where} has no list of data, and no binary_data_size. Send one of them.")
    flat = _flatten(data, shape, where)
    if len(flat) != prod(shape):
        raise InvalidInputError(f"{where} of shape {shape} takes {prod(shape):,} values, its data has {len(flat):,}.")
    dtype, kinds = _JSON[datatype]
    if not kinds.issuperset(map(type, flat)):
        wrong = sorted({kind.__name__ for kind in map(type, flat) if kind not in kinds})
        raise InvalidInputError(
            f"{where} of datatype {datatype} holds {', '.join(wrong)}. Send numbers, or null for a value that is "
            "missing, as FP32 or FP64; whole numbers as INT or UINT; true and false as BOOL."
        )
    try:
        return np.array(flat, dtype).reshape(shape)
    except OverflowError as error:
        raise InvalidInputError(f"{where} holds a number that is out of the range of {datatype}.") from error


def _flatten(data: list[Any], shape: list[int], where: str) -> list[Any]:
    """Return ``data`` without its inner lists, which may be left out, and must be as ``shape`` says if they are not."""
    if not data or type(data[0]) is not list:
        return data
    rows, width = shape if len(shape) == max(_DIMENSIONS) else (0, 0)
    if len(data) != rows or any(type(row) is not list or len(row) != width for row in data):
        raise InvalidInputError(f"The lists in the data of {where} are not of its shape {shape}.")
    return list(chain.from_iterable(data))


def side_by_side(tensors: Sequence[Tensor]) -> NDArray[np.float32]:
    """Return rows, float32 of shape (n, tensors), of which each tensor is a column."""
    count = tensors[0].values.shape[0]
    for name, values in tensors:
        if values.shape not in ((count,), (count, 1)):
            raise InvalidInputError(
                f"Input {name!r} is of shape {list(values.shape)}, and there are {len(tensors)} inputs: each is one "
                f"feature then, of shape [{count}] or [{count}, 1] as the first. Or send all in one tensor."
            )
    with np.errstate(all="ignore"):  # too large for float32 is infinite, as everywhere
        return np.stack([values.reshape(count).astype(np.float32) for _, values in tensors], axis=1)


# What tensors, and requests for them, have in common


def name_of(described: Any, where: str) -> str:
    """Return the name of an object in the list ``where``."""
    name = described.get("name") if type(described) is dict else None
    if type(name) is not str or not name:
        raise RequestError(f"Each of the '{where}' has to be an object with a name.")
    return name


def parameters_of(described: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters, {} if there are none. Those that are not known are let pass: other servers need them."""
    parameters = described.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise RequestError(f"{where} has 'parameters' that are no object.")
    for refused in _REFUSED:
        if refused in parameters:
            raise RequestError(f"{where} asks for {refused}, which is not offered here. Send the tensor as it is.")
    return parameters


def refuse_repeated(names: Sequence[str], where: str) -> None:
    """Raise RequestError if two of ``names`` are the same."""
    if len(set(names)) != len(names):
        raise RequestError(f"The names of the '{where}' are not different: {brief(sorted(names))}.")
