"""Files below a folder: found without ever leaving it, and read as one whole version."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache.errors import ArtifactChangedError, StoreAccessDeniedError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
NO_SUCH_FILE = GONE | frozenset({errno.ENAMETOOLONG, errno.ELOOP})

_IS_A_SOCKET = frozenset({errno.ENXIO, errno.EOPNOTSUPP})
"""What opening one fails with, on Linux and on macOS."""
_CHUNK = 512 << 10
_MOVES_FOLLOWED = 5
"""So many times a link is resolved again because what it leads to was moved before it could be opened."""

_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY
"""O_PATH where there is one: whoever may look for a name in a folder need not be allowed to list it."""
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""Not to be held up by a pipe that nobody writes to: what is no regular file is found out once it is open."""


class OpenFile:
    """A regular file that was opened, and the version it had then; errors are about ``model``.

    All methods but :meth:`close` are blocking, and belong into a thread. An object that nobody holds any more closes
    its descriptor: a load may be cancelled while a thread is on its way back with it.
    """

    def __init__(self, descriptor: int, found: os.stat_result, model: str) -> None:
        # Whoever uses the descriptor takes it out, and close() closes only what is in. list.pop and list.append are
        # atomic, so a read in a thread and a close() on the event loop never meet: if the reader has it, close() finds
        # nothing, and the reader, having put it back, sees `_closing`.
        self._idle = [descriptor]
        self._closing = False
        self.model = model
        self.size = found.st_size
        self.version = version_of(found)
        self._left = self.size

    def read(self) -> bytes:
        """Return the next bytes, b"" at the end; the file is closed with the last ones, and when a read fails.

        ArtifactChangedError, in place of the last bytes, if it is not the version any more that was opened.
        """
        if self._closing:
            return b""
        descriptor = self._idle.pop()
        try:
            return self._read(descriptor)
        except BaseException:
            self._closing = True
            raise
        finally:
            self._idle.append(descriptor)
            if self._closing:
                self.close()

    def _read(self, descriptor: int) -> bytes:
        chunk = os.read(descriptor, min(_CHUNK, self._left))
        self._left -= len(chunk)
        if not (chunk and self._left):
            self._check(os.fstat(descriptor))
            self._closing = True
        return chunk

    def _check(self, found: os.stat_result) -> None:
        if self._left or version_of(found) != self.version:
            raise ArtifactChangedError(
                f"{self.model} was changed while it was read. Replace artifacts by rename, never in place.",
                model=self.model,
            )

    @property
    def all_read(self) -> bool:
        """Whether there is nothing more to read."""
        return not self._left

    def close(self) -> None:
        """Close it, at the end of a read that is under way; harmless when done twice."""
        self._closing = True
        with suppress(IndexError):
            os.close(self._idle.pop())

    def __del__(self) -> None:
        self.close()


def version_of(found: os.stat_result) -> str:
    """Return what changes when a file is replaced or written to."""
    return f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"


def open_below(root: Path, path: str, model: str) -> OpenFile:
    """Open the regular file ``root / path`` of a model; links are followed as long as they lead below ``root``.

    Raises StoreAccessDeniedError if one leads out, StoreError if it is no regular file, else what opening it raises.
    """
    with _folder(root) as top:
        try:
            return _open_beneath(top, path, model)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
        return _open_link(root, top, path, model)


def _open_link(root: Path, top: int, path: str, model: str) -> OpenFile:
    """Open what ``path`` leads to, if one of its segments is a link.

    The path that it resolves to has no links, so it is opened without following any: whatever is moved between the
    look and the opening, nothing outside of ``root`` is opened.
    """
    target = _resolve(root, path, model)
    for _ in range(_MOVES_FOLLOWED):
        try:
            return _open_beneath(top, target, model)
        except OSError as error:
            before, target = target, _resolve(root, path, model)
            if error.errno not in NO_SUCH_FILE or target == before:
                raise
    return _open_beneath(top, target, model)


def _resolve(root: Path, path: str, model: str) -> str:
    """Return where ``root / path`` really is, relative to where ``root`` really is."""
    real = os.path.realpath(root)
    target = Path(os.path.realpath(Path(real, path)))
    if not target.is_relative_to(real):
        raise StoreAccessDeniedError(
            f"{path} is a link that leads out of {root}: copy the file into the folder.", model=model
        )
    return str(target.relative_to(real))


def _open_beneath(top: int, path: str, model: str) -> OpenFile:
    """Open a path from the folder ``top`` on, one segment after the other, following no link."""
    *segments, last = path.split("/")
    folder = top
    try:
        for segment in segments:
            inner = os.open(segment, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            if folder != top:
                os.close(folder)
            folder = inner
        return _open_file(last, folder, model)
    finally:
        if folder != top:
            os.close(folder)


def _open_file(path: str, folder: int, model: str) -> OpenFile:
    try:
        descriptor = os.open(path, _FILE, dir_fd=folder)
    except OSError as error:
        if error.errno in _IS_A_SOCKET:
            raise _not_regular(path, model) from error
        raise
    try:
        return OpenFile(descriptor, _look_at(descriptor, path, model), model)
    except BaseException:
        os.close(descriptor)
        raise


def _look_at(descriptor: int, path: str, model: str) -> os.stat_result:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise _not_regular(path, model)
    return found


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _not_regular(file: str, model: str) -> StoreError:
    return StoreError(f"{file} is not a regular file; a model is one file.", model=model)
