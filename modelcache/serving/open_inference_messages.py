"""Requests and responses of the Open Inference Protocol, version 2, around the tensors in them.

A body is JSON, or JSON with the bytes of tensors behind it (the binary extension): a header then says how long the JSON
is, and each tensor how many of the bytes are its own, in the order in which they are listed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from modelcache.serving.codecs.json_text import digits
from modelcache.serving.errors import RequestError
from modelcache.serving.tensors import name_of, parameters_of, read_inputs, refuse_repeated, side_by_side

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from modelcache.records import Output

OUTPUTS: Mapping[str, Output] = {"predict": "value", "margin": "margin", "leaf": "leaf", "contribs": "contribs"}
"""What a request may ask for, and how the registry calls it. The first is called as MLServer's XGBoost runtime does."""

_MICROSECONDS = 1e-6
_LONGEST = 1 << 63
"""What is less fits into an int64, which is all that the protocol has for a timeout, and for lengths."""


class WantedOutput(NamedTuple):
    """A tensor that the response is to have."""

    name: str
    """One of `OUTPUTS`."""
    binary: bool


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What a client asks of a model."""

    id: str | None
    rows: NDArray[Any]
    """Numbers of shape (n, features), or (features,) for one row; NaN is missing."""
    columns: tuple[str, ...] | None
    """Names of the columns, if each came as a tensor of its own."""
    outputs: tuple[WantedOutput, ...]
    """One at least."""
    timeout: float | None
    """Seconds."""

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self.rows) if self.rows.ndim > 1 else 1


# From a request to rows


def decode_request(body: bytes, header_length: str | None) -> InferRequest:
    """Read ``body``; ``header_length`` is the header Inference-Header-Content-Length, if there is one.

    Raises RequestError if the request is not one of the protocol, InvalidInputError if its tensors are no rows.
    """
    length = _length_of_json(header_length, len(body))
    request = _parse(body[:length])
    parameters = parameters_of(request, "The request")
    tensors = read_inputs(request.get("inputs"), body, length)
    several = len(tensors) > 1
    return InferRequest(
        id=_id(request),
        rows=side_by_side(tensors) if several else tensors[0].values,
        columns=tuple(tensor.name for tensor in tensors) if several else None,
        outputs=_wanted(request, parameters),
        timeout=_timeout(parameters),
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``, empty if that is; RequestError if it is something else."""
    return _parse(body) if body.strip() else {}


def _length_of_json(header: str | None, size: int) -> int:
    if header is None:
        return size
    if not (header.isascii() and header.isdigit() and len(header) <= len(str(_LONGEST))):
        raise RequestError(f"Inference-Header-Content-Length is {brief(header)}: it has to be a number of bytes.")
    length = int(header)
    if length > size:
        raise RequestError(
            f"Inference-Header-Content-Length says that {length:,} bytes are JSON, the body has {size:,}. "
            "Send the length of the JSON before it is compressed, and the whole body."
        )
    return length


def _parse(text: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        found = _parse_with_nan(text, error)
    if type(found) is not dict:
        raise RequestError("The body has to be a JSON object: Inference-Header-Content-Length is needed before bytes.")
    return found


def _parse_with_nan(text: bytes, error: ValueError) -> Any:
    """Read JSON as tritonclient writes it for missing values: NaN and Infinity are no JSON, but clear enough."""
    if b"NaN" in text or b"Infinity" in text:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass  # told by orjson, which says where
    raise RequestError(
        f"The body is no JSON ({error}). If tensors are sent as bytes behind the JSON, the header "
        "Inference-Header-Content-Length has to say how long the JSON is."
    ) from error


# What is asked for


def _wanted(request: dict[str, Any], parameters: dict[str, Any]) -> tuple[WantedOutput, ...]:
    outputs = request.get("outputs")
    binary = _flag(parameters, "binary_data_output", default=False)
    if outputs is None or outputs == []:
        return (WantedOutput(next(iter(OUTPUTS)), binary),)
    if type(outputs) is not list:
        raise RequestError('\'outputs\' has to be a list of tensors\' names, as {"name": "predict"}.')
    wanted = tuple(_wanted_output(described, binary) for described in outputs)
    refuse_repeated([output.name for output in wanted], "outputs")
    return wanted


def _wanted_output(described: Any, binary: bool) -> WantedOutput:
    name = name_of(described, "outputs")
    if name not in OUTPUTS:
        raise RequestError(f"There is no output {brief(name)}. Ask for {', '.join(OUTPUTS)}, or leave 'outputs' out.")
    parameters = parameters_of(described, f"Output {name!r}")
    return WantedOutput(name, _flag(parameters, "binary_data", default=binary))


def _timeout(parameters: dict[str, Any]) -> float | None:
    timeout = parameters.get("timeout")
    if timeout is None or timeout == 0:
        return None
    if type(timeout) is not int or not 0 < timeout < _LONGEST:
        raise RequestError(f"'timeout' is {brief(timeout)}: it has to be a whole number of microseconds.")
    return timeout * _MICROSECONDS


def _id(request: dict[str, Any]) -> str | None:
    given = request.get("id")
    if given is not None and (type(given) is not str or not _is_unicode(given)):
        raise RequestError("'id' has to be text.")
    return given


def _flag(parameters: dict[str, Any], name: str, *, default: bool) -> bool:
    flag = parameters.get(name, default)
    if type(flag) is not bool:
        raise RequestError(f"{name!r} has to be true or false.")
    return flag


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


# From predictions to a response


def encode_response(
    head: Mapping[str, Any], outputs: Sequence[tuple[WantedOutput, NDArray[np.float32]]]
) -> tuple[bytes, int | None]:
    """Return the body of a response that begins with ``head``, and the length of its JSON if bytes are behind that.

    As bytes all numbers are exact. In JSON each is the shortest that is the same float32, and one that is not finite
    is null, as JSON has nothing else for it.
    """
    tensors, buffers = [], []
    for wanted, values in outputs:
        tensor: dict[str, Any] = {"name": wanted.name, "datatype": "FP32", "shape": values.shape}
        if wanted.binary:
            tensor["parameters"] = {"binary_data_size": values.nbytes}
            buffers.append(values.tobytes())
        else:
            tensor["data"] = orjson.Fragment(b"[%b]" % digits(values.ravel()))
        tensors.append(tensor)
    text = orjson.dumps({**head, "outputs": tensors})
    return (b"".join((text, *buffers)), len(text)) if buffers else (text, None)
