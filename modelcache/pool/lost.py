"""How a worker ended: what is told to those whose calls or loads it took with it."""

from __future__ import annotations

import signal
from dataclasses import dataclass

_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE})


@dataclass(frozen=True, slots=True)
class Epitaph:
    """What is known of a worker process that has ended."""

    pid: int
    exit_code: int | None
    """As Python gives it: negative for a signal, None if it is not known."""
    last_words: str
    """The end of what it wrote to standard error."""
    killed: str = ""
    """Why modelcache killed it, if it did for a reason of its own."""

    @property
    def signal(self) -> int | None:
        """The signal that ended it."""
        return -self.exit_code if self.exit_code is not None and self.exit_code < 0 else None

    @property
    def crashed(self) -> bool:
        """True if it broke by itself rather than being ended from outside."""
        return self.signal in _CRASHES if self.signal else bool(self.exit_code)

    @property
    def how(self) -> str:
        """What ended it, in few words: "SIGKILL", "exit code 1", "unknown"."""
        if self.exit_code is None:
            return "unknown"
        return _name(self.signal) if self.signal else f"exit code {self.exit_code}"

    def __str__(self) -> str:
        words = f"; its last words: {self.last_words}" if self.last_words else ""
        return f"worker process {self.pid} {self._how()}{words}"

    def _how(self) -> str:
        if not self.signal:
            return f"ended with exit code {self.exit_code}"
        if self.signal != signal.SIGKILL:  # it may have ended otherwise just before it was to be killed
            return f"was ended by {_name(self.signal)}"
        if self.killed:
            return f"was killed by modelcache, since {self.killed}"
        return "was ended by SIGKILL (the kernel's out-of-memory killer does that: see dmesg)"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have numbers only
        return f"signal {number}"


class WorkerLostError(Exception):
    """The worker ended under this call or load; internal, the registry retries or raises WorkerCrashedError.

    ``parsing`` is True for the one load that its parser was at, which may be what ended it.
    """

    def __init__(self, epitaph: Epitaph, *, parsing: bool = False) -> None:
        super().__init__(str(epitaph))
        self.epitaph = epitaph
        self.parsing = parsing
