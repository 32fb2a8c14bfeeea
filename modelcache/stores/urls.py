"""URLs of stores, as they are shown and remembered."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")


def without_secrets(url: str) -> str:
    """Return ``url`` without a password and without what follows a question mark, where keys and signatures are."""
    return _PASSWORD.sub(r"\1@", url.partition("?")[0])
