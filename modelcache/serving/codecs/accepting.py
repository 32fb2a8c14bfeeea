"""Which of our media types a client's ``Accept`` asks for."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from modelcache.serving.codecs.base import parse_header, shown
from modelcache.serving.errors import NotAcceptableError

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Range(NamedTuple):
    """One part of the header: ``text/*;q=0.5``."""

    pattern: str
    quality: float


def choose(accept: str, offered: Sequence[str]) -> str:
    """Return which of the ``offered`` types, the one that is preferred first, a client wants most.

    A type has the quality of the most specific range that it is in (RFC 9110, 12.5.1). Of types of equal quality that
    one is chosen whose range comes first in the header, as boto3's users mean it; then the one offered first.
    """
    ranges = [_range(part) for part in accept.split(",") if part.strip()]
    best, quality, place = "", 0.0, 0
    for media_type in offered:
        found = _most_specific(media_type, ranges)
        if found is None:
            continue
        here = ranges[found].quality
        if here > quality or (here == quality and best and found < place):
            best, quality, place = media_type, here, found
    if not best:
        raise NotAcceptableError(f"Accept {shown(accept)} has none of the types of answers: {', '.join(offered)}.")
    return best


def _range(text: str) -> _Range:
    pattern, parameters = parse_header(text)
    said = parameters.get("q", "1")
    with suppress(ValueError):
        quality = float(said)
        if 0 <= quality <= 1:
            return _Range(pattern, quality)
    raise NotAcceptableError(f"Accept has q={said[:40]}. A quality is a number from 0 to 1.")


def _most_specific(media_type: str, ranges: list[_Range]) -> int | None:
    patterns = [one.pattern for one in ranges]
    for pattern in (media_type, f"{media_type.partition('/')[0]}/*", "*/*"):
        if pattern in patterns:
            return patterns.index(pattern)
    return None
