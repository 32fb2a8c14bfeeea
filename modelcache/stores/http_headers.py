"""What the header fields of an answer say of an artifact; no I/O."""

from __future__ import annotations

import binascii
import re
import time
from base64 import b64decode
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from uuid import uuid4

from modelcache.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

_ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_DATED = re.compile(r"([A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT);\d*")
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=([^,;\s]*)", re.IGNORECASE)
_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")
_DIGESTS = ("Repr-Digest", "Content-Digest", "Digest")
"""RFC 9530, and RFC 3230 before it. The second is of what one answer carries, which is all unless it is a range."""


def version_of(headers: Mapping[str, str]) -> str:
    """Return the version token of an answer; one that never comes again if there is nothing to make it of."""
    etag = headers.get("ETag", "")
    if _ETAG.fullmatch(etag):
        return etag
    dated = f"{headers.get('Last-Modified', '')};{headers.get('Content-Length', '')}"
    if _DATED.fullmatch(dated):
        return dated
    digest = sha256_of(headers)
    return f"sha-256={digest}" if digest else f"unknown-{uuid4().hex}"


def condition(version: str) -> dict[str, str]:
    """Return the request's fields that ask for an answer only if the version is not this one; none if nothing can."""
    if _ETAG.fullmatch(version):
        return {"If-None-Match": version}
    dated = _DATED.fullmatch(version)
    return {"If-Modified-Since": dated[1]} if dated else {}


def is_strong(version: str) -> bool:
    """Say whether two answers of this version have the same bytes, for certain."""
    return version.startswith('"')


def sha256_of(headers: Mapping[str, str]) -> str | None:
    """Return the announced SHA-256 in hexadecimal digits, of the bytes as they are sent."""
    for field in _DIGESTS:
        announced = _SHA256.search(headers.get(field, ""))
        if announced:
            return _decoded(announced[1].strip(":"))
    return None


def _decoded(text: str) -> str:
    try:
        return b64decode(text, validate=True).hex()
    except binascii.Error as error:
        raise StoreError(f"The server announced the SHA-256 {text!r}, which is not base64.") from error


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, by their number or by a date; None if it does not."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def start_of(headers: Mapping[str, str]) -> int | None:
    """Return the first byte of the range that an answer carries; None if it does not say."""
    found = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
    return int(found[1]) if found else None


def codings_of(headers: Mapping[str, str]) -> list[str]:
    """Return how the bytes are encoded, the last coding last."""
    listed = headers.get("Content-Encoding", "").lower().split(",")
    return [coding.strip() for coding in listed if coding.strip() not in ("", "identity")]
