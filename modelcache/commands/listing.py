"""``modelcache manifest``: the SHA-256 of every artifact in a folder, written where stores look for it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from modelcache import StoreError
from modelcache.commands.terminal import show_size, track
from modelcache.stores.manifest import MANIFEST
from modelcache.stores.suffixes import name_of

if TYPE_CHECKING:
    from rich.console import Console

_READABLE = 0o644


def write_manifest(console: Console, folder: Path) -> None:
    """List the artifacts below ``folder`` in its manifest, which is replaced in one step."""
    files = _artifacts(folder)
    if not files:
        raise StoreError(f"There are no artifacts in {folder}: a manifest of nothing would refuse everything.")
    listed = {file: _sha256(folder / file) for file in track(console, files, "Hashing")}
    _replace(folder / MANIFEST, json.dumps({"sha256": listed}, indent=1) + "\n")
    size = show_size(sum((folder / file).stat().st_size for file in files))
    console.print(
        f"{len(files)} {'artifact' if len(files) == 1 else 'artifacts'} ({size}) in {folder / MANIFEST}. "
        "Whatever it does not list is refused from now on.",
        soft_wrap=True,
    )


def _artifacts(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise StoreError(f"The folder {folder} does not exist.")
    below = (file for file in folder.rglob("*") if file.is_file())
    files = (file.relative_to(folder).as_posix() for file in below)
    return sorted(file for file in files if name_of(file) and file != MANIFEST)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace(file: Path, text: str) -> None:
    """Put ``text`` where readers find the old file or the new one, and never a part of it."""
    with NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False) as new:
        try:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
            Path(new.name).chmod(_READABLE)  # as the artifacts are; a temporary file is its owner's alone
            Path(new.name).replace(file)
        except BaseException:
            Path(new.name).unlink()
            raise
