"""application/x-recordio-protobuf: SageMaker's own format, records of ``aialgs.data.Record`` in RecordIO frames.

A frame is the magic number, a length in the lower 29 bits of a word, the payload, and zeros up to a multiple of four.
The upper 3 bits say which part of a record it is: 0 whole, 1 the first, 2 one between, 3 the last. MXNet's writer
splits a payload where the magic number is inside, and takes that out: a reader puts it back between the parts.

The row is the feature "values": a tensor of float32, float64 or int32. With ``keys`` it is sparse, of ``shape[0]``
columns or, if it has no shape, as many as the model; what is not there is missing. Labels are not read.
"""

from __future__ import annotations

from array import array
from functools import cache
from struct import Struct
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from modelcache.errors import InvalidInputError
from modelcache.serving.codecs.base import Decoder, shown
from modelcache.serving.codecs.gathering import GatheredRows

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

MAGIC = 0xCED7230A
_HEAD = Struct("<II")
_MAGIC_BYTES = MAGIC.to_bytes(4, "little")
_WHOLE, _FIRST, _BETWEEN, _LAST = range(4)
_TENSORS = {"float32_tensor": (2, "FLOAT"), "float64_tensor": (3, "DOUBLE"), "int32_tensor": (7, "INT32")}


def decoder() -> Decoder:
    """Return the decoder."""
    return Decoder(_decode, needs_width=True)


def _decode(body: bytes, n_features: int | None = None) -> NDArray[np.float32]:
    gathered = GatheredRows()
    for number, payload in enumerate(_records(body), 1):
        _add(gathered, payload, n_features, f"Record {number}")
    return gathered.matrix()


def _add(gathered: GatheredRows, payload: bytes, n_features: int | None, place: str) -> None:
    tensor = _tensor(payload, place)
    values = array("d", tensor.values)
    keys = list(tensor.keys)
    if not keys and values:
        gathered.add(array("f", values), place)
        return
    width = tensor.shape[0] if tensor.shape else n_features if keys else 0  # nothing at all is a mistake
    if len(keys) != len(values) or not width:
        raise InvalidInputError(
            f"{place} has {len(keys)} keys and {len(values)} values of {width or 'no'} columns. "
            "Send values, and for a sparse row as many keys, and its shape."
        )
    gathered.add_sparse(keys, values, width, place)


def _records(body: bytes) -> Iterator[bytes]:
    """Yield the payload of each record, put together of its parts."""
    parts: list[bytes] = []
    for place, kind, payload in _frames(body):
        if kind > _LAST or (kind in {_WHOLE, _FIRST}) is bool(parts):
            raise InvalidInputError(f"The frame at byte {place} is a part {kind} out of place. Send whole records.")
        parts.append(payload)
        if kind in {_WHOLE, _LAST}:
            yield _MAGIC_BYTES.join(parts)
            parts = []
    if parts:
        raise InvalidInputError("The last record is not whole. Send all of its parts.")


def _frames(body: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield where each frame begins, which part of a record it is, and its payload."""
    place = 0
    while place < len(body):
        if len(body) - place < _HEAD.size:
            raise _truncated(place)
        magic, word = _HEAD.unpack_from(body, place)
        if magic != MAGIC:
            raise InvalidInputError(
                f"At byte {place} a frame should begin with {MAGIC:#x}, little endian, and begins with {magic:#x}. "
                "Send RecordIO, as sagemaker.serializers.RecordSerializer writes it."
            )
        start, size = place + _HEAD.size, word & (1 << 29) - 1
        end = start + (size + 3 & ~3)
        if end > len(body):
            raise _truncated(place)
        yield place, word >> 29, body[start : start + size]
        place = end


def _truncated(place: int) -> InvalidInputError:
    return InvalidInputError(f"The frame at byte {place} ends in the middle. Send it whole, padded to four bytes.")


def _tensor(payload: bytes, place: str) -> Any:
    record = record_class()()
    try:
        record.ParseFromString(payload)
    except message.DecodeError as error:
        raise InvalidInputError(f"{place} is no aialgs.data.Record: {error}.") from error
    if "values" not in record.features:
        names = ", ".join(map(shown, list(record.features)[:3])) or "none"
        raise InvalidInputError(f'{place} has no feature "values" (features: {names}). Name the feature so.')
    value = record.features["values"]
    kind = value.WhichOneof("value")
    if kind is None:
        raise InvalidInputError(f"{place} holds no tensor. Send float32_tensor, float64_tensor or int32_tensor.")
    return getattr(value, kind)


@cache
def record_class() -> Any:
    """Return the class of ``aialgs.data.Record``, as far as rows need it: labels and the rest are unknown fields to it.

    It lives in a pool of its own: in the default one it would clash with the module that SageMaker's SDK brings.
    """
    file = descriptor_pb2.FileDescriptorProto(name="modelcache/record.proto", package="aialgs.data", syntax="proto2")
    value = file.message_type.add(name="Value")
    value.oneof_decl.add(name="value")
    for name, (number, kind) in _TENSORS.items():
        tensor = file.message_type.add(name=name)
        _field(tensor, "values", 1, kind, repeated=True)
        _field(tensor, "keys", 2, "UINT64", repeated=True)
        _field(tensor, "shape", 3, "UINT64", repeated=True)
        _field(value, name, number, f".aialgs.data.{name}").oneof_index = 0
    record = file.message_type.add(name="Record")
    entry = record.nested_type.add(name="FeaturesEntry")
    entry.options.map_entry = True
    _field(entry, "key", 1, "STRING")
    _field(entry, "value", 2, ".aialgs.data.Value")
    _field(record, "features", 1, ".aialgs.data.Record.FeaturesEntry", repeated=True)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("aialgs.data.Record"))


def _field(owner: Any, name: str, number: int, kind: str, *, repeated: bool = False) -> Any:
    """Add a field of a scalar type, packed if it is repeated, or of the message that ``kind`` names."""
    field = owner.field.add(name=name, number=number, label=f"LABEL_{'REPEATED' if repeated else 'OPTIONAL'}")
    if kind.startswith("."):
        field.type_name = kind
    else:
        field.type = field.Type.Value(f"TYPE_{kind}")
        field.options.packed = repeated
    return field
