"""From what a user writes to a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from modelcache.errors import StoreError
from modelcache.stores.local import LocalStore

if TYPE_CHECKING:
    from modelcache.stores.base import ArtifactStore


def open_store(url: str | os.PathLike[str]) -> ArtifactStore:
    """Return the store that ``url`` names: a folder's path or a ``file://`` URL.

    For anything else, build the store and pass it to ``ModelRegistry`` instead of a URL.
    """
    text = os.fspath(url)
    if "://" not in text:
        return LocalStore(Path(text))
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return LocalStore(Path(unquote(parts.path)))
    raise StoreError(
        f"There is no store for {parts.scheme}:// URLs. Give a folder, a file:///path URL, or an object with fetch "
        "and close (modelcache.ArtifactStore)."
    )
