"""The folder of a disk tier: who uses it, and what a process that was killed has left in it.

::

    models/<sha256>      published copies: complete, listed in the index
    incoming/<process>/  what workers of one process are writing; the process holds a lock on it as long as it lives
    index.sqlite3        what is published: see disk_index.py
    changes              announces publications: see disk_changes.py
    lock                 held by a process while it opens or rebuilds the tier

A lock (``flock``) ends with its process however that ends, and is seen through the borders of containers that share
the folder, where a process number would mean nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DIGEST = re.compile("[0-9a-f]{64}")
_PRIVATE = 0o600
_PATIENCE = 10.0
"""Seconds to wait for another process that opens the same tier."""
_POLL = 0.01


def is_digest(text: str) -> bool:
    """Say whether ``text`` is a SHA-256 in lower-case hexadecimal digits: no other file name is ever removed."""
    return _DIGEST.fullmatch(text) is not None


class CacheFolder:
    """The files below ``root``. Everything here blocks, and raises OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.index = self.root / "index.sqlite3"
        self.changes = self.root / "changes"
        self.models_folder = self.root / "models"
        self._processes = self.root / "incoming"
        self.incoming = self._processes / secrets.token_hex(8)
        """Where the workers of this process write."""
        self._lock = -1

    def make(self) -> None:
        """Make what is not there yet, for this user alone."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.models_folder, self._processes):
            folder.mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def to_itself(self) -> Iterator[None]:
        """Keep other processes from opening the tier; TimeoutError if one is at it for long."""
        lock = os.open(self.root / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, _PRIVATE)
        try:
            deadline = time.monotonic() + _PATIENCE
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has been opening {self.root} for {_PATIENCE:g} s")
                time.sleep(_POLL)
            yield
        finally:
            os.close(lock)

    def move_in(self) -> None:
        """Make the folder that the workers of this process write to, and hold its lock."""
        self.incoming.mkdir(mode=0o700)
        self._lock = os.open(self.incoming, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def move_out(self) -> None:
        """Remove it; harmless when done twice."""
        if self._lock < 0:
            return
        shutil.rmtree(self.incoming, ignore_errors=True)
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked child may have a descriptor of it as well
        os.close(self._lock)
        self._lock = -1

    def sweep(self) -> bool:
        """Remove what processes that have ended were writing; True says that others are alive."""
        return any([self._is_inhabited(folder) for folder in self._processes.iterdir()])  # noqa: C419 - visit all

    def _is_inhabited(self, folder: Path) -> bool:
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):  # it has just moved out; or this is nothing of ours
            return False
        try:
            if not _try_lock(lock):
                return True
            shutil.rmtree(folder, ignore_errors=True)
            return False
        finally:
            os.close(lock)

    def set_index_aside(self) -> Path:
        """Move a damaged index out of the way and return where it is now."""
        aside = self.index.with_name("index.damaged")
        self.index.replace(aside)
        for companion in ("-wal", "-shm", "-journal"):
            self.index.with_name(self.index.name + companion).unlink(missing_ok=True)
        return aside

    def model(self, digest: str) -> Path:
        """Return the path of a published file."""
        return self.models_folder / digest

    def models(self) -> dict[str, int]:
        """Return the bytes of each published file, listed in the index or not, by digest."""
        with os.scandir(self.models_folder) as entries:
            return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries if is_digest(entry.name)}

    def receive(self, incoming: Path) -> int:
        """Return the bytes of a file that was written, and see to it that it is for this user alone."""
        found = incoming.stat()
        if stat.S_IMODE(found.st_mode) != _PRIVATE:
            incoming.chmod(_PRIVATE)
        return found.st_size

    def is_sound(self, digest: str) -> bool:
        """Say whether there is a published file of these bytes, and whether it has them."""
        try:
            with self.model(digest).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False

    def admit(self, incoming: Path, digest: str) -> None:
        """Give a complete file its name among the models, in one step; over a damaged one, if there is one."""
        incoming.replace(self.model(digest))

    def remove(self, digest: str) -> None:
        """Remove a published file; harmless if it is gone."""
        self.model(digest).unlink(missing_ok=True)

    def free(self) -> int:
        """Return the bytes that this user can still write."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize


def _try_lock(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
