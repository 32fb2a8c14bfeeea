"""Bodies in, rows out; predictions in, bodies out.

::

    decoder = decoder_for("text/csv; label_size=1")            # UnsupportedMediaTypeError
    rows = decoder.decode(body)                                # InvalidInputError; what registry.predict takes
    encoder = encoder_for("application/json", "text/csv")      # NotAcceptableError
    answer = encoder.encode(predictions)                       # float32, shape (n,) or (n, k); encoder.media_type

A module for each format says what is read and what is refused. They take bodies whose size is bounded already, and are
linear in it; they hold the thread while they work, so large bodies belong in another than the event loop's.

Nothing is guessed that a wrong guess would make a wrong prediction of: no Content-Type is read as none, and botocore's
``application/octet-stream``, which it sends where none is given, is refused with the list of what is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcache.serving.codecs import arrow, csv_text, json_text, libsvm, npy, recordio
from modelcache.serving.codecs.accepting import choose
from modelcache.serving.codecs.base import Decoder, Encoder, parse_header, shown
from modelcache.serving.errors import UnsupportedMediaTypeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.serving.codecs.base import Header

__all__ = ["CONTENT_TYPES", "MEDIA_TYPES", "Decoder", "Encoder", "decoder_for", "encoder_for"]

_DECODERS: dict[str, Callable[[Header, int], Decoder]] = {
    "text/csv": lambda header, _: csv_text.decoder(header.parameters),
    "text/libsvm": lambda header, index_base: libsvm.decoder(header.parameters, index_base),
    "text/x-libsvm": lambda header, index_base: libsvm.decoder(header.parameters, index_base),
    "application/x-recordio-protobuf": lambda _header, _: recordio.decoder(),
    "application/json": lambda _header, _: json_text.decoder(),
    "application/jsonlines": lambda _header, _: json_text.lines_decoder(),
    "application/x-npy": lambda _header, _: npy.decoder(),
    arrow.MEDIA_TYPE: lambda _header, _: arrow.decoder(),
}
_ENCODERS: dict[str, Callable[[], Encoder]] = {
    "text/csv": lambda: Encoder("text/csv", csv_text.encode),
    "application/json": lambda: Encoder("application/json", json_text.encode),
    "application/jsonlines": lambda: Encoder("application/jsonlines", json_text.encode_lines),
    "application/x-npy": lambda: Encoder("application/x-npy", npy.encode),
    arrow.MEDIA_TYPE: arrow.encoder,
}
_BARE_JSON = Encoder("application/json", json_text.encode_bare)

CONTENT_TYPES = tuple(_DECODERS)
"""What bodies of requests may be."""
MEDIA_TYPES = tuple(_ENCODERS)
"""What answers may be, the first preferred where a client leaves the choice."""


def decoder_for(content_type: str, index_base: int = 0) -> Decoder:
    """Return what reads bodies of this type; ``index_base`` is the first index of libsvm where the type has none."""
    header = parse_header(content_type)
    make = _DECODERS.get(header.media_type)
    if make is None:
        what = (
            f"Content-Type {shown(content_type)} is not read." if content_type.strip() else "There is no Content-Type."
        )
        raise UnsupportedMediaTypeError(f"{what} Send one of {', '.join(CONTENT_TYPES)}.")
    return make(header, index_base)


def encoder_for(accept: str | None, default: str, *, bare_json: bool = False) -> Encoder:
    """Return what writes answers as ``accept`` asks, and in the type ``default`` where it leaves the choice.

    JSON is ``{"predictions":[{"score":1.5}]}``, or ``[1.5]`` with ``bare_json``.
    """
    offered = dict.fromkeys((default, *MEDIA_TYPES))
    media_type = choose(accept, tuple(offered)) if accept and accept.strip() else default
    return _BARE_JSON if bare_json and media_type == "application/json" else _ENCODERS[media_type]()
