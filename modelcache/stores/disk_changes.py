"""How a process learns, without asking the index, that others have published something."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_BYTES = 8


class ChangeCounter:
    """A number in a file that all processes have in their memory, and that grows with each publication.

    A publisher counts up while the index is locked, before it commits. So no publication is ever there that was not
    counted; one that was counted may not be there yet, or never, which costs the others a look-up.

    Reading is no system call: the event loop may do it, also while a thread counts up or closes this.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size < _BYTES:
                os.pwrite(descriptor, bytes(_BYTES), 0)  # not by truncating: a full disk is told now, not by SIGBUS
            self._shared = mmap.mmap(descriptor, _BYTES)
        finally:
            os.close(descriptor)

    def read(self) -> bytes:
        """Return the number, of which all that matters is whether it is another one; nothing once this is closed."""
        try:
            return self._shared[:]
        except ValueError:
            return b""

    def advance(self) -> bytes:
        """Count a publication, with the index locked; return the new number."""
        number = (int.from_bytes(self._shared) + 1) % (1 << 8 * _BYTES)
        self._shared[:] = number.to_bytes(_BYTES)
        return self.read()

    def close(self) -> None:
        """Let go of the file."""
        self._shared.close()
