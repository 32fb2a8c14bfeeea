"""What a codec is, and what all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

_SHOWN = 40  # characters of what a client sent that a message repeats


class Decode(Protocol):
    """Reads a body."""

    def __call__(self, body: bytes, n_features: int | None = None) -> Any:
        """Return the rows in ``body`` as ``registry.predict`` takes them, at least one; raises InvalidInputError."""
        ...


@dataclass(frozen=True, slots=True)
class Decoder:
    """Reads the bodies of one content type."""

    decode: Decode
    needs_width: bool = False
    """True if a body need not say how many columns it has, so that ``decode`` has to be given ``n_features``."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Writes predictions in one media type."""

    media_type: str
    encode: Callable[[NDArray[np.float32]], bytes]
    """Takes predictions of shape (n,) or (n, k), where n is at least 1."""


class Header(NamedTuple):
    """One media type, as a header names it: ``text/csv; label_size=1``."""

    media_type: str
    parameters: dict[str, str]


def parse_header(text: str) -> Header:
    """Return what ``text`` says; types and the names of parameters do not depend on case, nor do our values."""
    media_type, *rest = text.split(";")
    pairs = (part.partition("=") for part in rest)
    parameters = {name.strip().lower(): value.strip().strip('"').lower() for name, _, value in pairs}
    return Header(media_type.strip().lower(), parameters)


def shown(cell: str | bytes) -> str:
    """Return what a client sent as a message may repeat it: on one line, and not all of it if it is long."""
    text = cell if isinstance(cell, str) else cell.decode("utf-8", "replace")
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
