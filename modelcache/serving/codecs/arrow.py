"""application/vnd.apache.arrow.stream: record batches of numeric columns, whose names are checked like those of frames.

pyarrow is imported when the first such body or answer comes; nothing else here needs it.

What Arrow reads is not trusted. Only plain columns of numbers are taken, compressed batches are not (a few bytes can
stand for gigabytes), each batch is validated before a value is looked at, and a table has no more cells than the body
bytes, although columns could share the same ones.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from struct import Struct
from typing import TYPE_CHECKING, Any

import numpy as np

from modelcache.errors import InvalidInputError
from modelcache.serving.codecs.base import Decoder, Encoder
from modelcache.serving.errors import NotAcceptableError, UnsupportedMediaTypeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_INSTALL = f"{MEDIA_TYPE} needs pyarrow on the server: pip install 'modelcache[arrow]'."
_REMEDY = "Send record batches of plain numeric columns, such as pyarrow.ipc.new_stream() writes by default."
_SHORT, _INT, _WORD = Struct("<H"), Struct("<i"), Struct("<I")
_HEADER_FIELD, _COMPRESSION_FIELD = 2, 3  # of the tables Message and RecordBatch in Arrow's Message.fbs


def decoder() -> Decoder:
    """Return the decoder, if pyarrow is there."""
    if find_spec("pyarrow") is None:
        raise UnsupportedMediaTypeError(_INSTALL)
    return Decoder(_decode)


def encoder() -> Encoder:
    """Return the encoder, if pyarrow is there."""
    if find_spec("pyarrow") is None:
        raise NotAcceptableError(_INSTALL)
    return Encoder(MEDIA_TYPE, _encode)


def _decode(body: bytes, n_features: int | None = None) -> Any:  # noqa: ARG001
    """Return a pyarrow Table."""
    import pyarrow as pa  # noqa: PLC0415 - an optional dependency, and slow to import

    try:
        with pa.ipc.open_stream(body) as reader:
            _check_schema(reader.schema, pa.types)
        for message in _messages(pa, body):
            _check_message(message)
        with pa.ipc.open_stream(body) as reader:
            table = pa.Table.from_batches(list(reader), reader.schema)
        _check_size(table, len(body))
        table.validate(full=True)
    except (pa.ArrowException, OSError, EOFError, ValueError, MemoryError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"This is no Arrow IPC stream: {str(error)[:200]}. {_REMEDY}") from error
    return table


def _check_schema(schema: Any, types: Any) -> None:
    if not len(schema):
        raise InvalidInputError(f"The schema has no columns. {_REMEDY}")
    for field in schema:
        if not types.is_integer(field.type) and not types.is_floating(field.type):
            raise InvalidInputError(f"Column {str(field.name)[:40]!r} is of type {str(field.type)[:40]}. {_REMEDY}")


def _messages(pa: Any, body: bytes) -> Iterator[Any]:
    reader = pa.ipc.MessageReader.open_stream(body)
    with suppress(StopIteration):  # which it raises at the end
        while True:
            yield reader.read_next_message()


def _check_message(message: Any) -> None:
    if message.type not in {"schema", "record batch"}:
        raise InvalidInputError(f"The stream has a message of type {message.type}. {_REMEDY}")
    if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
        raise InvalidInputError(
            "A record batch is compressed. Send it as it is, and compress the body by gzip instead."
        )


def _is_compressed(metadata: bytes) -> bool:
    """Say whether the batch names a compression, which pyarrow does not tell; it has verified these flatbuffers."""
    message = _WORD.unpack_from(metadata, 0)[0]
    field = message + _slot(metadata, message, _HEADER_FIELD)
    return _slot(metadata, field + _WORD.unpack_from(metadata, field)[0], _COMPRESSION_FIELD) != 0


def _slot(metadata: bytes, table: int, field: int) -> int:
    """Return where in a flatbuffers table a field is, counted from the table; 0 if it is absent."""
    slots = table - _INT.unpack_from(metadata, table)[0]
    place = 4 + 2 * field
    size = _SHORT.unpack_from(metadata, slots)[0]
    return int(_SHORT.unpack_from(metadata, slots + place)[0]) if place < size else 0


def _check_size(table: Any, body_bytes: int) -> None:
    if not table.num_rows:
        raise InvalidInputError("The stream has no rows. Send at least one.")
    if table.num_rows * table.num_columns > body_bytes:
        raise InvalidInputError(f"The table has more cells than the body has bytes. {_REMEDY}")


def _encode(predictions: NDArray[np.float32]) -> bytes:
    """Return one batch; its column is "score", or they are "score_0", "score_1" ... if there are several outputs."""
    import pyarrow as pa  # noqa: PLC0415 - an optional dependency, and slow to import

    columns = np.ascontiguousarray(predictions.reshape(len(predictions), -1).T)
    names = ["score"] if predictions.ndim == 1 else [f"score_{place}" for place in range(len(columns))]
    batch = pa.record_batch([pa.array(column) for column in columns], names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded
