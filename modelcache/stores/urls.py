"""URLs of stores, as they are shown and remembered."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_PASSWORD = re.compile(r"(?<=://)([^/@:]*):.*@", re.DOTALL)
"""Up to the last "@": it may hold any character."""
_TOKEN = re.compile(r"^(https?://)[^/]*@")
"""On the web a name alone may be one; elsewhere it may be a container's."""


def without_secrets(url: str) -> str:
    """Return ``url`` without a password or token, and without what follows a question mark, where signatures are."""
    return _TOKEN.sub(r"\1", _PASSWORD.sub(r"\1@", url)).partition("?")[0]


def distinction(options: Mapping[str, Any]) -> str:
    """Tell stores of the same URL apart that their options, such as an endpoint, lead to different places."""
    return f"#{hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]}" if options else ""
