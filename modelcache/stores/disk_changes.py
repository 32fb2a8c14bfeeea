"""How a process learns, without asking the index, that others have published something."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_BYTES = 8


class ChangeMark:
    """Some bytes in a file, which are others after each publication of any process.

    A publisher changes them while the index is locked, before it commits. So no publication is ever there that was not
    announced; one that was announced may not be there yet, or never, which costs the others a look-up. They are random:
    what somebody has done to the file must not make them look like those of before.

    Reading takes a microsecond: the event loop may do it, also while a thread changes them or closes this. They are
    not mapped into memory, since whoever truncates a file that is kills those who look at it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = self._open()
        try:
            if os.fstat(self._descriptor).st_size != _BYTES:
                self.change()
        except BaseException:
            self.close()
            raise

    def read(self) -> bytes:
        """Return them, to be compared; nothing once this is closed, or if the file is not that of others any more."""
        try:
            is_there = os.fstat(self._descriptor).st_nlink
            return os.pread(self._descriptor, _BYTES, 0) if is_there else b""
        except OSError:
            return b""

    def change(self) -> bytes:
        """Announce a publication, with the index locked; return what is to be read now."""
        if not os.fstat(self._descriptor).st_nlink:  # somebody has removed it, and others may have a new one
            self.close()
            self._descriptor = self._open()
        mark = os.urandom(_BYTES)
        os.pwrite(self._descriptor, mark, 0)
        return mark

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _open(self) -> int:
        return os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
