"""URLs of stores, as they are shown and remembered."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECRETS = re.compile(r"(?<=://).*@", re.DOTALL)
"""Who and how, up to the last "@": a password may hold any character, and a user's name may be a token."""


def without_secrets(url: str) -> str:
    """Return ``url`` without who asks, and without what follows a question mark, where keys and signatures are."""
    return _SECRETS.sub("", url).partition("?")[0]


def distinction(options: Mapping[str, Any]) -> str:
    """Tell stores of the same URL apart that their options, such as an endpoint, lead to different places."""
    return f"#{hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]}" if options else ""
